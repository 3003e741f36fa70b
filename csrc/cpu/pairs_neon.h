#pragma once

// What pairs.h asks of an instruction set with products of bf16 pairs, by NEON with BF16.

#include "cpu/simd.h"

namespace usp::cpu {
namespace {

typedef uint16_t Halves __attribute__((vector_size(8)));

// Word by word: the two products of left and right, added to the sum. The sum of the two, and then
// the whole, are rounded to odd, not to even, and subnormal numbers are taken for 0.
USP_SIMD Vec<float> add_products_of_lanes(Vec<float> left, Vec<float> right, Vec<float> sum) {
  return (Vec<float>)vbfdotq_f32((float32x4_t)sum, (bfloat16x8_t)left, (bfloat16x8_t)right);
}

// The same with one word on the left.
USP_SIMD Vec<float> add_products(float left, Vec<float> right, Vec<float> sum) {
  const auto word = (bfloat16x4_t)float32x2_t{left, 0};
  return (Vec<float>)vbfdotq_lane_f32((float32x4_t)sum, (bfloat16x8_t)right, word, 0);
}

USP_SIMD Halves rounded(Vec<float> x) { return (Halves)vcvt_bf16_f32((float32x4_t)x); }

// 8 bf16: lane by lane one of `first`, one of `second`.
USP_SIMD Vec<float> rounded_pairs(Vec<float> first, Vec<float> second) {
  const auto low = (uint16x8_t)vcvtq_low_bf16_f32((float32x4_t)first);
  const auto high = (uint16x8_t)vcvtq_low_bf16_f32((float32x4_t)second);
  return (Vec<float>)vzip1q_u16(low, high);
}

// As many as are `there`, and zeros.
USP_SIMD Halves load_halves(const uint16_t* p, int64_t there) {
  Halves halves = {};
  if (there >= kLanes<float>) {
    __builtin_memcpy(&halves, p, sizeof(halves));
  } else {
    for (int64_t i = 0; i < there; ++i) halves[i] = p[i];
  }
  return halves;
}

inline constexpr int64_t kColumnsAtOnce = kLanes<float>;

// A vector of words, each of one bf16 of `low` and one of `high`, as many as are `there`, and
// zeros.
USP_SIMD void store_interleaved(const uint16_t* low, const uint16_t* high, int64_t there, int64_t,
                                float* to) {
  const auto halves =
      vzip_u16((uint16x4_t)load_halves(low, there), (uint16x4_t)load_halves(high, there));
  store<float>(to, (Vec<float>)vcombine_u16(halves.val[0], halves.val[1]));
}

}  // namespace
}  // namespace usp::cpu
