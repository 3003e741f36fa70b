#pragma once

// Products of a wave's strips of rows, each as high as a tile, with rows that all waves share.

#include <type_traits>

#include "mma.h"
#include "numbers.h"

namespace usp::gpu {

// (strips, columns) tiles of fp32 in a wave's registers.
template <int kTile, int kStrips, int kColumns>
struct Sums {
  using Element = Accumulator<kTile>;

  Element tile[kStrips][kColumns];

  USP_DEVICE void clear() {
    USP_UNROLL
    for (int s = 0; s < kStrips; ++s) {
      USP_UNROLL
      for (int n = 0; n < kColumns; ++n) tile[s][n].clear();
    }
  }

  // visit(accumulator element, strip, row slot, column) in all tiles
  template <typename Visit>
  USP_DEVICE void for_each(Visit&& visit) {
    const int first = Element::first_column();
    USP_UNROLL
    for (int s = 0; s < kStrips; ++s) {
      USP_UNROLL
      for (int n = 0; n < kColumns; ++n) {
        USP_UNROLL
        for (int i = 0; i < kElements<kTile>; ++i) {
          visit(tile[s][n].x[i], s, Element::slot(i), first + n * kTile + Element::offset(i));
        }
      }
    }
  }
};

// One value for each row of a wave's strips that this lane holds part of.
template <typename Value, int kTile, int kStrips>
struct PerRow {
  static constexpr int kSlots = Accumulator<kTile>::kRowSlots;

  Value of[kStrips][kSlots];

  // visit(value, row in the wave's strips)
  template <typename Visit>
  USP_DEVICE void for_each(Visit&& visit) {
    USP_UNROLL
    for (int s = 0; s < kStrips; ++s) {
      USP_UNROLL
      for (int slot = 0; slot < kSlots; ++slot) {
        visit(of[s][slot], s * kTile + Accumulator<kTile>::row_of_slot(slot));
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

  // visit(accumulator elements, their place, strip, row slot), kWidth neighbours at a time, in the
  // rows that are `given`. Then `columns` is a multiple of kWidth, and places are aligned to as
  // many.
  template <int kWidth, int kTile, int kStrips, int kColumns, typename Visit>
  USP_DEVICE void for_each(Sums<kTile, kStrips, kColumns>& sums,
                           const PerRow<bool, kTile, kStrips>& given, Visit&& visit) const {
    using Element = Accumulator<kTile>;
    const int first = Element::first_column();
    PerRow<T*, kTile, kStrips> places;
    places.for_each([&](T*& place, int row) { place = data + row * row_stride + first; });
    USP_UNROLL
    for (int s = 0; s < kStrips; ++s) {
      USP_UNROLL
      for (int n = 0; n < kColumns; ++n) {
        USP_UNROLL
        for (int i = 0; i < kElements<kTile>; i += kWidth) {
          const int slot = Element::slot(i), offset = n * kTile + Element::offset(i);
          if (!given.of[s][slot] || offset >= columns - first) continue;
          visit(sums.tile[s][n].x + i, places.of[s][slot] + offset, s, slot);
        }
      }
    }
  }

  // Writes factor * sums, rounded to T; or where `adds` adds it to what is there.
  template <int kWidth, int kTile, int kStrips, int kColumns, bool kAdds>
  USP_DEVICE void put(Sums<kTile, kStrips, kColumns>& sums, float factor,
                      std::bool_constant<kAdds> /*adds*/) const {
    PerRow<bool, kTile, kStrips> exists;
    exists.for_each([&](bool& here, int row) { here = row < count; });
    for_each<kWidth>(sums, exists, [&](const float* x, T* place, int, int) {
      auto* numbers = reinterpret_cast<Numbers<T, kWidth>*>(place);
      Numbers<T, kWidth> held;
      if constexpr (kAdds) held = *numbers;
      USP_UNROLL
      for (int i = 0; i < kWidth; ++i) {
        if constexpr (kAdds) {
          held.item[i] += factor * x[i];
        } else {
          held.item[i] = rounded<T>(factor * x[i]);
        }
      }
      *numbers = held;
    });
  }
};

// So many neighbours of an accumulator are read and written at once where memory is known to be
// aligned to 16 bytes.
template <int kTile, bool kAligned>
inline constexpr int kStateWidth = kAligned ? Accumulator<kTile>::kRun : 1;

// A wave's own rows (strips * kTile, kDim) as left operands: in registers or left in shared memory.
template <typename T, int kTile, int kStrips, int kDim, bool kHold>
class LeftRows {
 public:
  USP_DEVICE LeftRows(const T* rows, int stride) : rows_(rows), stride_(stride) {
    if constexpr (kHold) {
      USP_UNROLL
      for (int k = 0; k < kDim / kTile; ++k) load(held_[k], k);
    }
  }

  USP_DEVICE void get(Left<T, kTile> (&left)[kStrips], int k) const {
    if constexpr (kHold) {
      USP_UNROLL
      for (int s = 0; s < kStrips; ++s) left[s] = held_[k][s];
    } else {
      load(left, k);
    }
  }

 private:
  USP_DEVICE void load(Left<T, kTile> (&left)[kStrips], int k) const {
    USP_UNROLL
    for (int s = 0; s < kStrips; ++s) {
      left[s].load(rows_ + s * kTile * stride_ + k * kTile, stride_);
    }
  }

  const T* rows_;
  int stride_;
  Left<T, kTile> held_[kHold ? kDim / kTile : 1][kStrips];
};

// sums = left right^T, `right` (columns * kTile, kDim) in shared memory.
template <int kDim, typename T, int kTile, int kStrips, int kColumns, bool kHold>
USP_DEVICE void multiply_transposed(Sums<kTile, kStrips, kColumns>& sums,
                                    const LeftRows<T, kTile, kStrips, kDim, kHold>& left,
                                    const T* right, int stride) {
  sums.clear();
  USP_UNROLL
  for (int k = 0; k < kDim / kTile; ++k) {
    Left<T, kTile> a[kStrips];
    left.get(a, k);
    USP_UNROLL
    for (int n = 0; n < kColumns; ++n) {
      Right<T, kTile> b;
      b.load_transposed(right + n * kTile * stride + k * kTile, stride);
      USP_UNROLL
      for (int s = 0; s < kStrips; ++s) multiply_add(sums.tile[s][n], a[s], b);
    }
  }
}

// sums += left right, `left` rounded to T, `right` (depth, columns) tiles in shared memory.
template <typename T, int kTile, int kStrips, int kColumns, int kDepth>
USP_DEVICE void multiply_accumulate(Sums<kTile, kStrips, kColumns>& sums,
                                    const Sums<kTile, kStrips, kDepth>& left, const T* right,
                                    int stride) {
  USP_UNROLL
  for (int k = 0; k < kDepth; ++k) {
    Left<T, kTile> a[kStrips];
    USP_UNROLL
    for (int s = 0; s < kStrips; ++s) a[s].from(left.tile[s][k]);
    USP_UNROLL
    for (int n = 0; n < kColumns; ++n) {
      Right<T, kTile> b;
      b.load(right + k * kTile * stride + n * kTile, stride);
      USP_UNROLL
      for (int s = 0; s < kStrips; ++s) multiply_add(sums.tile[s][n], a[s], b);
    }
  }
}

}  // namespace usp::gpu
