#pragma once

// The rows that a block owns, as left operands of its waves.

#include "gpu/in_flight.h"
#include "gpu/products.h"

namespace usp::gpu {

template <typename T, int kTile, int kStrips, int kDim, bool kHold>
struct OwnRows {
  using Left = LeftRows<T, kTile, kStrips, kDim, kHold>;

  // By way of `shared`, which is free again where the rows are held in registers: then as many at a
  // time as fit there. Else they are there after the next copies_arrived() and barrier().
  template <int kThreads, int kRows>
  USP_DEVICE static Left load(const SharedRows<T, kRows, kDim>& shared, const HeadRows<T>& from,
                              Rows rows, bool vectors) {
    constexpr int kOfWave = kStrips * kTile, kWaves = kRows / kOfWave;
    constexpr int kParts = kThreads / kWaveSize / kWaves;
    static_assert(kHold || kParts == 1);
    Left left;
    USP_UNROLL
    for (int part = 0; part < kParts; ++part) {
      const int begin = rows.begin + part * kRows;  // of rows that are not there one is read
      copy_rows<kThreads>(shared, from, {begin < rows.end ? begin : rows.end - 1, rows.end},
                          vectors);
      if constexpr (kHold) {
        copies_arrived();
        barrier();
      }
      if (kParts == 1 || wave() / kWaves == part) {
        left = Left(shared.row(wave() % kWaves * kOfWave), shared.kStride);
      }
      if constexpr (kHold) barrier();
    }
    return left;
  }
};

}  // namespace usp::gpu
