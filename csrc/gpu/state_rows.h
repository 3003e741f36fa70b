#pragma once

// The running softmax in memory: of a wave's rows, in and out.

#include "gpu/softmax.h"

namespace usp::gpu {

// The state of one wave's rows, in memory.
template <typename T, bool kAligned>
struct StateRows {
  MatrixRows<float> out;
  MatrixRows<T> result;
  float* lse;
  bool is_first;  // no row has seen anything before: no out, and lse is not read
  bool is_last;   // there is a result

  USP_DEVICE float lse_of(int row) const {
    return !is_first && row < out.count ? lse[row] : -kInfinity;
  }

  template <int kTile, int kStrips, int kDims>
  USP_DEVICE void load(RunningRows<kTile, kStrips>& rows,
                       OutputSums<kTile, kStrips, kDims>& sums) const {
    PerRow<bool, kTile, kStrips> given;
    rows.max.for_each([&](float& max, int row) { max = lse_of(row) * kLog2e; });
    USP_UNROLL
    for (int s = 0; s < kStrips; ++s) {
      USP_UNROLL
      for (int slot = 0; slot < Accumulator<kTile>::kRowSlots; ++slot) {
        given.of[s][slot] = rows.max.of[s][slot] != -kInfinity;
        rows.sum.of[s][slot] = given.of[s][slot] && Accumulator<kTile>::leads_row() ? 1.0f : 0.0f;
      }
    }
    sums.clear();
    if (is_first) return;
    out.template for_each<kAligned>(sums, given, [](auto&& number, const auto& there, int, int) {
      const auto held = there;
      USP_UNROLL
      for (int i = 0; i < held.kCount; ++i) number(i) = held.item[i];
    });
  }

  // A row that has seen nothing new keeps its state to the bit.
  template <int kTile, int kStrips, int kDims>
  USP_DEVICE void store(const RunningRows<kTile, kStrips>& rows,
                        OutputSums<kTile, kStrips, kDims>& sums) const {
    using Element = Accumulator<kTile>;
    PerRow<bool, kTile, kStrips> written;
    PerRow<float, kTile, kStrips> factor;
    USP_UNROLL
    for (int s = 0; s < kStrips; ++s) {
      USP_UNROLL
      for (int slot = 0; slot < Element::kRowSlots; ++slot) {
        // Only a row's first lane reads and writes its lse: the others may be late.
        const int row = s * kTile + Element::row_of_slot(slot);
        const float sum = row_sum<kTile>(rows.sum.of[s][slot]), max = rows.max.of[s][slot];
        const bool leads = Element::leads_row() && row < out.count;
        const float before = leads ? lse_of(row) : 0.0f;
        const bool same = max == before * kLog2e && sum == (before == -kInfinity ? 0.0f : 1.0f);
        const bool changed = row_sum<kTile>(leads && !same ? 1.0f : 0.0f) > 0.0f;
        factor.of[s][slot] = changed ? fast_reciprocal(sum) : 1.0f;
        written.of[s][slot] = is_last ? row < out.count : changed;
        if (leads && (!same || is_first)) lse[row] = (max + fast_log2(sum)) * kLn2;
      }
    }
    const auto put = [&](const auto& matrix) {
      matrix.template for_each<kAligned>(
          sums, written,
          [&]<typename Number, int kCount>(auto&& number, Numbers<Number, kCount>& there, int s,
                                           int slot) {
            Numbers<Number, kCount> scaled;
            USP_UNROLL
            for (int i = 0; i < kCount; ++i) {
              scaled.item[i] = rounded<Number>(number(i) * factor.of[s][slot]);
            }
            there = scaled;
          });
    };
    is_last ? put(result) : put(out);
  }
};

}  // namespace usp::gpu
