// One block of keys into the running softmax.
//
// A thread block owns a tile of query rows of one head and walks over the keys they see. Source:
// Dao 2023, "FlashAttention-2", arXiv:2307.08691; here the state comes from memory and goes back.

#include "attention.h"
#include "blocks.h"
#include "hopper/attention.h"
#include "products.h"
#include "scores.h"
#include "shared_rows.h"

namespace usp::gpu {
namespace {

struct ForwardArguments {
  Attention<float> inputs;
  AttentionState<float> state;
  FirstBlock first;
  bool vectors;
};

// The running softmax of a wave's rows. A lane keeps its own part of each sum.
template <int kStrips>
struct RunningRows {
  PerRow<float, kStrips> max;  // in units of log2
  PerRow<float, kStrips> sum;
};

USP_DEVICE float finite(float max) { return max == -kInfinity ? 0.0f : max; }

// Turns scores / scale into weights, and shrinks what was summed before to the new maxima.
template <int kStrips, int kKeys, int kDims>
USP_DEVICE void softmax_step(Sums<kStrips, kKeys>& scores, float scale, RunningRows<kStrips>& rows,
                             Sums<kStrips, kDims>& out) {
  USP_UNROLL
  for (int s = 0; s < kStrips; ++s) {
    float subtract[Accumulator::kRowSlots], shrink[Accumulator::kRowSlots];
    USP_UNROLL
    for (int slot = 0; slot < Accumulator::kRowSlots; ++slot) {
      float top = -kInfinity;
      USP_UNROLL
      for (int n = 0; n < kKeys; ++n) {
        USP_UNROLL
        for (int i = 0; i < kElements; ++i) {
          if (Accumulator::slot(i) == slot) top = larger(top, scores.tile[s][n].x[i]);
        }
      }
      const float old_max = rows.max.of[s][slot];
      const float new_max = larger(old_max, row_max(top) * scale);
      subtract[slot] = finite(new_max);
      shrink[slot] = fast_exp2(old_max - subtract[slot]);
      rows.max.of[s][slot] = new_max;
      rows.sum.of[s][slot] *= shrink[slot];
    }
    USP_UNROLL
    for (int n = 0; n < kKeys; ++n) {
      USP_UNROLL
      for (int i = 0; i < kElements; ++i) {
        const int slot = Accumulator::slot(i);
        float& x = scores.tile[s][n].x[i];
        x = fast_exp2(fma(x, scale, -subtract[slot]));
        rows.sum.of[s][slot] += x;
      }
    }
    USP_UNROLL
    for (int n = 0; n < kDims; ++n) {
      USP_UNROLL
      for (int i = 0; i < kElements; ++i) out.tile[s][n].x[i] *= shrink[Accumulator::slot(i)];
    }
  }
}

// Products of the queries from `first_query` on with `keys` into scores, -inf where unseen.
template <bool kPlain, int kStrips, int kKeys>
USP_DEVICE void mask_and_score(Sums<kStrips, kKeys>& scores, const Scoring<kPlain>& scoring,
                               int first_query, Rows keys, bool masked) {
  PerRow<Columns, kStrips> seen;
  seen.for_each([&](Columns& columns, int row) {
    columns = visible_columns(scoring.span(), first_query + row, keys, masked);
  });
  scores.for_each([&](float& x, int s, int slot, int column) {
    const Pair at{first_query + s * kTile + Accumulator::row_of_slot(slot), keys.begin + column};
    x = seen.of[s][slot].contain(column) ? scoring.score(x, at).value : -kInfinity;
  });
}

// Dropout of weights, in place.
template <bool kPlain, int kStrips, int kKeys>
USP_DEVICE void drop(Sums<kStrips, kKeys>& weights, const Scoring<kPlain>& scoring, int first_query,
                     Rows keys) {
  weights.for_each([&](float& x, int s, int slot, int column) {
    const Pair at{first_query + s * kTile + Accumulator::row_of_slot(slot), keys.begin + column};
    if (at.query < scoring.span().num_queries && at.key < keys.end) x *= scoring.multiplier(at);
  });
}

// The state of one wave's rows, in memory.
struct StateRows {
  MatrixRows<float> out;
  float* lse;

  USP_DEVICE float lse_of(int row) const { return row < out.count ? lse[row] : -kInfinity; }

