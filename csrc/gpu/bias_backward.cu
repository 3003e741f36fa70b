// dbias: gradients of scores, summed over the dims that the bias broadcasts.
//
// A thread block owns a tile of the bias and adds up, in a fixed order, what every batch entry,
// head and query that share it contribute.

#include "gpu/gradients.h"

namespace usp::gpu {
namespace {

template <typename T, int kDim>
struct BiasShared {
  static constexpr Tiles kTiles = backward_tiles(Gradient::kBias, kDim, false);
  using Queries = SharedRows<T, kTiles.rows(), kDim>;
  using Keys = SharedRows<T, kTiles.columns, kDim>;
  static constexpr int kStride = Queries::kStride;
  static constexpr int kBytes =
      2 * Queries::kBytes + 2 * Keys::kBytes + kTiles.waves * kTiles.columns * 4;

  Queries queries, douts;
  Keys keys, values;
  float* column_sums;  // (waves, columns)

  USP_DEVICE explicit BiasShared(char* base) {
    SharedCarver carver(base);
    queries = carver.template rows<Queries>();
    douts = carver.template rows<Queries>();
    keys = carver.template rows<Keys>();
    values = carver.template rows<Keys>();
    column_sums = carver.floats(kTiles.waves * kTiles.columns);
  }
};

// What a tile of the bias stands for: a dim that is broadcast is walked over as a whole.
struct BiasTile {
  Range batch, heads, query_tiles;
  int64_t key_tile;
};

// Tiles that the bias tells apart.
struct BiasGrid {
  int64_t batch, heads, query_tiles, key_tiles;

