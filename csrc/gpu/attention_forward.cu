// One block of keys into the running softmax.
//
// A thread block owns a tile of query rows of one head and walks over the keys they see. Source:
// Dao 2023, "FlashAttention-2", arXiv:2307.08691; here the state comes from memory and goes back.

#include "gpu/attention.h"
#include "gpu/blocks.h"
#include "gpu/own_rows.h"
#include "gpu/scores.h"
#include "gpu/state_rows.h"

namespace usp::gpu {
namespace {

struct ForwardArguments {
  Attention<float> inputs;
  AttentionState<float> state;
  BlockOrder order;
  bool vectors;
};

// Products of the queries from `first_query` on with `keys` into scores, -inf where unseen.
template <bool kPlain, int kTile, int kStrips, int kKeys>
USP_DEVICE void mask_and_score(Sums<kTile, kStrips, kKeys>& scores, const Scoring<kPlain>& scoring,
                               int first_query, Rows keys, bool masked) {
  PerRow<Columns, kTile, kStrips> seen;
  seen.for_each([&](Columns& columns, int row) {
    columns = visible_columns(scoring.span(), first_query + row, keys, masked);
  });
  scores.for_each([&](float& x, int s, int slot, int column) {
    const Pair at{first_query + s * kTile + Accumulator<kTile>::row_of_slot(slot),
                  keys.begin + column};
    x = seen.of[s][slot].contain(column) ? scoring.score(x, at).value : -kInfinity;
  });
}

// Dropout of weights, in place.
template <bool kPlain, int kTile, int kStrips, int kKeys>
USP_DEVICE void drop(Sums<kTile, kStrips, kKeys>& weights, const Scoring<kPlain>& scoring,
                     int first_query, Rows keys) {
  weights.for_each([&](float& x, int s, int slot, int column) {
    const Pair at{first_query + s * kTile + Accumulator<kTile>::row_of_slot(slot),
                  keys.begin + column};
    if (at.query < scoring.span().num_queries && at.key < keys.end) x *= scoring.multiplier(at);
  });
}

template <typename T, bool kAligned>
USP_DEVICE StateRows<T, kAligned> state_of_wave(const ForwardArguments& arguments,
                                                const BlockPlace& place, int64_t row) {
  const Attention<float>& a = arguments.inputs;
  const AttentionState<float>& state = arguments.state;
  const auto rows_of = [&]<typename Number>(Number* matrix) -> MatrixRows<Number> {
    const int64_t offset = ((place.b * a.Lq + row) * a.H + place.h) * a.Dv;
    return {in_global_memory(matrix) + (matrix == nullptr ? 0 : offset), a.H * a.Dv,
            static_cast<int>(a.Lq - row), static_cast<int>(a.Dv)};
  };
  return {rows_of(state.out), rows_of(static_cast<T*>(state.result)),
          in_global_memory(state.lse) + (place.b * a.H + place.h) * a.Lq + row,
          state.out == nullptr, state.result != nullptr};
}

template <typename T, int kDim, bool kPlain>
struct ForwardShared {
  static constexpr Tiles kTiles = forward_tiles(kDim, kPlain);
  using Queries = SharedRows<T, kTiles.shared_rows(), kDim>;
  using Keys = SharedStages<SharedRows<T, kTiles.columns, kDim>, kTiles.stages>;
  static constexpr int kStride = Queries::kStride;
  static constexpr int kWalkedBytes = 2 * Keys::kBytes;
  static constexpr int kBytes = kWalkedBytes + (kTiles.hold_left ? 0 : Queries::kBytes);
  static_assert(!kTiles.hold_left || Queries::kBytes <= kWalkedBytes);

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
  constexpr int kThreads = kTiles.threads(), kTile = kTiles.tile, kStrips = kTiles.strips;
  constexpr int kKeyTiles = kTiles.columns / kTile, kDimTiles = kDim / kTile;
  constexpr int kStride = ForwardShared<T, kDim, kPlain>::kStride;
  const Attention<float> a = in_global_memory(arguments.inputs);

  const BlockPlace place = last_tiles_first(arguments.order);
  const Range range = rows_of_tile(place.tile, kTiles.rows(), a.Lq);
  const Walk walk =
      Walk::over(visible_keys(a.span, range), unmasked_keys(a.span, range), kTiles.columns);
  if (walk.count == 0 && arguments.state.result == nullptr) return;

