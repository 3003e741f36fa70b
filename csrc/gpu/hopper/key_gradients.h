#pragma once

// dK and dV: a block owns keys and walks over the queries that see them, of each head that reads
// them.
//
//   products   S dP |     dV |     dK |
//   the rest        |  P     | dS     |
//
// The two consumers are rarely at the same place, so that one multiplies while the other does the
// rest. More does not fit into a thread's registers: dK and dV alone are 128, and with the next
// scores under way ptxas spills 120 bytes beside 238 others.

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

template <typename T, int kDim>
USP_DEVICE void consume_queries(const GradientArguments& arguments, const BlockPlace& place,
                                int first_key, const QueryWalk& walk) {
  const GradientShared<T, kDim> shared;
  const Attention<float>& a = arguments.inputs;
  const AttentionGradients<float>& g = arguments.gradients;
  auto& ring = shared.rest().walked;
  const OwnRows own = OwnRows::of(wave());
  first_key += own.of_wave;
  const float scale = static_cast<float>(a.softmax_scale) * kLog2e;

  Product<kDim> dk, dv;
  dk.clear();
  dv.clear();
  shared.rest().own.wait(0);
  for (int step = 0; step < walk.steps(); ++step) {
    Product<kColumns> scores, dscores;
    LeftOperand<T, kColumns> weights, gradients;
    ring.wait_full(step);
    shared.start_scores(scores, dscores, own.of_group, step);
    products_done<1>(scores);
    if (walk.is_masked(step)) mask_transposed(scores, a.span, walk.rows(step).begin, first_key);
    const uint32_t stage = Ring<kStages>::stage(step);
    scores.for_each_pair([&](float* x, int, int column) {
      const FloatPair lse = load_pair(shared.rest().lse[stage] + column);
      weigh(x[0], scale, lse.x);
      weigh(x[1], scale, lse.y);
    });
    weights.from(scores);
    start_gradient(dv, weights, shared.walked(1, step));
    products_done<1>(dscores);
    dscores.for_each_pair([&](float* x, int, int column) {
      const float* p = scores.x + (x - dscores.x);
      const FloatPair delta = load_pair(shared.rest().delta[stage] + column);
      x[0] = p[0] * (x[0] - delta.x);
      x[1] = p[1] * (x[1] - delta.y);
    });
    gradients.from(dscores);
    start_gradient(dk, gradients, shared.walked(0, step));
    products_done<0>(dk, dv, weights, gradients);
    sync_wave();
    ring.release(step);
  }

  const int64_t row = (int64_t{place.b} * a.Lk + first_key) * a.G + place.h;
  const auto put = [&](const GradientTarget& target, Product<kDim>& product, float factor) {
    target.visit<T>([&](auto* to, auto adds) {
      MatrixRows{to + row * kDim, a.G * kDim, static_cast<int>(a.Lk) - first_key}.put(product,
                                                                                      factor, adds);
    });
  };
  put(GradientTarget::of_dk(g), dk, static_cast<float>(a.softmax_scale));
  put(GradientTarget::of_dv(g), dv, 1.0f);
}

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
    if (wave() == 0) produce_queries<T, kDim>(arguments, place, first_key, walk);
  } else {
    take_registers<kConsumerRegisters>();
    consume_queries<T, kDim>(arguments, place, first_key, walk);
  }
#else
  never_launched();
#endif
}

}  // namespace usp::gpu::hopper
