#pragma once

// What pairs.h asks of an instruction set with products of bf16 pairs, by AVX-512 BF16.

#include "cpu/simd.h"

namespace usp::cpu {
namespace {

typedef uint16_t Halves __attribute__((vector_size(32)));

// Word by word: the two products of left and right, added to the sum.
USP_SIMD Vec<float> add_products_of_lanes(Vec<float> left, Vec<float> right, Vec<float> sum) {
  return (Vec<float>)_mm512_dpbf16_ps((__m512)sum, (__m512bh)left, (__m512bh)right);
}

// The same with one word on the left, which the instruction takes from memory; compilers load it
// into a register of its own, which takes longer than the product where a block is one vector wide.
USP_SIMD Vec<float> add_products(const float& left, Vec<float> right, Vec<float> sum) {
  asm("vdpbf16ps %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(right), "m"(left));
  return sum;
}

USP_SIMD Halves rounded(Vec<float> x) { return (Halves)_mm512_cvtneps_pbh((__m512)x); }

// 32 bf16: lane by lane one of `first`, one of `second`.
USP_SIMD Vec<float> rounded_pairs(Vec<float> first, Vec<float> second) {
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24,
                                         8, 23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  const __m512bh halves = _mm512_cvtne2ps_pbh((__m512)second, (__m512)first);
  return (Vec<float>)_mm512_permutexvar_epi16(order, (__m512i)halves);
}

inline constexpr int64_t kColumnsAtOnce = 32;

// `room` words, each of one bf16 of `low` and one of `high`, as many as are `there`, and zeros.
// Both are in one vector, and two shuffles mix them.
USP_SIMD void store_interleaved(const uint16_t* low, const uint16_t* high, int64_t there,
                                int64_t room, float* to) {
  const __m512i first = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40,
                                         8, 39, 7, 38, 6, 37, 5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
  const __m512i second = _mm512_add_epi16(first, _mm512_set1_epi16(16));
  const auto some = static_cast<__mmask32>(there >= kColumnsAtOnce ? -1 : (1 << there) - 1);
  const __m512i x = _mm512_maskz_loadu_epi16(some, low), y = _mm512_maskz_loadu_epi16(some, high);
  store<float>(to, (Vec<float>)_mm512_permutex2var_epi16(x, first, y));
  if (room <= kLanes<float>) return;
  store<float>(to + kLanes<float>, (Vec<float>)_mm512_permutex2var_epi16(x, second, y));
}

}  // namespace
}  // namespace usp::cpu
