// Gradients of one block of keys, from the final lse and delta.
//
//   P = exp(S - lse),  dS = P (dO V^T m - delta),  dV += (P m)^T dO,  dK += dS^T Q,  dQ += dS K
//
// One kernel owns keys and walks over queries for dK and dV, one owns queries and walks over keys
// for dQ: scores are computed twice, nothing is added atomically, and the same inputs give the same
// bits. Source of the recomputation: Dao 2023, "FlashAttention-2", arXiv:2307.08691.

#include "gpu/gradients.h"

namespace usp::gpu {
namespace {

// Tiles of one backward block: two of own rows, two that are walked over.
template <typename T, int kDim, Gradient kGradient, bool kPlain>
struct BackwardShared {
  static constexpr Tiles kTiles = backward_tiles(kGradient, kDim, kPlain);
  using Own = SharedRows<T, kTiles.shared_rows(), kDim>;
  using Walked = SharedStages<SharedRows<T, kTiles.columns, kDim>, kTiles.stages>;
  static constexpr int kStride = Own::kStride;
  static constexpr int kResults = kTiles.stages * kTiles.columns;  // lse, and delta, of queries
  static constexpr int kWalkedBytes = 2 * Walked::kBytes + 2 * kResults * 4;
  static constexpr int kBytes = kWalkedBytes + (kTiles.hold_left ? 0 : 2 * Own::kBytes);
  static_assert(!kTiles.hold_left || Own::kBytes <= kWalkedBytes);

  using Operands = OwnRows<T, kTiles.tile, kTiles.strips, kDim, kTiles.hold_left>;

  Own own[2];
  Walked walked[2];
  float *lse, *delta;