  template <int kStrips, int kDims>
  USP_DEVICE void load(RunningRows<kStrips>& rows, Sums<kStrips, kDims>& sums) const {
    PerRow<bool, kStrips> given;
    rows.max.for_each([&](float& max, int row) { max = lse_of(row) * kLog2e; });
    USP_UNROLL
    for (int s = 0; s < kStrips; ++s) {
      USP_UNROLL
      for (int slot = 0; slot < Accumulator::kRowSlots; ++slot) {
        given.of[s][slot] = rows.max.of[s][slot] != -kInfinity;
        rows.sum.of[s][slot] = given.of[s][slot] && Accumulator::leads_row() ? 1.0f : 0.0f;
      }
    }
    sums.clear();
    out.for_each(sums, given, [](float& x, const float* place, int, int) { x = *place; });
  }

  // A row that has seen nothing new keeps its state to the bit.
  template <int kStrips, int kDims>
  USP_DEVICE void store(const RunningRows<kStrips>& rows, Sums<kStrips, kDims>& sums) const {
    PerRow<bool, kStrips> changed;
    PerRow<float, kStrips> factor;
    USP_UNROLL
    for (int s = 0; s < kStrips; ++s) {
      USP_UNROLL
      for (int slot = 0; slot < Accumulator::kRowSlots; ++slot) {
        // Only a row's first lane reads and writes its lse: the others may be late.
        const int row = s * kTile + Accumulator::row_of_slot(slot);
        const float sum = row_sum(rows.sum.of[s][slot]), max = rows.max.of[s][slot];
        const bool leads = Accumulator::leads_row() && row < out.count;
        const float before = leads ? lse[row] : 0.0f;
        const bool same = max == before * kLog2e && sum == (before == -kInfinity ? 0.0f : 1.0f);
        changed.of[s][slot] = row_sum(leads && !same ? 1.0f : 0.0f) > 0.0f;
        factor.of[s][slot] = fast_reciprocal(sum);
        if (leads && !same) lse[row] = (max + fast_log2(sum)) * kLn2;
      }
    }
    out.for_each(sums, changed, [&](const float& x, float* place, int s, int slot) {
      *place = x * factor.of[s][slot];
    });
  }
};

template <int kStrips>
USP_DEVICE StateRows state_of_wave(const ForwardArguments& arguments, int tile_rows) {
  const Attention<float>& a = arguments.inputs;
  const BlockPlace place = place_of_block(arguments.first, tiles_of(a.Lq, tile_rows));
  const int64_t row = int64_t{place.row_tile} * tile_rows + wave() * kStrips * kTile;
  float* out = arguments.state.out + ((place.b * a.Lq + row) * a.H + place.h) * a.Dv;
  float* lse = arguments.state.lse + (place.b * a.H + place.h) * a.Lq + row;
  const int count = static_cast<int>(a.Lq - row);
  return {{in_global_memory(out), a.H * a.Dv, count, static_cast<int>(a.Dv)},
          in_global_memory(lse)};
}

template <typename T, int kDim, bool kPlain>
struct ForwardShared {
  static constexpr Tiles kTiles = forward_tiles(kDim, kPlain);
  using Queries = SharedRows<T, kTiles.rows(), kDim>;
  using Keys = SharedStages<SharedRows<T, kTiles.columns, kDim>, kTiles.stages>;
  static constexpr int kStride = Queries::kStride;
  static constexpr int kWalkedBytes = 2 * Keys::kBytes;
  static constexpr int kBytes = !kTiles.hold_left                ? Queries::kBytes + kWalkedBytes
                                : Queries::kBytes > kWalkedBytes ? Queries::kBytes
                                                                 : kWalkedBytes;

  Queries q;
  Keys k, v;

