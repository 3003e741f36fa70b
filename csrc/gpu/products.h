#pragma once

// Products of a wave's strips of rows, each as high as a tile, with rows that all waves share.

#include <type_traits>

#include "gpu/mma.h"
#include "gpu/numbers.h"

namespace usp::gpu {

// (strips, columns) tiles of fp32 in a wave's registers. Columns of kInterleaved neighbouring tiles
// interleave, see load_interleaved.
template <int kTile, int kStrips, int kColumns, int kInterleaved = 1>
struct Sums {
  using Element = Accumulator<kTile>;
  static_assert(kColumns % kInterleaved == 0);

  // So many neighbours in a row are read and written at once: what fills 16 bytes, or all that a
  // lane has. NVIDIA's lanes have two, and four lanes fill a sector.
  template <typename Number>
  static USP_HOST_DEVICE constexpr int neighbours() {
    constexpr int kOfLane = Element::kRun * kInterleaved, kMost = 16 / sizeof(Number);
    return kOfLane < kMost ? kOfLane : kMost;
  }

  Element tile[kStrips][kColumns];

  // Element i of tile n is in column first_column() + offset(n, i).
  static USP_DEVICE int first_column() { return Element::first_column() * kInterleaved; }
  static USP_HOST_DEVICE constexpr int offset(int n, int i) {
    const int in_tile = n % kInterleaved;
    return (n - in_tile) * kTile + Element::offset(i) * kInterleaved + in_tile;
  }

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
    const int first = first_column();
    USP_UNROLL
    for (int s = 0; s < kStrips; ++s) {
      USP_UNROLL
      for (int n = 0; n < kColumns; ++n) {
        USP_UNROLL
        for (int i = 0; i < kElements<kTile>; ++i) {
          visit(tile[s][n].x[i], s, Element::slot(i), first + offset(n, i));
        }
      }
    }
  }
};

// Sums of products with right operands stored as (k, columns): out, dq, dk and dv. On AMD four
// tiles at a time, or two, are loaded from one read of each row.
USP_HOST_DEVICE constexpr int interleaved_tiles(int columns) {
  if (kWarps) return 1;
  return columns % 4 == 0 ? 4 : 2;
}
template <int kTile, int kStrips, int kColumns>
using OutputSums = Sums<kTile, kStrips, kColumns, interleaved_tiles(kColumns)>;

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

  // visit(number, their place, strip, row slot) in the rows that are `given`, several neighbours at
  // a time: number(i) is the i-th of them. kAligned: rows start at multiples of 16 bytes, and
  // `columns` is a multiple of 8.
  template <bool kAligned, int kTile, int kStrips, int kColumns, int kInterleaved, typename Visit>
  USP_DEVICE void for_each(Sums<kTile, kStrips, kColumns, kInterleaved>& sums,
                           const PerRow<bool, kTile, kStrips>& given, Visit&& visit) const {
    using Held = Sums<kTile, kStrips, kColumns, kInterleaved>;
    constexpr int kWidth = kAligned ? Held::template neighbours<T>() : 1;
    const int first = Held::first_column();
    PerRow<T*, kTile, kStrips> places;
    places.for_each([&](T*& place, int row) { place = data + row * row_stride + first; });
    USP_UNROLL
    for (int s = 0; s < kStrips; ++s) {
      USP_UNROLL
      for (int n = 0; n < kColumns; n += kInterleaved) {
        USP_UNROLL
        for (int j = 0; j < kElements<kTile> * kInterleaved; j += kWidth) {
          const int slot = Accumulator<kTile>::slot(j / kInterleaved);
          const int offset = Held::offset(n + j % kInterleaved, j / kInterleaved);
          if (!given.of[s][slot] || offset >= columns - first) continue;
          const auto number = [&](int i) -> float& {
            return sums.tile[s][n + (j + i) % kInterleaved].x[(j + i) / kInterleaved];
          };
          auto* there = reinterpret_cast<Numbers<T, kWidth>*>(places.of[s][slot] + offset);
          visit(number, *there, s, slot);
        }
      }
    }
  }

  // Writes factor * sums, rounded to T; or where `adds` adds it to what is there.
  template <bool kAligned, int kTile, int kStrips, int kColumns, int kInterleaved, bool kAdds>
  USP_DEVICE void put(Sums<kTile, kStrips, kColumns, kInterleaved>& sums, float factor,
                      std::bool_constant<kAdds> /*adds*/) const {
    PerRow<bool, kTile, kStrips> exists;
    exists.for_each([&](bool& here, int row) { here = row < count; });
    for_each<kAligned>(sums, exists,
                       [&]<int kCount>(auto&& number, Numbers<T, kCount>& there, int, int) {
                         const auto before = kAdds ? there : Numbers<T, kCount>{};
                         Numbers<T, kCount> after;
                         USP_UNROLL
                         for (int i = 0; i < kCount; ++i) {
                           if constexpr (kAdds) {
                             after.item[i] = before.item[i] + factor * number(i);
                           } else {
                             after.item[i] = rounded<T>(factor * number(i));
                           }
                         }
                         there = after;
                       });
  }
};

// A wave's own rows (strips * kTile, kDim) as left operands: in registers or left in shared memory.
template <typename T, int kTile, int kStrips, int kDim, bool kHold>
class LeftRows {
 public:
  LeftRows() = default;  // rows to come
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
// kWeights: see pack_weights.
template <bool kWeights = false, typename T, int kTile, int kStrips, int kColumns, int kInterleaved,
          int kDepth>
USP_DEVICE void multiply_accumulate(Sums<kTile, kStrips, kColumns, kInterleaved>& sums,
                                    const Sums<kTile, kStrips, kDepth>& left, const T* right,
                                    int stride) {
  USP_UNROLL
  for (int k = 0; k < kDepth; ++k) {
    Left<T, kTile> a[kStrips];
    USP_UNROLL
    for (int s = 0; s < kStrips; ++s) a[s].template from<kWeights>(left.tile[s][k]);
    USP_UNROLL
    for (int n = 0; n < kColumns; n += kInterleaved) {
      Right<T, kTile> b[kInterleaved];
      load_interleaved(b, right + k * kTile * stride + n * kTile, stride);
      USP_UNROLL
      for (int t = 0; t < kInterleaved; ++t) {
        USP_UNROLL
        for (int s = 0; s < kStrips; ++s) multiply_add(sums.tile[s][n + t], a[s], b[t]);
      }
    }
  }
}

}  // namespace usp::gpu
