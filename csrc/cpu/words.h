#pragma once

// What operands of gemm are made of (kernels.h): how two words are multiplied, and how a score tile
// is written as words.

#include "cpu/kernels.h"
#include "cpu/simd.h"

namespace usp::cpu {
namespace {

// A word is one element: every matrix is its own operand.
struct SingleWords {
  static constexpr int64_t kElements = 1;
  static constexpr bool kRounds = false;  // the elements of a tile
  static constexpr bool kInPlace = true;

  template <typename T>
  static USP_SIMD_MEMBER Vec<T> multiply_add(const T& left, Vec<T> right, Vec<T> sum) {
    return sum + left * right;
  }

  template <typename T>
  static USP_SIMD_MEMBER Vec<T> multiply_add_lanes(Vec<T> left, Vec<T> right, Vec<T> sum) {
    return sum + left * right;
  }

  // Where store_by_key and store_by_query write, as left operands (keys, queries) and its
  // transpose.
  template <typename T>
  static Matrix<const T> by_key(Tile<T> tile, T*) {
    return {tile.data, tile.queries};
  }

  template <typename T>
  static Matrix<const T> by_query(Tile<T> tile, T*) {
    return {tile.data, tile.queries, true};
  }

  // A vector of queries of key j.
  template <typename T>
  static USP_SIMD_MEMBER void store_by_key(Tile<T> tile, T*, int64_t j, int64_t i, Vec<T> x) {
    store<T>(tile.row(j) + i, x);
  }

  // The same of keys j and j + 1; the second counts only if it is there.
  template <typename T>
  static USP_SIMD_MEMBER void store_by_query(Tile<T> tile, T*, int64_t j, int64_t i, Vec<T> first,
                                             Vec<T> second) {
    store<T>(tile.row(j) + i, first);
    if (j + 1 < tile.keys) store<T>(tile.row(j + 1) + i, second);
  }
};

}  // namespace
}  // namespace usp::cpu
