#pragma once

// Rows of a warp in contiguous matrices in memory.

#include <type_traits>

#include "tiles.h"

namespace usp::gpu::hopper {

struct alignas(8) FloatPair {
  float x, y;
};

USP_DEVICE FloatPair load_pair(const float* from) {
  return *reinterpret_cast<const FloatPair*>(from);
}

USP_DEVICE void store_pair(float* to, float x, float y) {
  *reinterpret_cast<FloatPair*>(to) = {x, y};
}

template <typename T>
USP_DEVICE void store_pair(T* to, float x, float y) {
  *reinterpret_cast<uint32_t*>(to) = pack<T>(x, y);
}

// A warp's 16 rows of a matrix in which every row starts at a multiple of two numbers.
template <typename T>
struct MatrixRows {
  T* data;  // row 0, column 0
  int64_t row_stride;
  int count;  // rows that exist

  // visit(two neighbours of a product, the place of the first) in the rows `given`
  template <int kColumns, typename Visit>
  USP_DEVICE void for_each(Product<kColumns>& product, const PerRow<bool>& given,
                           Visit&& visit) const {
    USP_UNROLL
    for (int slot = 0; slot < kSlots; ++slot) {
      if (!given.of[slot]) continue;
      T* row = data + row_of_slot(slot) * row_stride;
      product.for_each_pair([&](float* x, int of, int column) {
        if (of == slot) visit(x, row + column);
      });
    }
  }

  USP_DEVICE PerRow<bool> existing() const {
    PerRow<bool> exists;
    exists.for_each([&](bool& here, int row) { here = row < count; });
    return exists;
  }

  // Writes factor * product, rounded to T; or where `adds` adds it to what is there.
  template <int kColumns, bool kAdds>
  USP_DEVICE void put(Product<kColumns>& product, float factor,
                      std::bool_constant<kAdds> /*adds*/) const {
    for_each(product, existing(), [&](const float* x, T* place) {
      FloatPair before{0.0f, 0.0f};
      if constexpr (kAdds) before = load_pair(place);
      store_pair(place, before.x + factor * x[0], before.y + factor * x[1]);
    });
  }
};

}  // namespace usp::gpu::hopper