  USP_DEVICE explicit ForwardShared(char* base) {
    SharedCarver carver(base);
    q = carver.template rows<Queries>();
    if constexpr (kTiles.hold_left) carver = SharedCarver(base);
    k = carver.template rows<Keys>();
    v = carver.template rows<Keys>();
  }
};

template <typename T, int kDim, bool kPlain>
USP_KERNEL USP_LAUNCH_BOUNDS(
    forward_tiles(kDim, kPlain).threads(),
    forward_tiles(kDim, kPlain).blocks_at_once) void forward_kernel(ForwardArguments arguments) {
  constexpr Tiles kTiles = forward_tiles(kDim, kPlain);
  constexpr int kThreads = kTiles.threads(), kStrips = kTiles.strips;
  constexpr int kKeyTiles = kTiles.columns / kTile, kDimTiles = kDim / kTile;
  constexpr int kStride = ForwardShared<T, kDim, kPlain>::kStride;
  const Attention<float> a = in_global_memory(arguments.inputs);

  const BlockPlace place = place_of_block(arguments.first, tiles_of(a.Lq, kTiles.rows()));
  const Range range = rows_of_tile(place.row_tile, kTiles.rows(), a.Lq);
  const Walk walk =
      Walk::over(visible_keys(a.span, range), unmasked_keys(a.span, range), kTiles.columns);
  if (walk.count == 0) return;

  const int64_t g = a.key_head(place.h);
  const auto q = HeadRows<T>::of(a.q, place.b, place.h, a.D);
  const auto k = HeadRows<T>::of(a.k, place.b, g, a.D);
  const auto v = HeadRows<T>::of(a.v, place.b, g, a.Dv);
  ForwardShared<T, kDim, kPlain> shared(shared_memory());
  const auto load_keys = [&](int step) {
    const Rows keys = walk.step(step, kTiles.columns);
    shared.k.stage(step).template load<kThreads>(k, keys, kPlain || arguments.vectors);
    shared.v.stage(step).template load<kThreads>(v, keys, kPlain || arguments.vectors);
  };

  const Rows rows = Rows::of(range);
  const int first_row = wave() * kStrips * kTile, first_query = rows.begin + first_row;
  RunningRows<kStrips> running;
  Sums<kStrips, kDimTiles> out;
  state_of_wave<kStrips>(arguments, kTiles.rows()).load(running, out);

  shared.q.template load<kThreads>(q, rows, kPlain || arguments.vectors);
  copies_arrived();
  barrier();
  const LeftRows<T, kStrips, kDim, kTiles.hold_left> queries(shared.q.row(first_row), kStride);
  if (kTiles.hold_left) barrier();
  load_keys(0);

  const Scoring<kPlain> scoring(a, place.b, place.h);
  for (int step = 0; step < walk.count; ++step) {
    copies_arrived();
    barrier();
    if (kTiles.stages > 1 && step + 1 < walk.count) load_keys(step + 1);

    Sums<kStrips, kKeyTiles> scores;
    multiply_transposed<kDim>(scores, queries, shared.k.stage(step).data, kStride);
    if (!kPlain || walk.is_masked(step)) {
      mask_and_score(scores, scoring, first_query, walk.step(step, kTiles.columns),
                     walk.is_masked(step));
    }
    softmax_step(scores, scoring.remaining_scale(), running, out);
    if (scoring.drops()) {
      drop(scores, scoring, first_query, walk.step(step, kTiles.columns));
    }
    multiply_accumulate(out, scores, shared.v.stage(step).data, kStride);
    if (kTiles.stages == 1 && step + 1 < walk.count) {
      barrier();
      load_keys(step + 1);
    }
  }
  state_of_wave<kStrips>(arguments, kTiles.rows()).store(running, out);
}

template <typename T, int kDim, bool kPlain>
void launch_forward(const ForwardArguments& arguments, Stream stream) {
  constexpr Tiles kTiles = forward_tiles(kDim, kPlain);
  const Attention<float>& a = arguments.inputs;
  static_assert(ForwardShared<T, kDim, kPlain>::kBytes <= kSharedLimit);
  launch_blocks(forward_kernel<T, kDim, kPlain>, arguments, tiles_of(a.Lq, kTiles.rows()), a.H, a.B,
                kTiles.threads(), ForwardShared<T, kDim, kPlain>::kBytes, stream);
}

template <typename T>
void forward_of(const ForwardArguments& arguments, Stream stream) {
  with_head_dim(arguments.inputs, [&](auto dim) {
    constexpr int kDim = decltype(dim)::value;
    if (arguments.vectors && is_plain(arguments.inputs)) {
      launch_forward<T, kDim, true>(arguments, stream);
    } else {
      launch_forward<T, kDim, false>(arguments, stream);
    }
  });
}

}  // namespace

const char* attention_forward(const Attention<float>& inputs, const AttentionState<float>& state,
                              Stream stream) {
#if defined(USP_WGMMA)
  const AttentionState<float> carried{state.out, state.lse};
  if (hopper::takes_forward(inputs, carried)) {
    return hopper::attention_forward(inputs, carried, stream);
  }
#endif
  const bool vectors = has_aligned_rows(inputs.q, inputs.D) &&
                       has_aligned_rows(inputs.k, inputs.D) &&
                       has_aligned_rows(inputs.v, inputs.Dv);
  const ForwardArguments arguments{inputs, state, {}, vectors};
  if (inputs.q.dtype == DType::kBFloat16) {
    forward_of<BFloat16>(arguments, stream);
  } else {
    forward_of<Float16>(arguments, stream);
  }
  return last_error();
}

}  // namespace usp::gpu
