#pragma once

// dK and dV: a block owns keys and walks over the queries that see them, of each head that reads
// them.
//
//   products   dP0 |     dV0 |      dK0 S1 | dP1 |     dV1 |      dK1 S2 |
//   the rest       |  P0     | dS0         |     |  P1     | dS1         |
//
// The scores of the next step are started before this one's last products are waited for. More
// does not fit into a thread's registers: dK and dV alone are 128.

#include "gradient_tiles.h"

namespace usp::gpu::hopper {

// What a block of keys walks over: the queries that see them, of each head that reads them.
struct QueryWalk {
  Walk walk;
  Rows heads;

  USP_DEVICE int steps() const { return walk.count * heads.size(); }
  USP_DEVICE int head(int step) const { return heads.begin + step / walk.count; }
  USP_DEVICE bool is_masked(int step) const { return walk.is_masked(step % walk.count); }
  USP_DEVICE Rows rows(int step) const { return walk.step(step % walk.count, kColumns); }
};

// One wave.
template <typename T, int kDim>
USP_DEVICE void produce_queries(const GradientArguments& arguments, const BlockPlace& place,
                                int first_key, const QueryWalk& walk) {
  const GradientShared<T, kDim> shared;
  const Attention<float>& a = arguments.inputs;
  const AttentionGradients<float>& g = arguments.gradients;
  auto& rest = shared.rest();
  if (lane() == 0) {
    shared.load_own(arguments.k, arguments.v, {0, first_key, place.h, place.b});
  }
  for (int step = 0; step < walk.steps(); ++step) {
    const int head = walk.head(step);
    const Rows rows = walk.rows(step);
    const int64_t first = (int64_t{place.b} * a.H + head) * a.Lq + rows.begin;
    QueryResults found[kColumns / kWaveSize];
    USP_UNROLL
    for (int i = 0; i < kColumns / kWaveSize; ++i) {
      const int row = i * kWaveSize + lane();
      const bool exists = row < rows.size();
      found[i] = QueryResults::of(exists ? g.lse[first + row] : -kInfinity,
                                  exists ? g.delta[first + row] : 0.0f);
    }
    const uint32_t stage = Ring<kStages>::stage(step);
    rest.walked.wait_empty(step);
    USP_UNROLL
    for (int i = 0; i < kColumns / kWaveSize; ++i) {
      rest.lse[stage][i * kWaveSize + lane()] = found[i].lse;
      rest.delta[stage][i * kWaveSize + lane()] = found[i].delta;
    }
    if (lane() == 0) {
      shared.load_walked(arguments.q, arguments.dout, {0, rows.begin, head, place.b}, step);
    } else {
      rest.walked.full[stage].arrive();
    }
  }
}

// Rows of keys of a warp.
template <typename T, int kDim>
class QueryConsumer {
 public:
  USP_DEVICE QueryConsumer(const GradientArguments& arguments, const BlockPlace& place,
                           int first_key, const QueryWalk& walk)
      : a_(arguments.inputs),
        g_(arguments.gradients),
        place_(place),
        walk_(walk),
        own_(OwnRows::of(wave())),
        first_key_(first_key + own_.of_wave),
        scale_(static_cast<float>(a_.softmax_scale) * kLog2e) {}

  USP_DEVICE void run() {
    dk_.clear();
    dv_.clear();
    if (walk_.steps() > 0) multiply();
    put(GradientTarget::of_dk(g_), dk_, static_cast<float>(a_.softmax_scale));
    put(GradientTarget::of_dv(g_), dv_, 1.0f);
  }

 private:
  // The last step is outside of the loop: ptxas does not follow products under way into a branch.
  USP_DEVICE void multiply() {
    auto& ring = shared_.rest().walked;
    shared_.rest().own.wait(0);
    start_scores(0);
    products_done<0>(scores_);
    int step = 0;
    for (; step + 1 < walk_.steps(); ++step) {
      start_gradients(step);
      start_scores(step + 1);
      products_done<0>(dk_, dv_, weights_, gradients_, scores_);
      sync_wave();
      ring.release(step);
    }
    start_gradients(step);
    products_done<0>(dk_, dv_, weights_, gradients_);
  }

