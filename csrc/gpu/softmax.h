#pragma once

// The running softmax of a wave's rows while they walk over keys.

#include "gpu/products.h"

namespace usp::gpu {

// The running softmax of a wave's rows. A lane keeps its own part of each sum.
template <int kTile, int kStrips>
struct RunningRows {
  PerRow<float, kTile, kStrips> max;  // in units of log2
  PerRow<float, kTile, kStrips> sum;
};

USP_DEVICE float finite(float max) { return max == -kInfinity ? 0.0f : max; }

// Turns scores / scale into weights, and shrinks what was summed before to the new maxima.
template <int kTile, int kStrips, int kKeys, int kDims>
USP_DEVICE void softmax_step(Sums<kTile, kStrips, kKeys>& scores, float scale,
                             RunningRows<kTile, kStrips>& rows,
                             OutputSums<kTile, kStrips, kDims>& out) {
  using Element = Accumulator<kTile>;
  USP_UNROLL
  for (int s = 0; s < kStrips; ++s) {
    float subtract[Element::kRowSlots], shrink[Element::kRowSlots];
    USP_UNROLL
    for (int slot = 0; slot < Element::kRowSlots; ++slot) {
      float top = -kInfinity;
      USP_UNROLL
      for (int n = 0; n < kKeys; ++n) {
        USP_UNROLL
        for (int i = 0; i < kElements<kTile>; ++i) {
          if (Element::slot(i) == slot) top = larger(top, scores.tile[s][n].x[i]);
        }
      }
      const float old_max = rows.max.of[s][slot];
      const float new_max = larger(old_max, row_max<kTile>(top) * scale);
      subtract[slot] = finite(new_max);
      shrink[slot] = fast_exp2(old_max - subtract[slot]);
      rows.max.of[s][slot] = new_max;
      rows.sum.of[s][slot] *= shrink[slot];
    }
    USP_UNROLL
    for (int n = 0; n < kKeys; ++n) {
      USP_UNROLL
      for (int i = 0; i < kElements<kTile>; ++i) {
        const int slot = Element::slot(i);
        float& x = scores.tile[s][n].x[i];
        x = fast_exp2(fma(x, scale, -subtract[slot]));
        rows.sum.of[s][slot] += x;
      }
    }
    USP_UNROLL
    for (int n = 0; n < kDims; ++n) {
      USP_UNROLL
      for (int i = 0; i < kElements<kTile>; ++i) out.tile[s][n].x[i] *= shrink[Element::slot(i)];
    }
  }
}

}  // namespace usp::gpu
