#pragma once

// What both backward kernels of sm_90a share: their tiles, and the steps from products to gradients
// of scores.

#include "../gradients.h"
#include "masks.h"
#include "state.h"

namespace usp::gpu::hopper {

inline constexpr int kColumns = 64;  // rows that are walked over at a time
inline constexpr int kStages = 3;

struct GradientArguments {
  Attention<float> inputs;
  AttentionGradients<float> gradients;
  FirstBlock first;
  TensorMap q, k, v, dout;
};

// Own tiles and walked tiles: keys and values, queries and dout.
template <typename T, int kDim>
struct GradientShared {
  using Own = Tile<T, kOwnRows, kDim>;
  using Walked = Tile<T, kColumns, kDim>;
  static constexpr int kWalkedBytes = 2 * Walked::kBytes;  // of a stage

  struct Rest {
    Barrier own;
    Ring<kStages> walked;
    alignas(8) float lse[kStages][kColumns], delta[kStages][kColumns];  // of walked queries
  };
  static constexpr int kTileBytes = 2 * Own::kBytes + kStages * kWalkedBytes;
  static constexpr int kBytes = kTileBytes + static_cast<int>(sizeof(Rest));

  char* base = aligned_shared_memory();

  USP_DEVICE Own own(int which) const { return {base + which * Own::kBytes}; }
  USP_DEVICE Walked walked(int which, int step) const {
    const int stage = static_cast<int>(Ring<kStages>::stage(step));
    return {base + 2 * Own::kBytes + stage * kWalkedBytes + which * Walked::kBytes};
  }
  USP_DEVICE Rest& rest() const { return *reinterpret_cast<Rest*>(base + kTileBytes); }

  // All threads come here.
  USP_DEVICE void set_up(int fillers) const {
    if (thread_index() == 0) {
      rest().own.init(1);
      rest().walked.init(fillers);
      barriers_are_set_up();
    }
    barrier();
  }

  // One thread: the own rows from `row` on, of two tensors.
  USP_DEVICE void load_own(const TensorMap& first, const TensorMap& second, BoxPlace at) const {
    rest().own.arrive_expecting(2 * Own::kBytes);
    own(0).load(first, rest().own, at.row, at.head, at.batch);
    own(1).load(second, rest().own, at.row, at.head, at.batch);
  }

  // One thread, when the stage is empty.
  USP_DEVICE void load_walked(const TensorMap& first, const TensorMap& second, BoxPlace at,
                              int step) const {
    Barrier& full = rest().walked.full[Ring<kStages>::stage(step)];
    full.arrive_expecting(kWalkedBytes);
    walked(0, step).load(first, full, at.row, at.head, at.batch);
    walked(1, step).load(second, full, at.row, at.head, at.batch);
  }

  // The product of a warp's own rows of one tensor with the walked ones. Runs on.
  USP_DEVICE void start_scores(Product<kColumns>& scores, int which, int first_row,
                               int step) const {
    begin_products(scores);
    multiply_transposed(scores, own(which), first_row, walked(which, step));
    end_products();
  }
};

// sums += left right. Runs on.
template <typename T, int kDim>
USP_DEVICE void start_gradient(Product<kDim>& sums, LeftOperand<T, kColumns>& left,
                               const Tile<T, kColumns, kDim>& right) {
  begin_products(sums, left);
  multiply_accumulate(sums, left, right);
  end_products();
}

// exp2(product * scale - lse)
USP_DEVICE void weigh(float& product, float scale, float lse) {
  product = fast_exp2(fma(product, scale, -lse));
}

}  // namespace usp::gpu::hopper
