#pragma once

// dQ: a block owns queries and walks over the keys that they see.
//
//   products   S0 dP0 |     S1 dP1 dQ0 |     S2 dP2 dQ1 |
//   the rest          |  0             |  1             |
//
// ptxas moves a wait for products up as far as its block of instructions goes, and so before what
// is to run beside them. That is why the next tile is waited for in between, not where it is used.

#include "gradient_tiles.h"

namespace usp::gpu::hopper {

// One thread.
template <typename T, int kDim>
USP_DEVICE void produce_keys(const GradientArguments& arguments, const BlockPlace& place,
                             int first_query, const KeyWalk<kColumns>& keys) {
  const GradientShared<T, kDim> shared;
  const int key_head = static_cast<int>(arguments.inputs.key_head(place.h));
  shared.load_own(arguments.q, arguments.dout, {0, first_query, place.h, place.b});
  int n = 0;
  for (int step = keys.first(); keys.has(step); step = keys.next(step)) {
    shared.rest().walked.wait_empty(n);
    shared.load_walked(arguments.k, arguments.v, {0, keys.first_row(step), key_head, place.b}, n);
    ++n;
  }
}

// Rows of queries of a warp. The product of a step's gradients with its keys runs beside the scores
// of the next step.
template <typename T, int kDim>
class KeyConsumer {
 public:
  USP_DEVICE KeyConsumer(const GradientArguments& arguments, const BlockPlace& place,
                         int first_query, const KeyWalk<kColumns>& keys)
      : a_(arguments.inputs),
        g_(arguments.gradients),
        place_(place),
        keys_(keys),
        own_(OwnRows::of(wave())),
        first_query_(first_query + own_.of_wave),
        count_(static_cast<int>(a_.Lq) - first_query_),
        scale_(static_cast<float>(a_.softmax_scale) * kLog2e) {}

  USP_DEVICE void run() {
    Product<kDim> dq;
    dq.clear();
    if (!keys_.is_empty()) multiply(dq);
    const int64_t row = (int64_t{place_.b} * a_.Lq + first_query_) * a_.H + place_.h;
    GradientTarget::of_dq(g_).visit<T>([&](auto* to, auto adds) {
      MatrixRows{to + row * kDim, a_.H * kDim, count_}.put(dq, static_cast<float>(a_.softmax_scale),
                                                           adds);
    });
  }

 private:
  USP_DEVICE void multiply(Product<kDim>& dq) {
    auto& ring = shared_.rest().walked;
    load_results();
    LeftOperand<T, kColumns> gradients;
    shared_.rest().own.wait(0);
    {
      Product<kColumns> scores, dscores;
      start_scores(scores, dscores, 0);
      products_done<1>(scores);
      weigh_step(scores, keys_.first());
      products_done<0>(dscores);
      differentiate(dscores, scores);
      gradients.from(dscores);
    }
    int n = 0;
    for (int step = keys_.next(keys_.first()); keys_.has(step);) {
      ++n;
      const int following = keys_.next(step);
      Product<kColumns> scores, dscores;
      start_scores(scores, dscores, n);
      start_gradient(dq, gradients, shared_.walked(0, n - 1));
      products_done<2>(scores);
      weigh_step(scores, step);
      if (keys_.has(following)) ring.wait_full(n + 1);
      products_done<1>(dscores);
      differentiate(dscores, scores);
      products_done<0>(dq, gradients);
      ring.release(n - 1);
      gradients.from(dscores);
      step = following;
    }
    start_gradient(dq, gradients, shared_.walked(0, n));
    products_done<0>(dq, gradients);
  }

  USP_DEVICE void load_results() {
    const int64_t first = (int64_t{place_.b} * a_.H + place_.h) * a_.Lq + first_query_;
    results_.for_each([&](QueryResults& result, int row) {
      const bool exists = row < count_;
      result = QueryResults::of(exists ? g_.lse[first + row] : -kInfinity,
                                exists ? g_.delta[first + row] : 0.0f);
    });
  }

  USP_DEVICE void start_scores(Product<kColumns>& scores, Product<kColumns>& dscores, int n) {
    shared_.rest().walked.wait_full(n);
    shared_.start_scores(scores, 0, own_.of_group, n);
    shared_.start_scores(dscores, 1, own_.of_group, n);
  }

  USP_DEVICE void weigh_step(Product<kColumns>& scores, int step) {
    if (keys_.is_masked(step)) mask(scores, a_.span, first_query_, keys_.rows(step));
    scores.for_each([&](float& x, int slot, int) { weigh(x, scale_, results_.of[slot].lse); });
  }

  USP_DEVICE void differentiate(Product<kColumns>& dscores, const Product<kColumns>& weights) {
    USP_UNROLL
    for (int i = 0; i < dscores.kCount; ++i) {
      dscores.x[i] = weights.x[i] * (dscores.x[i] - results_.of[dscores.slot(i)].delta);
    }
  }

  const Attention<float>& a_;
  const AttentionGradients<float>& g_;
  const BlockPlace& place_;
  const KeyWalk<kColumns>& keys_;
  OwnRows own_;
  int first_query_, count_;
  float scale_;
  PerRow<QueryResults> results_;
  GradientShared<T, kDim> shared_;
};

template <typename T, int kDim>
USP_KERNEL USP_LAUNCH_BOUNDS(kThreads, 1) void wgmma_query_kernel(
    const USP_GRID_CONSTANT GradientArguments arguments) {
#if defined(USP_HOPPER)
  const Attention<float>& a = arguments.inputs;
  const BlockPlace place = place_of_block(arguments.first, tiles_of(a.Lq, kOwnRows));
  const Range range = rows_of_tile(place.row_tile, kOwnRows, a.Lq);
  const Walk walk = Walk::over(visible_keys(a.span, range), unmasked_keys(a.span, range), kColumns);
  const SeenSteps seen(a.span, range, walk, kColumns);
  const KeyWalk<kColumns> keys{walk, seen};
  if (keys.is_empty() && !overwrites(arguments.gradients)) return;

  GradientShared<T, kDim>().set_up(1);
  const int first_query = static_cast<int>(range.begin);
  if (wave() < 4) {
    give_registers_back<kProducerRegisters>();
    if (thread_index() == 0 && !keys.is_empty()) {
      produce_keys<T, kDim>(arguments, place, first_query, keys);
    }
  } else {
    take_registers<kConsumerRegisters>();
    KeyConsumer<T, kDim>(arguments, place, first_query, keys).run();
  }
#else
  never_launched();
#endif
}

}  // namespace usp::gpu::hopper
