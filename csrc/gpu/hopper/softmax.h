#pragma once

// The running softmax of a warp's 16 rows, in pieces that run beside products.

#include "state.h"

namespace usp::gpu::hopper {

// A lane keeps its own part of each sum.
struct RunningRows {
  PerRow<float> max;  // in units of log2
  PerRow<float> sum;
};

// Turns scores / scale into weights; returns the factor by which all that was summed before
// shrinks.
template <int kColumns>
USP_DEVICE PerRow<float> weigh(Product<kColumns>& scores, float scale, RunningRows& rows) {
  PerRow<float> shrink;
  USP_UNROLL
  for (int slot = 0; slot < kSlots; ++slot) {
    float top = -kInfinity;
    scores.for_each([&](float x, int of, int) {
      if (of == slot) top = larger(top, x);
    });
    const float old_max = rows.max.of[slot];
    const float new_max = larger(old_max, max_of_row(top) * scale);
    const float subtract = new_max == -kInfinity ? 0.0f : new_max;
    shrink.of[slot] = fast_exp2(old_max - subtract);
    rows.max.of[slot] = new_max;
    float sum = rows.sum.of[slot] * shrink.of[slot];
    scores.for_each([&](float& x, int of, int) {
      if (of != slot) return;
      x = fast_exp2(fma(x, scale, -subtract));
      sum += x;
    });
    rows.sum.of[slot] = sum;
  }
  return shrink;
}

// Multiplies rows.
template <int kColumns>
USP_DEVICE void scale_rows(Product<kColumns>& sums, const PerRow<float>& factor) {
  sums.for_each([&](float& x, int slot, int) { x *= factor.of[slot]; });
}

// The state of a warp's rows in memory. `out` null: nothing has been seen before. `result` given:
// the new out goes there, rounded to T, and `out` stays.
template <typename T>
struct StateRows {
  MatrixRows<float> out;
  float* lse;
  MatrixRows<T> result;

  // Rows [row, ...) of query head h of batch entry b.
  USP_DEVICE static StateRows of(const AttentionState<float>& state, const Attention<float>& a,
                                 int b, int h, int64_t row) {
    const int64_t begin = ((b * a.Lq + row) * a.H + h) * a.Dv, stride = a.H * a.Dv;
    const int count = static_cast<int>(a.Lq - row);
    T* result = static_cast<T*>(state.result);
    return {{state.out == nullptr ? nullptr : state.out + begin, stride, count},
            state.lse + (int64_t{b} * a.H + h) * a.Lq + row,
            {result == nullptr ? nullptr : result + begin, stride, count}};
  }

  USP_DEVICE float lse_of(int row) const {
    return out.data != nullptr && row < out.count ? lse[row] : -kInfinity;
  }

  template <int kColumns>
  USP_DEVICE void load(RunningRows& rows, Product<kColumns>& sums) const {
    PerRow<bool> given;
    rows.max.for_each([&](float& max, int row) { max = lse_of(row) * kLog2e; });
    USP_UNROLL
    for (int slot = 0; slot < kSlots; ++slot) {
      given.of[slot] = rows.max.of[slot] != -kInfinity;
      rows.sum.of[slot] = given.of[slot] && leads_rows() ? 1.0f : 0.0f;
    }
    sums.clear();
    out.for_each(sums, given, [](float* x, const float* place) {
      const FloatPair before = load_pair(place);
      x[0] = before.x;
      x[1] = before.y;
    });
  }

  // A row that has seen nothing new keeps its state to the bit.
  template <int kColumns>
  USP_DEVICE void store(const RunningRows& rows, Product<kColumns>& sums) const {
    PerRow<bool> changed;
    USP_UNROLL
    for (int slot = 0; slot < kSlots; ++slot) {
      // Only a row's first lane reads and writes its lse: the others may be late.
      const int row = row_of_slot(slot);
      const float sum = sum_of_row(rows.sum.of[slot]), max = rows.max.of[slot];
      const bool leads = leads_rows() && row < out.count;
      const float before = leads ? lse_of(row) : 0.0f;
      const bool same = max == before * kLog2e && sum == (before == -kInfinity ? 0.0f : 1.0f);
      changed.of[slot] = sum_of_row(leads && !same ? 1.0f : 0.0f) > 0.0f;
      if (changed.of[slot]) scale_slot(sums, slot, fast_reciprocal(sum));
      if (leads && (!same || out.data == nullptr)) lse[row] = (max + fast_log2(sum)) * kLn2;
    }
    const auto store = [](const float* x, auto* place) { store_pair(place, x[0], x[1]); };
    if (result.data == nullptr) {
      out.for_each(sums, changed, store);
    } else {
      result.for_each(sums, result.existing(), store);
    }
  }

 private:
  template <int kColumns>
  USP_DEVICE static void scale_slot(Product<kColumns>& sums, int which, float factor) {
    sums.for_each([&](float& x, int slot, int) {
      if (slot == which) x *= factor;
    });
  }
};

}  // namespace usp::gpu::hopper