  USP_DEVICE void start_scores(int step) {
    shared_.rest().walked.wait_full(step);
    shared_.start_scores(scores_, 0, own_.of_group, step);
  }

  // All of a step but its scores, which are there.
  USP_DEVICE void start_gradients(int step) {
    const uint32_t stage = Ring<kStages>::stage(step);
    const float *lse = shared_.rest().lse[stage], *delta = shared_.rest().delta[stage];
    shared_.start_scores(dscores_, 1, own_.of_group, step);
    if (walk_.is_masked(step)) {
      mask_transposed(scores_, a_.span, walk_.rows(step).begin, first_key_);
    }
    scores_.for_each_pair([&](float* x, int, int column) {
      const FloatPair pair = load_pair(lse + column);
      weigh(x[0], scale_, pair.x);
      weigh(x[1], scale_, pair.y);
    });
    weights_.from(scores_);
    start_gradient(dv_, weights_, shared_.walked(1, step));
    products_done<1>(dscores_);
    dscores_.for_each_pair([&](float* x, int, int column) {
      const float* p = scores_.x + (x - dscores_.x);
      const FloatPair pair = load_pair(delta + column);
      x[0] = p[0] * (x[0] - pair.x);
      x[1] = p[1] * (x[1] - pair.y);
    });
    gradients_.from(dscores_);
    start_gradient(dk_, gradients_, shared_.walked(0, step));
  }

  USP_DEVICE void put(const GradientTarget& target, Product<kDim>& product, float factor) {
    const int64_t row = (int64_t{place_.b} * a_.Lk + first_key_) * a_.G + place_.h;
    const int count = static_cast<int>(a_.Lk) - first_key_;
    target.visit<T>([&](auto* to, auto adds) {
      MatrixRows{to + row * kDim, a_.G * kDim, count}.put(product, factor, adds);
    });
  }

  const Attention<float>& a_;
  const AttentionGradients<float>& g_;
  const BlockPlace& place_;
  const QueryWalk& walk_;
  OwnRows own_;
  int first_key_;
  float scale_;
  GradientShared<T, kDim> shared_;
  Product<kDim> dk_, dv_;
  Product<kColumns> scores_, dscores_;
  LeftOperand<T, kColumns> weights_, gradients_;
};

template <typename T, int kDim>
USP_KERNEL USP_LAUNCH_BOUNDS(kThreads, 1) void wgmma_key_value_kernel(
    const USP_GRID_CONSTANT GradientArguments arguments) {
#if defined(USP_HOPPER)
  const Attention<float>& a = arguments.inputs;
  const BlockPlace place = place_of_block(arguments.first, tiles_of(a.Lk, kOwnRows));
  const Range range = rows_of_tile(place.row_tile, kOwnRows, a.Lk);
  const QueryWalk walk{
      Walk::over(visible_queries(a.span, range), unmasked_queries(a.span, range), kColumns),
      Rows::of(a.query_heads(place.h))};
  if (walk.steps() <= 0 && !overwrites(arguments.gradients)) return;

  GradientShared<T, kDim>().set_up(kWaveSize);
  const int first_key = static_cast<int>(range.begin);
  if (wave() < 4) {
    give_registers_back<kProducerRegisters>();
    if (wave() == 0 && walk.steps() > 0) {
      produce_queries<T, kDim>(arguments, place, first_key, walk);
    }
  } else {
    take_registers<kConsumerRegisters>();
    QueryConsumer<T, kDim>(arguments, place, first_key, walk).run();
  }
#else
  never_launched();
#endif
}

}  // namespace usp::gpu::hopper
