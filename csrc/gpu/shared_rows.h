#pragma once

// Rows of a tensor in shared memory.

#include "blocks.h"
#include "half.h"

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

  // Rows [rows.begin, rows.end), zeros beyond them and beyond head_dim. In steps of 16 bytes where
  // `vectors`: then every row is aligned to 16 bytes and head_dim a multiple of 8.
  template <int kThreads>
  USP_DEVICE void load(const HeadRows<T>& from, Rows rows, bool vectors) const {
    const int count = rows.size();
    const T* base = from.data + rows.begin * from.row_stride;
    if (vectors) {
      load_vectors<kThreads>(base, from, count);
    } else {
      load_elements<kThreads>(base, from, count);
    }
  }

 private:
  // A thread copies one vector of every kStep-th row.
  template <int kThreads>
  USP_DEVICE void load_vectors(const T* base, const HeadRows<T>& from, int count) const {
    constexpr int kVector = 8, kPerRow = kDim / kVector, kStep = kThreads / kPerRow;
    const int index = static_cast<int>(thread_index());
    const int d = index % kPerRow * kVector;
    if (kThreads % kPerRow != 0 && index >= kStep * kPerRow) return;
    const T* source = base + index / kPerRow * from.row_stride + d;
    USP_UNROLL
    for (int first = 0; first < kRows; first += kStep) {
      const int r = first + index / kPerRow;
      if (kRows % kStep != 0 && r >= kRows) break;
      const bool valid = r < count && d < from.head_dim;
      copy16(row(r) + d, valid ? source : base, valid);
      source += kStep * from.row_stride;
    }
  }

  template <int kThreads>
  USP_DEVICE void load_elements(const T* base, const HeadRows<T>& from, int count) const {
    for (int index = static_cast<int>(thread_index()); index < kRows * kDim; index += kThreads) {
      const int r = index / kDim, d = index % kDim;
      const bool valid = r < count && d < from.head_dim;
      row(r)[d] = valid ? base[r * from.row_stride + d] : T{0};
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
