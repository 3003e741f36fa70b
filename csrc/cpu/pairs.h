#pragma once

// Words of two bf16, for the objects whose products take such pairs. The including file has set a
// target with BF16 instructions: AVX-512's, with vectors of 64 bytes, or NEON's.
//
// Weights and gradients of scores are rounded to bf16 for their products, to nearest even.

#include "cpu/tile_kernels.h"

#if USP_CPU_ARM
#include "cpu/pairs_neon.h"
#else
#include "cpu/pairs_avx512.h"
#endif

namespace usp::cpu {
namespace {

int64_t pairs(int64_t count) { return (count + 1) / 2; }

// A word is two bf16, the first in the low half. Products are exact and summed in fp32.
struct PairWords {
  static constexpr int64_t kElements = 2;
  static constexpr bool kRounds = true;
  static constexpr bool kInPlace = false;

  static USP_SIMD_MEMBER Vec<float> multiply_add(const float& left, Vec<float> right,
                                                 Vec<float> sum) {
    return add_products(left, right, sum);
  }

  template <typename T>
  static USP_SIMD_MEMBER Vec<T> multiply_add_lanes(Vec<T> left, Vec<T> right, Vec<T> sum) {
    return add_products_of_lanes(left, right, sum);
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
    const Halves halves = rounded(x);
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

// A row in place of the one behind an odd last one.
alignas(64) inline constexpr uint16_t kNoRow[kColumnsAtOnce] = {};

// Some columns of all rows after the others, so that what is there of a row is found once.
void right_row_pairs(DType, const void* src, int64_t src_stride, int64_t rows, int64_t cols,
                     Matrix<float> dst) {
  for (int64_t d = 0; d < dst.ld; d += kColumnsAtOnce) {
    const auto* halves = static_cast<const uint16_t*>(src) + d;
    const int64_t there = std::max<int64_t>(cols - d, 0), room = dst.ld - d;
    for (int64_t i = 0; i < rows; i += 2) {
      const uint16_t* low = halves + i * src_stride;
      store_interleaved(low, i + 1 < rows ? low + src_stride : kNoRow, there, room,
                        dst.data + i / 2 * dst.ld + d);
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
  table.right_rows = table.weighted_rows = right_row_pairs;
  table.right_transpose = right_transpose_pairs;
  return table;
}

}  // namespace
}  // namespace usp::cpu
