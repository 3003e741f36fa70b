#pragma once

// Products of a wave's strips of 16 rows with a tile that all waves share.

#include "mma.h"

namespace usp::gpu {

// (strips * 16, columns * 16) of fp32 in a wave's registers.
template <int kStrips, int kColumns>
struct Sums {
  Accumulator tile[kStrips][kColumns];

  USP_DEVICE void clear() {
    USP_UNROLL
    for (int s = 0; s < kStrips; ++s) {
      USP_UNROLL
      for (int n = 0; n < kColumns; ++n) tile[s][n].clear();
    }
  }

  // visit(accumulator element, strip, row slot, column) over strips * 16 rows, columns * 16
  template <typename Visit>
  USP_DEVICE void for_each(Visit&& visit) {
    const int first = Accumulator::first_column();
    USP_UNROLL
    for (int s = 0; s < kStrips; ++s) {
      USP_UNROLL
      for (int n = 0; n < kColumns; ++n) {
        USP_UNROLL
        for (int i = 0; i < kElements; ++i) {
          visit(tile[s][n].x[i], s, Accumulator::slot(i),
                first + n * kTile + Accumulator::offset(i));
        }
      }
    }
  }
};

// One value for each row of a wave's strips that this lane holds part of.
template <typename Value, int kStrips>
struct PerRow {
  Value of[kStrips][Accumulator::kRowSlots];

  // visit(value, row in the wave's strips)
  template <typename Visit>
  USP_DEVICE void for_each(Visit&& visit) {
    USP_UNROLL
    for (int s = 0; s < kStrips; ++s) {
      USP_UNROLL
      for (int slot = 0; slot < Accumulator::kRowSlots; ++slot) {
        visit(of[s][slot], s * kTile + Accumulator::row_of_slot(slot));
      }
    }
  }
};

// Where a wave's rows lie in a matrix in global memory.
template <typename T>
struct MatrixRows {
  T* data;  // row 0, column 0
  int64_t row_stride;
  int count;  // rows and columns that exist
  int columns;

  // visit(accumulator element, its place, strip, row slot) in the rows that are `given`
  template <int kStrips, int kColumns, typename Visit>
  USP_DEVICE void for_each(Sums<kStrips, kColumns>& sums, const PerRow<bool, kStrips>& given,
                           Visit&& visit) const {
    const int first = Accumulator::first_column();
    PerRow<T*, kStrips> places;
    places.for_each([&](T*& place, int row) { place = data + row * row_stride + first; });
    sums.for_each([&](float& x, int s, int slot, int column) {
      const int offset = column - first;
      if (given.of[s][slot] && offset < columns - first)
        visit(x, places.of[s][slot] + offset, s, slot);
    });
  }

  // Adds factor * sums.
  template <int kStrips, int kColumns>
  USP_DEVICE void add(Sums<kStrips, kColumns>& sums, float factor) const {
    PerRow<bool, kStrips> exists;
    exists.for_each([&](bool& here, int row) { here = row < count; });
    for_each(sums, exists, [&](float x, T* place, int, int) { *place += factor * x; });
  }
};

// A wave's own rows (strips * 16, kDim) as left operands: in registers or left in shared memory.
template <typename T, int kStrips, int kDim, bool kHold>
class LeftRows {
 public:
  USP_DEVICE LeftRows(const T* rows, int stride) : rows_(rows), stride_(stride) {
    if constexpr (kHold) {
      USP_UNROLL
      for (int k = 0; k < kDim / kTile; ++k) load(held_[k], k);
    }
  }

  USP_DEVICE void get(Left<T> (&left)[kStrips], int k) const {
    if constexpr (kHold) {
      USP_UNROLL
      for (int s = 0; s < kStrips; ++s) left[s] = held_[k][s];
    } else {
      load(left, k);
    }
  }

 private:
  USP_DEVICE void load(Left<T> (&left)[kStrips], int k) const {
    USP_UNROLL
    for (int s = 0; s < kStrips; ++s) {
      left[s].load(rows_ + s * kTile * stride_ + k * kTile, stride_);
    }
  }

  const T* rows_;
  int stride_;
  Left<T> held_[kHold ? kDim / kTile : 1][kStrips];
};

// sums = left right^T, `right` (columns * 16, kDim) in shared memory.
template <int kDim, typename T, int kStrips, int kColumns, bool kHold>
USP_DEVICE void multiply_transposed(Sums<kStrips, kColumns>& sums,
                                    const LeftRows<T, kStrips, kDim, kHold>& left, const T* right,
                                    int stride) {
  sums.clear();
  USP_UNROLL
  for (int k = 0; k < kDim / kTile; ++k) {
    Left<T> a[kStrips];
    left.get(a, k);
    USP_UNROLL
    for (int n = 0; n < kColumns; ++n) {
      Right<T> b;
      b.load_transposed(right + n * kTile * stride + k * kTile, stride);
      USP_UNROLL
      for (int s = 0; s < kStrips; ++s) multiply_add(sums.tile[s][n], a[s], b);
    }
  }
}

// sums += left right, `left` rounded to T, `right` (depth * 16, columns * 16) in shared memory.
template <typename T, int kStrips, int kColumns, int kDepth>
USP_DEVICE void multiply_accumulate(Sums<kStrips, kColumns>& sums,
                                    const Sums<kStrips, kDepth>& left, const T* right, int stride) {
  USP_UNROLL
  for (int k = 0; k < kDepth; ++k) {
    Left<T> a[kStrips];
    USP_UNROLL
    for (int s = 0; s < kStrips; ++s) a[s].from(left.tile[s][k]);
    USP_UNROLL
    for (int n = 0; n < kColumns; ++n) {
      Right<T> b;
      b.load(right + k * kTile * stride + n * kTile, stride);
      USP_UNROLL
      for (int s = 0; s < kStrips; ++s) multiply_add(sums.tile[s][n], a[s], b);
    }
  }
}

}  // namespace usp::gpu