  static BiasGrid of(const BiasView<float*>& dbias, const Attention<float>& a, const Tiles& tiles) {
    return {dbias.batch_stride == 0 ? 1 : a.B, dbias.head_stride == 0 ? 1 : a.H,
            dbias.query_stride == 0 ? 1 : tiles_of(a.Lq, tiles.rows()),
            tiles_of(a.Lk, tiles.columns)};
  }
};

USP_DEVICE Range shared_part(int64_t index, int64_t stride, int64_t all) {
  return stride == 0 ? Range{0, all} : Range{index, index + 1};
}

USP_DEVICE BiasTile tile_of_block(const BiasView<float*>& dbias, const Attention<float>& a,
                                  const Tiles& tiles, const BlockOrder& order) {
  const auto [b, h, tile] = place_of_block(order, block_index());
  const int64_t key_tiles = tiles_of(a.Lk, tiles.columns);
  return {shared_part(b, dbias.batch_stride, a.B), shared_part(h, dbias.head_stride, a.H),
          shared_part(tile / key_tiles, dbias.query_stride, tiles_of(a.Lq, tiles.rows())),
          tile % key_tiles};
}

// Adds the sums over all rows of all waves to one row of the bias, which is contiguous.
template <int kTile, int kStrips, int kColumns>
USP_DEVICE void add_column_sums(Sums<kTile, kStrips, kColumns>& sums, float* scratch, int waves,
                                float* row, int columns) {
  using Element = Accumulator<kTile>;
  const int first = Element::first_column();
  float* sums_of_wave = scratch + wave() * kColumns * kTile;
  USP_UNROLL
  for (int n = 0; n < kColumns; ++n) {
    USP_UNROLL
    for (int i = 0; i < kElements<kTile>; ++i) {
      if (Element::slot(i) != 0) continue;
      float sum = 0.0f;
      USP_UNROLL
      for (int other = 0; other < kElements<kTile>; ++other) {
        if (Element::offset(other) != Element::offset(i)) continue;
        USP_UNROLL
        for (int s = 0; s < kStrips; ++s) sum += sums.tile[s][n].x[other];
      }
      sum = column_sum<kTile>(sum);
      if (Element::row_of_slot(0) == 0) {
        sums_of_wave[first + n * kTile + Element::offset(i)] = sum;
      }
    }
  }
  barrier();
  const int column = static_cast<int>(thread_index());
  if (column >= columns) return;
  float total = 0.0f;
  for (int w = 0; w < waves; ++w) total += scratch[w * kColumns * kTile + column];
  row[column] += total;
}

template <typename T, int kDim>
USP_KERNEL USP_LAUNCH_BOUNDS(backward_tiles(Gradient::kBias, kDim, false).threads(),
                             backward_tiles(Gradient::kBias, kDim, false)
                                 .blocks_at_once) void bias_kernel(BackwardArguments arguments) {
  constexpr Tiles kTiles = backward_tiles(Gradient::kBias, kDim, false);
  constexpr int kThreads = kTiles.threads(), kColumns = kTiles.columns;
  constexpr int kTile = kTiles.tile, kStrips = kTiles.strips;
  constexpr int kStride = BiasShared<T, kDim>::kStride;
  const Attention<float> a = in_global_memory(arguments.inputs);
  const AttentionGradients<float> g = in_global_memory(arguments.gradients);

  const BiasTile tile = tile_of_block(g.dbias, a, kTiles, arguments.order);
  const Range key_range = rows_of_tile(tile.key_tile, kColumns, a.Lk);
  const Rows key_rows = Rows::of(key_range);
  const BiasShared<T, kDim> shared(shared_memory());
  const int first_row = wave() * kTiles.wave_rows();
  const LeftRows<T, kTile, kStrips, kDim, false> left_queries(shared.queries.row(first_row),
                                                              kStride);
  const LeftRows<T, kTile, kStrips, kDim, false> left_douts(shared.douts.row(first_row), kStride);

  using Element = Accumulator<kTile>;
  Sums<kTile, kStrips, kColumns / kTile> total;
  total.clear();
  const auto add_tile = [&](int64_t b, int64_t h, Rows rows) {
    barrier();
    copy_rows<kThreads>(shared.queries, HeadRows<T>::of(a.q, b, h, a.D), rows, arguments.vectors);
    copy_rows<kThreads>(shared.douts, HeadRows<T>::of(g.dout, b, h, a.Dv), rows, arguments.vectors);
    copy_rows<kThreads>(shared.keys, HeadRows<T>::of(a.k, b, a.key_head(h), a.D), key_rows,
                        arguments.vectors);
    copy_rows<kThreads>(shared.values, HeadRows<T>::of(a.v, b, a.key_head(h), a.Dv), key_rows,
                        arguments.vectors);
    copies_arrived();
    barrier();

    const Scoring<false> scoring(a, static_cast<int>(b), static_cast<int>(h));
    const int64_t row_of_heads = (b * a.H + h) * a.Lq;
    Sums<kTile, kStrips, kColumns / kTile> products, dproducts;
    multiply_transposed<kDim>(products, left_queries, shared.keys.data, kStride);
    multiply_transposed<kDim>(dproducts, left_douts, shared.values.data, kStride);
    USP_UNROLL
    for (int s = 0; s < kStrips; ++s) {
      USP_UNROLL
      for (int n = 0; n < kColumns / kTile; ++n) {
        USP_UNROLL
        for (int i = 0; i < kElements<kTile>; ++i) {
          const int row = first_row + s * kTile + Element::row_of_slot(Element::slot(i));
          const int column = n * kTile + Element::first_column() + Element::offset(i);
          const Pair at{rows.begin + row, key_rows.begin + column};
          if (!is_visible(a.span, at)) continue;
          const int64_t query = row_of_heads + at.query;
          total.tile[s][n].x[i] +=
              pair_gradients(scoring, products.tile[s][n].x[i], dproducts.tile[s][n].x[i],
                             QueryResults::of(g.lse[query], g.delta[query]), at)
                  .score;
        }
      }
    }
  };
  for (int64_t b = tile.batch.begin; b < tile.batch.end; ++b) {
    for (int64_t h = tile.heads.begin; h < tile.heads.end; ++h) {
      for (int64_t t = tile.query_tiles.begin; t < tile.query_tiles.end; ++t) {
        const Range rows = rows_of_tile(t, kTiles.rows(), a.Lq);
        if (may_see_any(a.span, rows, key_range)) add_tile(b, h, Rows::of(rows));
      }
    }
  }

  float* corner = g.dbias.at(tile.batch.begin, tile.heads.begin, 0, key_rows.begin);
  if (g.dbias.query_stride == 0) {
    add_column_sums(total, shared.column_sums, kTiles.waves, corner, key_rows.size());
    return;
  }
  const int64_t first_query = tile.query_tiles.begin * kTiles.rows() + first_row;
  MatrixRows<float>{corner + first_query * g.dbias.query_stride, g.dbias.query_stride,
                    static_cast<int>(a.Lq - first_query), key_rows.size()}
      .template put<false>(total, 1.0f, std::true_type{});
}

template <typename T>
void bias_backward_of(const BackwardArguments& arguments, Stream stream) {
  with_head_dim<false>(arguments.inputs, [&](auto dim) {
    constexpr int kDim = decltype(dim)::value;
    constexpr Tiles kTiles = backward_tiles(Gradient::kBias, kDim, false);
    const Attention<float>& a = arguments.inputs;
    const BiasGrid grid = BiasGrid::of(arguments.gradients.dbias, a, kTiles);
    static_assert(BiasShared<T, kDim>::kBytes <= kSharedLimit);
    launch_blocks(bias_kernel<T, kDim>, arguments, grid.query_tiles * grid.key_tiles, grid.heads,
                  grid.batch, 1, kTiles.threads(), BiasShared<T, kDim>::kBytes, stream);
  });
}

}  // namespace

void bias_backward(const BackwardArguments& arguments, Stream stream) {
  if (arguments.inputs.q.dtype == DType::kBFloat16) {
    bias_backward_of<BFloat16>(arguments, stream);
  } else {
    bias_backward_of<Float16>(arguments, stream);
  }
}

}  // namespace usp::gpu
