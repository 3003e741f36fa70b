// Gradients of one block of keys, from the final lse and delta.
//
//   P = exp(S - lse),  dS = P (dO V^T m - delta),  dV += (P m)^T dO,  dK += dS^T Q,  dQ += dS K
//
// One kernel owns keys and walks over queries for dK and dV, one owns queries and walks over keys
// for dQ: scores are computed twice, nothing is added atomically, and the same inputs give the same
// bits. Source of the recomputation: Dao 2023, "FlashAttention-2", arXiv:2307.08691.

#include "gradients.h"
#include "hopper/attention.h"

namespace usp::gpu {
namespace {

// Tiles of one backward block: two of own rows, two that are walked over.
template <typename T, int kDim>
struct BackwardShared {
  static constexpr Tiles kTiles = backward_tiles(kDim);
  using Own = SharedRows<T, kTiles.rows(), kDim>;
  using Walked = SharedStages<SharedRows<T, kTiles.columns, kDim>, kTiles.stages>;
  static constexpr int kStride = Own::kStride;
  static constexpr int kResults = kTiles.stages * kTiles.columns;  // lse, and delta, of queries
  static constexpr int kBytes = 2 * Own::kBytes + 2 * Walked::kBytes + 2 * kResults * 4;

  Own own[2];
  Walked walked[2];
  float *lse, *delta;