  const int64_t g = a.key_head(place.h);
  const auto q = HeadRows<T>::of(a.q, place.b, place.h, a.D);
  const auto k = HeadRows<T>::of(a.k, place.b, g, a.D);
  const auto v = HeadRows<T>::of(a.v, place.b, g, a.Dv);
  ForwardShared<T, kDim, kPlain> shared(shared_memory());
  const bool vectors = kPlain || arguments.vectors;
  const Rows rows = Rows::of(range);
  const int first_query = rows.begin + wave() * kTiles.wave_rows();
  RunningRows<kTile, kStrips> running;
  OutputSums<kTile, kStrips, kDimTiles> out;
  state_of_wave<T, kPlain>(arguments, place, first_query).load(running, out);

  const auto queries = OwnRows<T, kTile, kStrips, kDim, kTiles.hold_left>::template load<kThreads>(
      shared.q, q, rows, vectors);

  using Walked = WalkedRows<T, kTiles.columns, kDim, kTiles.stages, kThreads>;
  Walked keys(shared.k), values(shared.v);
  const auto request = [&](int step, int n) {
    const Rows rows = walk.step(step, kTiles.columns);
    keys.request(n, k, rows, vectors);
    values.request(n, v, rows, vectors);
  };
  const auto store = [&](int n) {
    keys.store(n);
    values.store(n);
  };
  const Scoring<kPlain> scoring(a, place.b, place.h);
  const SeenSteps seen(a.span, rows, walk, kTiles.columns);
  const auto next = [&](int step) { return seen.next(step); };
  walk_tiles<kTiles.stages>(walk.count, next, request, store, [&](int step, int n) {
    const Rows here = walk.step(step, kTiles.columns);
    Sums<kTile, kStrips, kKeyTiles> scores;
    multiply_transposed<kDim>(scores, queries, keys.tile(n), kStride);
    if (!kPlain || walk.is_masked(step)) {
      mask_and_score(scores, scoring, first_query, here, walk.is_masked(step));
    }
    softmax_step(scores, scoring.remaining_scale(), running, out);
    if (scoring.drops()) drop(scores, scoring, first_query, here);
    multiply_accumulate<true>(out, scores, values.tile(n), kStride);
  });
  const BlockPlace again = last_tiles_first(arguments.order);
  state_of_wave<T, kPlain>(arguments, again, first_query).store(running, out);
}

template <typename T, int kDim, bool kPlain>
void launch_forward(const ForwardArguments& arguments, Stream stream) {
  constexpr Tiles kTiles = forward_tiles(kDim, kPlain);
  const Attention<float>& a = arguments.inputs;
  static_assert(ForwardShared<T, kDim, kPlain>::kBytes <= kSharedLimit);
  launch_blocks(forward_kernel<T, kDim, kPlain>, arguments, tiles_of(a.Lq, kTiles.rows()), a.H, a.B,
                query_heads_together(a), kTiles.threads(), ForwardShared<T, kDim, kPlain>::kBytes,
                stream);
}

template <typename T>
void forward_of(const ForwardArguments& arguments, Stream stream) {
  if (arguments.vectors && is_plain(arguments.inputs)) {
    with_head_dim<true>(arguments.inputs, [&](auto dim) {
      launch_forward<T, decltype(dim)::value, true>(arguments, stream);
    });
  } else {
    with_head_dim<false>(arguments.inputs, [&](auto dim) {
      launch_forward<T, decltype(dim)::value, false>(arguments, stream);
    });
  }
}

}  // namespace

const char* attention_forward(const Attention<float>& inputs, const AttentionState<float>& state,
                              Stream stream) {
  const bool vectors =
      has_aligned_rows(inputs.q, inputs.D) && has_aligned_rows(inputs.k, inputs.D) &&
      has_aligned_rows(inputs.v, inputs.Dv) && is_aligned(state.out) && is_aligned(state.result);
  const ForwardArguments arguments{inputs, state, {}, vectors};
  if (inputs.q.dtype == DType::kBFloat16) {
    forward_of<BFloat16>(arguments, stream);
  } else {
    forward_of<Float16>(arguments, stream);
  }
  return last_error();
}

}  // namespace usp::gpu
