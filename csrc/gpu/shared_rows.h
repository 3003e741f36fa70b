#pragma once

// Rows of a tensor in shared memory.

#include "gpu/blocks.h"
#include "gpu/half.h"

namespace usp::gpu {

// Head h of batch entry b of a tensor: (row, head_dim).
template <typename T>
struct HeadRows {
  const T* data;
  int64_t row_stride;
  int head_dim;

  USP_DEVICE static HeadRows of(const TensorView& x, int64_t b, int64_t h, int64_t head_dim) {
    return {static_cast<const T*>(x.data) + b * x.batch_stride + h * x.head_stride, x.row_stride,
            static_cast<int>(head_dim)};
  }
};

// kRows rows padded to kDim columns. Eight numbers between rows put the eight rows that a matrix
// load touches at once into different banks, and keep each row aligned to 16 bytes.
template <typename T, int kRows, int kDim>
struct SharedRows {
  static constexpr int kStride = kDim + 8;
  static constexpr int kBytes = kRows * kStride * 2;

  T* data;

  USP_DEVICE T* row(int index) const { return data + index * kStride; }

  // visit(i, row, column, whether it is this thread's) for the vectors of 16 bytes that threads
  // share out: each takes one of every so many rows, i is known to the compiler.
  static constexpr int kVector = 8;  // numbers

  template <int kThreads>
  static constexpr int kRowsApart = kThreads / (kDim / kVector);
  template <int kThreads>
  static constexpr int kVectors = (kRows + kRowsApart<kThreads> - 1) / kRowsApart<kThreads>;

  template <int kThreads, typename Visit>
  USP_DEVICE static void for_each_vector(Visit&& visit) {
    constexpr int kPerRow = kDim / kVector, kApart = kRowsApart<kThreads>;
    const int index = static_cast<int>(thread_index());
    const bool takes_part = kThreads % kPerRow == 0 || index < kApart * kPerRow;
    USP_UNROLL
    for (int i = 0; i < kVectors<kThreads>; ++i) {
      const int r = i * kApart + index / kPerRow;
      const bool in_tile = kRows % kApart == 0 || r < kRows;
      visit(i, r, index % kPerRow * kVector, takes_part && in_tile);
    }
  }

  // visit(row, column) of each number that is this thread's.
  template <int kThreads, typename Visit>
  USP_DEVICE static void for_each_number(Visit&& visit) {
    for (int index = static_cast<int>(thread_index()); index < kRows * kDim; index += kThreads) {
      visit(index / kDim, index % kDim);
    }
  }
};

// Several tiles of rows, one behind the other.
template <typename Rows, int kCount>
struct SharedStages {
  static constexpr int kBytes = kCount * Rows::kBytes;

  decltype(Rows::data) data;

  USP_DEVICE Rows stage(int step) const {
    if constexpr (kCount == 1) return {data};
    return {data + step % kCount * (Rows::kBytes / 2)};
  }
};

// Hands out the block's shared memory piece by piece.
class SharedCarver {
 public:
  USP_DEVICE explicit SharedCarver(char* base) : next_(base) {}

  template <typename Rows>
  USP_DEVICE Rows rows() {
    return {reinterpret_cast<decltype(Rows::data)>(take(Rows::kBytes))};
  }

  USP_DEVICE float* floats(int count) { return reinterpret_cast<float*>(take(count * 4)); }

 private:
  USP_DEVICE char* take(int bytes) {
    char* piece = next_;
    next_ += bytes;
    return piece;
  }

  char* next_;
};

}  // namespace usp::gpu
