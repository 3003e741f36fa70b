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

// The same with one word on the left.
USP_SIMD Vec<float> add_products(float left, Vec<float> right, Vec<float> sum) {
  return add_products_of_lanes((Vec<float>)_mm512_set1_ps(left), right, sum);
}

USP_SIMD Halves rounded(Vec<float> x) { return (Halves)_mm512_cvtneps_pbh((__m512)x); }

// 32 bf16: lane by lane one of `first`, one of `second`.
USP_SIMD Vec<float> rounded_pairs(Vec<float> first, Vec<float> second) {
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24,
                                         8, 23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  const __m512bh halves = _mm512_cvtne2ps_pbh((__m512)second, (__m512)first);
  return (Vec<float>)_mm512_permutexvar_epi16(order, (__m512i)halves);
}

// 16 words, each of one bf16 of `low` and one of `high`.
USP_SIMD Vec<float> interleaved(Halves low, Halves high) {
  return (Vec<float>)(__builtin_convertvector(low, Mask<float>) |
                      (__builtin_convertvector(high, Mask<float>) << 16));
}

// As many as are `there`, and zeros.
USP_SIMD Halves load_halves(const uint16_t* p, int64_t there) {
  const __mmask16 some = there >= kLanes<float> ? 0xFFFF : there <= 0 ? 0 : (1 << there) - 1;
  return (Halves)_mm256_maskz_loadu_epi16(some, p);
}

}  // namespace
}  // namespace usp::cpu
