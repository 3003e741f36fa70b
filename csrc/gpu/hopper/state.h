#pragma once

// Rows of a warp in contiguous matrices in memory.

#include "tiles.h"

namespace usp::gpu::hopper {

struct alignas(8) FloatPair {
  float x, y;
};

USP_DEVICE void store_pair(float* to, float x, float y) {
  *reinterpret_cast<FloatPair*>(to) = {x, y};
}

template <typename T>
USP_DEVICE void store_pair(T* to, float x, float y) {
  *reinterpret_cast<uint32_t*>(to) = pack<T>(x, y);
}

// visit(four numbers of a product, column): 0 and 2 lie in that column, 1 and 3 in the next.
template <int kTiles, typename Visit>
USP_DEVICE void for_each_column_pair(Sums<1, kTiles>& sums, Visit&& visit) {
  USP_UNROLL
  for (int n = 0; n < kTiles; ++n) {
    USP_UNROLL
    for (int i = 0; i < kElements; i += 4) {
      visit(sums.tile[0][n].x + i,
            n * kTile + Accumulator::first_column() + Accumulator::offset(i));
    }
  }
}

// A warp's 16 rows of a matrix in which every row starts at a multiple of two numbers.
template <typename T>
struct MatrixRows {
  T* data;  // row 0, column 0
  int64_t row_stride;
  int count;  // rows that exist

  // visit(two neighbours of a product, the place of the first, row slot) in the rows `given`
  template <int kTiles, typename Visit>
  USP_DEVICE void for_each(Sums<1, kTiles>& sums, const PerRow<bool, 1>& given,
                           Visit&& visit) const {
    USP_UNROLL
    for (int slot = 0; slot < Accumulator::kRowSlots; ++slot) {
      if (!given.of[0][slot]) continue;
      T* row = data + Accumulator::row_of_slot(slot) * row_stride + Accumulator::first_column();
      USP_UNROLL
      for (int n = 0; n < kTiles; ++n) {
        USP_UNROLL
        for (int i = 0; i < kElements; i += 2) {
          if (Accumulator::slot(i) != slot) continue;
          float* x = sums.tile[0][n].x + i;
          visit(x[0], x[1], row + n * kTile + Accumulator::offset(i), slot);
        }
      }
    }
  }

  USP_DEVICE PerRow<bool, 1> existing() const {
    PerRow<bool, 1> exists;
    exists.for_each([&](bool& here, int row) { here = row < count; });
    return exists;
  }

  // Adds factor * sums.
  template <int kTiles>
  USP_DEVICE void add(Sums<1, kTiles>& sums, float factor) const {
    for_each(sums, existing(), [&](float x, float y, float* place, int) {
      const FloatPair before = *reinterpret_cast<const FloatPair*>(place);
      store_pair(place, before.x + factor * x, before.y + factor * y);
    });
  }
};

}  // namespace usp::gpu::hopper
