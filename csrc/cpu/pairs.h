#pragma once

// Words of two bf16, for the objects whose products take such pairs. The including file has set
// USP_VECTOR_BYTES to 64 and a target with AVX-512 BF16.
//
// Weights and gradients of scores are rounded to bf16 for their products, to nearest even.

#include "cpu/tile_kernels.h"

namespace usp::cpu {
namespace {

int64_t pairs(int64_t count) { return (count + 1) / 2; }

// 32 bf16: lane by lane one of `first`, one of `second`.
USP_SIMD Vec<float> rounded_pairs(Vec<float> first, Vec<float> second) {
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24,
                                         8, 23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  const __m512bh halves = _mm512_cvtne2ps_pbh((__m512)second, (__m512)first);
  return (Vec<float>)_mm512_permutexvar_epi16(order, (__m512i)halves);
}

// A word is two bf16, the first in the low half. Products are exact and summed in fp32.
struct PairWords {
  static constexpr int64_t kElements = 2;
  static constexpr bool kRounds = true;
  static constexpr bool kInPlace = false;

  static USP_SIMD_MEMBER Vec<float> multiply_add(float left, Vec<float> right, Vec<float> sum) {
    return multiply_add_lanes<float>((Vec<float>)_mm512_set1_ps(left), right, sum);
  }

  template <typename T>
  static USP_SIMD_MEMBER Vec<T> multiply_add_lanes(Vec<T> left, Vec<T> right, Vec<T> sum) {
    return _mm512_dpbf16_ps(sum, (__m512bh)left, (__m512bh)right);
  }

  template <typename T>
  static Matrix<const T> by_key(Tile<T> tile, T* room) {
    return {room, tile.queries / 2};
  }

  template <typename T>
  static Matrix<const T> by_query(Tile<T> tile, T* room) {
    return {room, tile.queries, true};
  }

  template <typename T>
  static USP_SIMD_MEMBER void store_by_key(Tile<T> tile, T* room, int64_t j, int64_t i, Vec<T> x) {
    const auto halves = _mm512_cvtneps_pbh((__m512)x);
    __builtin_memcpy(room + (j * tile.queries + i) / 2, &halves, sizeof(halves));
  }

  template <typename T>
  static USP_SIMD_MEMBER void store_by_query(Tile<T> tile, T* room, int64_t j, int64_t i,
                                             Vec<T> first, Vec<T> second) {
    store<T>(room + j / 2 * tile.queries + i, rounded_pairs(first, second));
  }
};

Matrix<const float> left_row_pairs(DType, const void* src, int64_t src_stride, int64_t rows,
                                   int64_t cols, Matrix<float> room) {
  const auto* halves = static_cast<const uint16_t*>(src);
  const bool aligned = reinterpret_cast<uintptr_t>(src) % alignof(float) == 0;
  if (aligned && cols % 2 == 0 && src_stride % 2 == 0) {
    return {static_cast<const float*>(src), src_stride / 2};
  }
  for (int64_t i = 0; i < rows; ++i) {
    auto* to = reinterpret_cast<uint16_t*>(room.data + i * room.ld);
    __builtin_memcpy(to, halves + i * src_stride, static_cast<size_t>(cols) * sizeof(*to));
    to[cols] = 0;  // of the last pair
  }
  return {room.data, room.ld};
}

typedef uint16_t Halves __attribute__((vector_size(32)));

// 16 words, each of one bf16 of `low` and one of `high`.
USP_SIMD Vec<float> interleave(Halves low, Halves high) {
  return (Vec<float>)(__builtin_convertvector(low, Mask<float>) |
                      (__builtin_convertvector(high, Mask<float>) << 16));
}

void right_row_pairs(DType, const void* src, int64_t src_stride, int64_t rows, int64_t cols,
                     Matrix<float> dst) {
  for (int64_t i = 0; i < rows; i += 2) {
    const uint16_t* low = static_cast<const uint16_t*>(src) + i * src_stride;
    const uint16_t* high = low + src_stride;
    float* to = dst.data + i / 2 * dst.ld;
    for (int64_t d = 0; d < dst.ld; d += kPad) {
      const int64_t there = cols - d;
      const __mmask16 some = there >= kPad ? 0xFFFF : there <= 0 ? 0 : (1 << there) - 1;
      const __mmask16 in_pair = i + 1 < rows ? some : __mmask16{0};
      store<float>(to + d, interleave((Halves)_mm256_maskz_loadu_epi16(some, low + d),
                                      (Halves)_mm256_maskz_loadu_epi16(in_pair, high + d)));
    }
  }
}

void right_transpose_pairs(Matrix<const float> left, int64_t rows, int64_t cols,
                           Matrix<float> dst) {
  right_transpose<float>(left, rows, pairs(cols), dst);
}

constexpr Kernels<float> make_bf16_kernels() {
  Kernels<float> table = make_kernels<float, PairWords>();
  table.left_rows = left_row_pairs;
  table.right_rows = right_row_pairs;
  table.right_transpose = right_transpose_pairs;
  return table;
}

}  // namespace
}  // namespace usp::cpu
