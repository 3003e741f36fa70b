#pragma once

// The rows that a block owns, as left operands of its waves.

#include "gpu/in_flight.h"
#include "gpu/products.h"

namespace usp::gpu {

template <typename T, int kTile, int kStrips, int kDim, bool kHold>
struct OwnRows {
  using Left = LeftRows<T, kTile, kStrips, kDim, kHold>;

  // By way of `shared`, which is free again where the rows are held in registers; else they are
  // there after the next copies_arrived() and barrier().
  template <int kThreads, int kRows>
  USP_DEVICE static Left load(const SharedRows<T, kRows, kDim>& shared, const HeadRows<T>& from,
                              Rows rows, bool vectors) {
    copy_rows<kThreads>(shared, from, rows, vectors);
    if constexpr (kHold) {
      copies_arrived();
      barrier();
    }
    const Left left(shared.row(wave() * kStrips * kTile), shared.kStride);
    if constexpr (kHold) barrier();
    return left;
  }
};

}  // namespace usp::gpu