  USP_DEVICE explicit BackwardShared(char* base) {
    SharedCarver carver(base);
    for (Own& rows : own) rows = carver.template rows<Own>();
    for (Walked& rows : walked) rows = carver.template rows<Walked>();
    lse = carver.floats(kResults);
    delta = carver.floats(kResults);
  }
};

template <typename T, int kDim>
using Waves = LeftRows<T, backward_tiles(kDim).strips, kDim, false>;

template <typename T, int kDim, bool kPlain>
USP_KERNEL USP_LAUNCH_BOUNDS(
    backward_tiles(kDim).threads(),
    backward_tiles(kDim).blocks_at_once) void key_value_kernel(BackwardArguments arguments) {
  constexpr Tiles kTiles = backward_tiles(kDim);
  constexpr int kThreads = kTiles.threads(), kStrips = kTiles.strips, kColumns = kTiles.columns;
  constexpr int kStride = BackwardShared<T, kDim>::kStride;
  constexpr int kParts = key_value_parts(kDim), kPartDim = kDim / kParts;
  const Attention<float> a = in_global_memory(arguments.inputs);
  const AttentionGradients<float> g = in_global_memory(arguments.gradients);

  const BlockPlace place = place_of_block<kParts>(arguments.first, tiles_of(a.Lk, kTiles.rows()));
  const Range range = rows_of_tile(place.row_tile, kTiles.rows(), a.Lk);
  const Walk walk =
      Walk::over(visible_queries(a.span, range), unmasked_queries(a.span, range), kColumns);
  const Rows heads = Rows::of(a.query_heads(place.h));
  const int steps = walk.count * heads.size();
  if (steps <= 0) return;

  const BackwardShared<T, kDim> shared(shared_memory());
  const auto [keys, values] = shared.own;
  const auto [queries, douts] = shared.walked;
  const auto load_queries = [&](int step) {
    const int h = heads.begin + step / walk.count;
    const Rows rows = walk.step(step % walk.count, kColumns);
    queries.stage(step).template load<kThreads>(HeadRows<T>::of(a.q, place.b, h, a.D), rows,
                                                kPlain || arguments.vectors);
    douts.stage(step).template load<kThreads>(HeadRows<T>::of(g.dout, place.b, h, a.Dv), rows,
                                              kPlain || arguments.vectors);
    const int64_t row_of_heads = (place.b * a.H + h) * a.Lq + rows.begin;
    const int slot = step % kTiles.stages * kColumns, i = static_cast<int>(thread_index());
    if (i < kColumns) {
      const bool exists = i < rows.size();
      copy4(shared.lse + slot + i, exists ? g.lse + row_of_heads + i : g.lse, exists);
      copy4(shared.delta + slot + i, exists ? g.delta + row_of_heads + i : g.delta, exists);
    }
  };

  const Rows own = Rows::of(range);
  const int first_row = wave() * kStrips * kTile, first_key = own.begin + first_row;
  keys.template load<kThreads>(HeadRows<T>::of(a.k, place.b, place.h, a.D), own,
                               kPlain || arguments.vectors);
  values.template load<kThreads>(HeadRows<T>::of(a.v, place.b, place.h, a.Dv), own,
                                 kPlain || arguments.vectors);
  const Waves<T, kDim> left_keys(keys.row(first_row), kStride);
  const Waves<T, kDim> left_values(values.row(first_row), kStride);
  load_queries(0);

  Sums<kStrips, kPartDim / kTile> dk, dv;
  const int first_dim = place.part * kPartDim;
  dk.clear();
  dv.clear();
  for (int step = 0; step < steps; ++step) {
    copies_arrived();
    barrier();
    if (kTiles.stages > 1 && step + 1 < steps) load_queries(step + 1);

    const Scoring<kPlain> scoring(a, place.b, heads.begin + step / walk.count);
    const int first_query = walk.step(step % walk.count, kColumns).begin;
    const int stage = step % kTiles.stages * kColumns;
    Sums<kStrips, kColumns / kTile> scores, dscores;
    multiply_transposed<kDim>(scores, left_keys, queries.stage(step).data, kStride);
    multiply_transposed<kDim>(dscores, left_values, douts.stage(step).data, kStride);
    tile_gradients(
        scoring, scores, dscores, !walk.is_masked(step % walk.count),
        [&](int s, int slot, int column) {
          return Pair{first_query + column, first_key + s * kTile + Accumulator::row_of_slot(slot)};
        },
        [&](int, int, int column) {
          return QueryResults::of(shared.lse[stage + column], shared.delta[stage + column]);
        });
    multiply_accumulate(dv, scores, douts.stage(step).data + first_dim, kStride);
    multiply_accumulate(dk, dscores, queries.stage(step).data + first_dim, kStride);
    if (kTiles.stages == 1 && step + 1 < steps) {
      barrier();
      load_queries(step + 1);
    }
  }

  const int64_t row = (place.b * a.Lk + first_key) * a.G + place.h;
  const int count = own.size() - first_row, D = static_cast<int>(a.D), Dv = static_cast<int>(a.Dv);
  MatrixRows<float>{g.dk + row * D + first_dim, a.G * D, count, D - first_dim}.add(
      dk, static_cast<float>(a.softmax_scale));
  MatrixRows<float>{g.dv + row * Dv + first_dim, a.G * Dv, count, Dv - first_dim}.add(dv, 1.0f);
}

template <typename T, int kDim, bool kPlain>
USP_KERNEL USP_LAUNCH_BOUNDS(
    backward_tiles(kDim).threads(),
    backward_tiles(kDim).blocks_at_once) void query_kernel(BackwardArguments arguments) {
  constexpr Tiles kTiles = backward_tiles(kDim);
  constexpr int kThreads = kTiles.threads(), kStrips = kTiles.strips, kColumns = kTiles.columns;
  constexpr int kStride = BackwardShared<T, kDim>::kStride;
  const Attention<float> a = in_global_memory(arguments.inputs);
  const AttentionGradients<float> g = in_global_memory(arguments.gradients);

  const BlockPlace place = place_of_block(arguments.first, tiles_of(a.Lq, kTiles.rows()));
  const Range range = rows_of_tile(place.row_tile, kTiles.rows(), a.Lq);
  const Walk walk = Walk::over(visible_keys(a.span, range), unmasked_keys(a.span, range), kColumns);
  if (walk.count == 0) return;

  const BackwardShared<T, kDim> shared(shared_memory());
  const auto [queries, douts] = shared.own;
  const auto [keys, values] = shared.walked;
  const int64_t key_head = a.key_head(place.h);
  const auto k = HeadRows<T>::of(a.k, place.b, key_head, a.D);
  const auto v = HeadRows<T>::of(a.v, place.b, key_head, a.Dv);
  const auto load_keys = [&](int step) {
    const Rows rows = walk.step(step, kColumns);
    keys.stage(step).template load<kThreads>(k, rows, kPlain || arguments.vectors);
    values.stage(step).template load<kThreads>(v, rows, kPlain || arguments.vectors);
  };

  const Rows own = Rows::of(range);
  const int first_row = wave() * kStrips * kTile, first_query = own.begin + first_row;
  queries.template load<kThreads>(HeadRows<T>::of(a.q, place.b, place.h, a.D), own,
                                  kPlain || arguments.vectors);
  douts.template load<kThreads>(HeadRows<T>::of(g.dout, place.b, place.h, a.Dv), own,
                                kPlain || arguments.vectors);
  const Waves<T, kDim> left_queries(queries.row(first_row), kStride);
  const Waves<T, kDim> left_douts(douts.row(first_row), kStride);
  load_keys(0);

  PerRow<QueryResults, kStrips> results;
  const int count = own.size() - first_row;
  const int64_t row_of_heads = (place.b * a.H + place.h) * a.Lq + first_query;
  results.for_each([&](QueryResults& result, int row) {
    const bool exists = row < count;
    result = QueryResults::of(exists ? g.lse[row_of_heads + row] : -kInfinity,
                              exists ? g.delta[row_of_heads + row] : 0.0f);
  });

  const Scoring<kPlain> scoring(a, place.b, place.h);
  Sums<kStrips, kDim / kTile> dq;
  dq.clear();
  for (int step = 0; step < walk.count; ++step) {
    copies_arrived();
    barrier();
    if (kTiles.stages > 1 && step + 1 < walk.count) load_keys(step + 1);

    const int first_key = walk.step(step, kColumns).begin;
    Sums<kStrips, kColumns / kTile> scores, dscores;
    multiply_transposed<kDim>(scores, left_queries, keys.stage(step).data, kStride);
    multiply_transposed<kDim>(dscores, left_douts, values.stage(step).data, kStride);
    tile_gradients(
        scoring, scores, dscores, !walk.is_masked(step),
        [&](int s, int slot, int column) {
          return Pair{first_query + s * kTile + Accumulator::row_of_slot(slot), first_key + column};
        },
        [&](int s, int slot, int) { return results.of[s][slot]; });
    multiply_accumulate(dq, dscores, keys.stage(step).data, kStride);
    if (kTiles.stages == 1 && step + 1 < walk.count) {
      barrier();
      load_keys(step + 1);
    }
  }

  const int64_t row = (place.b * a.Lq + first_query) * a.H + place.h;
  const int D = static_cast<int>(a.D);
  MatrixRows<float>{g.dq + row * D, a.H * D, count, D}.add(dq, static_cast<float>(a.softmax_scale));
}

template <typename T, int kDim, bool kPlain>
void launch_backward(const BackwardArguments& arguments, Stream stream) {
  constexpr Tiles kTiles = backward_tiles(kDim);
  constexpr int kBytes = BackwardShared<T, kDim>::kBytes;
  static_assert(kBytes <= kSharedLimit);
  const Attention<float>& a = arguments.inputs;
  launch_blocks(key_value_kernel<T, kDim, kPlain>, arguments,
                tiles_of(a.Lk, kTiles.rows()) * key_value_parts(kDim), a.G, a.B, kTiles.threads(),
                kBytes, stream);
  launch_blocks(query_kernel<T, kDim, kPlain>, arguments, tiles_of(a.Lq, kTiles.rows()), a.H, a.B,
                kTiles.threads(), kBytes, stream);
}

template <typename T>
void backward_of(const BackwardArguments& arguments, Stream stream) {
  with_head_dim(arguments.inputs, [&](auto dim) {
    constexpr int kDim = decltype(dim)::value;
    if (arguments.vectors && is_plain(arguments.inputs)) {
      launch_backward<T, kDim, true>(arguments, stream);
    } else {
      launch_backward<T, kDim, false>(arguments, stream);
    }
  });
}

}  // namespace

const char* attention_backward(const Attention<float>& inputs,
                               const AttentionGradients<float>& gradients, Stream stream) {
#if defined(USP_WGMMA)
  if (hopper::takes_backward(inputs, gradients)) {
    return hopper::attention_backward(inputs, gradients, stream);
  }
#endif
  const bool vectors =
      has_aligned_rows(inputs.q, inputs.D) && has_aligned_rows(inputs.k, inputs.D) &&
      has_aligned_rows(inputs.v, inputs.Dv) && has_aligned_rows(gradients.dout, inputs.Dv);
  const BackwardArguments arguments{inputs, gradients, {}, vectors};
  if (inputs.q.dtype == DType::kBFloat16) {
    backward_of<BFloat16>(arguments, stream);
  } else {
    backward_of<Float16>(arguments, stream);
  }
  if (gradients.dbias.data != nullptr) bias_backward(arguments, stream);
  return last_error();
}

}  // namespace usp::gpu