  USP_DEVICE explicit BackwardShared(char* base) {
    SharedCarver carver(base);
    for (Own& rows : own) {
      if constexpr (kTiles.hold_left) carver = SharedCarver(base);
      rows = carver.template rows<Own>();
    }
    if constexpr (kTiles.hold_left) carver = SharedCarver(base);
    for (Walked& rows : walked) rows = carver.template rows<Walked>();
    lse = carver.floats(kResults);
    delta = carver.floats(kResults);
  }
};

template <typename T, int kDim, bool kPlain>
USP_KERNEL USP_LAUNCH_BOUNDS(
    backward_tiles(Gradient::kKeyValue, kDim, kPlain).threads(),
    backward_tiles(Gradient::kKeyValue, kDim, kPlain)
        .blocks_at_once) void key_value_kernel(BackwardArguments arguments) {
  constexpr Tiles kTiles = backward_tiles(Gradient::kKeyValue, kDim, kPlain);
  constexpr int kThreads = kTiles.threads(), kColumns = kTiles.columns;
  constexpr int kTile = kTiles.tile, kStrips = kTiles.strips;
  using Shared = BackwardShared<T, kDim, Gradient::kKeyValue, kPlain>;
  constexpr int kStride = Shared::kStride;
  constexpr int kParts = key_value_parts(kDim), kPartDim = kDim / kParts;
  const Attention<float> a = in_global_memory(arguments.inputs);
  const AttentionGradients<float> g = in_global_memory(arguments.gradients);

  const BlockPlace place = place_of_block(arguments.order, block_index());
  const Range range = rows_of_tile(place.tile / kParts, kTiles.rows(), a.Lk);
  const Range visible = visible_queries(a.span, range), unmasked = unmasked_queries(a.span, range);
  const Walk walk = Walk::over(visible, unmasked, kColumns);
  const Rows heads = Rows::of(a.query_heads(place.h));
  const int steps = walk.count * heads.size();
  if (steps <= 0 && !arguments.dk.is_overwritten()) return;

  const Shared shared(shared_memory());
  const bool vectors = kPlain || arguments.vectors;
  const Rows own = Rows::of(range);
  const int first_row = wave() * kTiles.wave_rows(), first_key = own.begin + first_row;
  const auto keys = Shared::Operands::template load<kThreads>(
      shared.own[0], HeadRows<T>::of(a.k, place.b, place.h, a.D), own, vectors);
  const auto values = Shared::Operands::template load<kThreads>(
      shared.own[1], HeadRows<T>::of(a.v, place.b, place.h, a.Dv), own, vectors);

  using Walked = WalkedRows<T, kColumns, kDim, kTiles.stages, kThreads>;
  Walked queries(shared.walked[0]), douts(shared.walked[1]);
  WalkedFloats<kColumns, kTiles.stages> lse(shared.lse), delta(shared.delta);
  const auto request = [&](int step, int n) {
    const int h = heads.begin + step / walk.count;
    const Rows rows = walk.step(step % walk.count, kColumns);
    queries.request(n, HeadRows<T>::of(a.q, place.b, h, a.D), rows, vectors);
    douts.request(n, HeadRows<T>::of(g.dout, place.b, h, a.Dv), rows, vectors);
    const int64_t row = (place.b * a.H + h) * a.Lq + rows.begin;
    lse.request(n, g.lse + row, rows.size());
    delta.request(n, g.delta + row, rows.size());
  };
  const auto store = [&](int n) {
    queries.store(n);
    douts.store(n);
    lse.store(n, QueryResults::exponent_of);
    delta.store(n, [](float x) { return x; });
  };

  OutputSums<kTile, kStrips, kPartDim / kTile> dk, dv;
  PerRow<Rows, kTile, kStrips> seen;
  seen.for_each([&](Rows& queries, int row) {
    queries = queries_that_see(a.span, first_key + row, Rows::of(visible), Rows::of(unmasked));
  });
  const int first_dim = place.tile % kParts * kPartDim;
  dk.clear();
  dv.clear();
  const auto next = [](int step) { return step + 1; };  // all of them see some key of the tile
  walk_tiles<kTiles.stages>(steps, next, request, store, [&](int step, int n) {
    const Scoring<kPlain> scoring(a, place.b, heads.begin + step / walk.count);
    const int first_query = walk.step(step % walk.count, kColumns).begin;
    Sums<kTile, kStrips, kColumns / kTile> scores, dscores;
    multiply_transposed<kDim>(scores, keys, queries.tile(n), kStride);
    multiply_transposed<kDim>(dscores, values, douts.tile(n), kStride);
    tile_gradients<kPlain, kTile, kStrips>(
        scoring, scores, dscores, {first_query, !walk.is_masked(step % walk.count), seen},
        [&](int s, int slot, int query) {
          return Pair{query, first_key + s * kTile + Accumulator<kTile>::row_of_slot(slot)};
        },
        [&](int, int, int column) {
          return QueryResults{lse.tile(n)[column], delta.tile(n)[column]};
        });
    multiply_accumulate(dv, scores, douts.tile(n) + first_dim, kStride);
    multiply_accumulate(dk, dscores, queries.tile(n) + first_dim, kStride);
  });

  const int64_t row = (place.b * a.Lk + first_key) * a.G + place.h;
  const int count = own.size() - first_row, D = static_cast<int>(a.D), Dv = static_cast<int>(a.Dv);
  arguments.dk.visit<T>([&](auto* to, auto adds) {
    MatrixRows{to + row * D + first_dim, a.G * D, count, D - first_dim}.template put<kPlain>(
        dk, static_cast<float>(a.softmax_scale), adds);
  });
  arguments.dv.visit<T>([&](auto* to, auto adds) {
    MatrixRows{to + row * Dv + first_dim, a.G * Dv, count, Dv - first_dim}.template put<kPlain>(
        dv, 1.0f, adds);
  });
}

template <typename T, int kDim, bool kPlain>
USP_KERNEL USP_LAUNCH_BOUNDS(backward_tiles(Gradient::kQuery, kDim, kPlain).threads(),
                             backward_tiles(Gradient::kQuery, kDim, kPlain)
                                 .blocks_at_once) void query_kernel(BackwardArguments arguments) {
  constexpr Tiles kTiles = backward_tiles(Gradient::kQuery, kDim, kPlain);
  constexpr int kThreads = kTiles.threads(), kColumns = kTiles.columns;
  constexpr int kTile = kTiles.tile, kStrips = kTiles.strips;
  using Shared = BackwardShared<T, kDim, Gradient::kQuery, kPlain>;
  constexpr int kStride = Shared::kStride;
  const Attention<float> a = in_global_memory(arguments.inputs);
  const AttentionGradients<float> g = in_global_memory(arguments.gradients);

  const BlockPlace place = last_tiles_first(arguments.order);
  const Range range = rows_of_tile(place.tile, kTiles.rows(), a.Lq);
  const Walk walk = Walk::over(visible_keys(a.span, range), unmasked_keys(a.span, range), kColumns);
  if (walk.count == 0 && !arguments.dq.is_overwritten()) return;

  const Shared shared(shared_memory());
  const bool vectors = kPlain || arguments.vectors;
  const Rows own = Rows::of(range);
  const int first_row = wave() * kTiles.wave_rows(), first_query = own.begin + first_row;
  const auto queries = Shared::Operands::template load<kThreads>(
      shared.own[0], HeadRows<T>::of(a.q, place.b, place.h, a.D), own, vectors);
  const auto douts = Shared::Operands::template load<kThreads>(
      shared.own[1], HeadRows<T>::of(g.dout, place.b, place.h, a.Dv), own, vectors);

  using Walked = WalkedRows<T, kColumns, kDim, kTiles.stages, kThreads>;
  Walked keys(shared.walked[0]), values(shared.walked[1]);
  const int64_t key_head = a.key_head(place.h);
  const auto k = HeadRows<T>::of(a.k, place.b, key_head, a.D);
  const auto v = HeadRows<T>::of(a.v, place.b, key_head, a.Dv);
  const auto request = [&](int step, int n) {
    const Rows rows = walk.step(step, kColumns);
    keys.request(n, k, rows, vectors);
    values.request(n, v, rows, vectors);
  };
  const auto store = [&](int n) {
    keys.store(n);
    values.store(n);
  };

  PerRow<QueryResults, kTile, kStrips> results;
  const int count = own.size() - first_row;
  const int64_t row_of_heads = (place.b * a.H + place.h) * a.Lq + first_query;
  results.for_each([&](QueryResults& result, int row) {
    const bool exists = row < count;
    result = QueryResults::of(exists ? g.lse[row_of_heads + row] : -kInfinity,
                              exists ? g.delta[row_of_heads + row] : 0.0f);
  });

  PerRow<Rows, kTile, kStrips> seen;
  seen.for_each([&](Rows& keys, int row) { keys = keys_seen_by(a.span, first_query + row); });
  const Scoring<kPlain> scoring(a, place.b, place.h);
  OutputSums<kTile, kStrips, kDim / kTile> dq;
  dq.clear();
  const SeenSteps steps(a.span, own, walk, kColumns);
  const auto next = [&](int step) { return steps.next(step); };
  walk_tiles<kTiles.stages>(walk.count, next, request, store, [&](int step, int n) {
    const int first_key = walk.step(step, kColumns).begin;
    Sums<kTile, kStrips, kColumns / kTile> scores, dscores;
    multiply_transposed<kDim>(scores, queries, keys.tile(n), kStride);
    multiply_transposed<kDim>(dscores, douts, values.tile(n), kStride);
    tile_gradients<kPlain, kTile, kStrips>(
        scoring, scores, dscores, {first_key, !walk.is_masked(step), seen},
        [&](int s, int slot, int key) {
          return Pair{first_query + s * kTile + Accumulator<kTile>::row_of_slot(slot), key};
        },
        [&](int s, int slot, int) { return results.of[s][slot]; });
    multiply_accumulate(dq, dscores, keys.tile(n), kStride);
  });

  const int64_t row = (place.b * a.Lq + first_query) * a.H + place.h;
  const int D = static_cast<int>(a.D);
  arguments.dq.visit<T>([&](auto* to, auto adds) {
    MatrixRows{to + row * D, a.H * D, count, D}.template put<kPlain>(
        dq, static_cast<float>(a.softmax_scale), adds);
  });
}

template <typename T, int kDim, bool kPlain>
void launch_backward(const BackwardArguments& arguments, Stream stream) {
  const Attention<float>& a = arguments.inputs;
  using OfKeys = BackwardShared<T, kDim, Gradient::kKeyValue, kPlain>;
  using OfQueries = BackwardShared<T, kDim, Gradient::kQuery, kPlain>;
  static_assert(OfKeys::kBytes <= kSharedLimit && OfQueries::kBytes <= kSharedLimit);
  launch_blocks(key_value_kernel<T, kDim, kPlain>, arguments,
                tiles_of(a.Lk, OfKeys::kTiles.rows()) * key_value_parts(kDim), a.G, a.B,
                sequences_together(a.span, a.Lq * a.group_size * bytes_of_row(a)),
                OfKeys::kTiles.threads(), OfKeys::kBytes, stream);
  launch_blocks(query_kernel<T, kDim, kPlain>, arguments, tiles_of(a.Lq, OfQueries::kTiles.rows()),
                a.H, a.B, query_heads_together(a), OfQueries::kTiles.threads(), OfQueries::kBytes,
                stream);
}

template <typename T>
void backward_of(const BackwardArguments& arguments, Stream stream) {
  if (arguments.vectors && is_plain(arguments.inputs)) {
    with_head_dim<true>(arguments.inputs, [&](auto dim) {
      launch_backward<T, decltype(dim)::value, true>(arguments, stream);
    });
  } else {
    with_head_dim<false>(arguments.inputs, [&](auto dim) {
      launch_backward<T, decltype(dim)::value, false>(arguments, stream);
    });
  }
}

}  // namespace

const char* attention_backward(const Attention<float>& inputs,
                               const AttentionGradients<float>& gradients, Stream stream) {
  const GradientTarget dq = GradientTarget::of_dq(gradients);
  const GradientTarget dk = GradientTarget::of_dk(gradients);
  const GradientTarget dv = GradientTarget::of_dv(gradients);
  const bool vectors =
      has_aligned_rows(inputs.q, inputs.D) && has_aligned_rows(inputs.k, inputs.D) &&
      has_aligned_rows(inputs.v, inputs.Dv) && has_aligned_rows(gradients.dout, inputs.Dv) &&
      is_aligned(dq.data) && is_aligned(dk.data) && is_aligned(dv.data);
  const BackwardArguments arguments{inputs, gradients, dq, dk, dv, {}, vectors};
  if (inputs.q.dtype == DType::kBFloat16) {
    backward_of<BFloat16>(arguments, stream);
  } else {
    backward_of<Float16>(arguments, stream);
  }
  if (gradients.dbias.data != nullptr) bias_backward(arguments, stream);
  return last_error();
}

}  // namespace usp::gpu
