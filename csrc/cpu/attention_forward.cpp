// One block of keys into the running softmax.
//
// A task holds a few tiles of query rows whose heads read the same key head. It loads their state,
// walks the keys they see, and stores their state: no partial output, no merge pass.
//
//   S^T = K Q^T                        (keys, rows), scaled, capped, biased, masked
//   max, sum, P^T = exp(S^T - max)     along the columns
//   O = factor O + P V                 factor: what a raised maximum does to the past
//
// Sources: online softmax, Milakov & Gimelshein 2018, arXiv:1805.02867; tiling by query rows,
// Dao 2023, arXiv:2307.08691.

#include <span>

#include "attention.h"
#include "tiles.h"

namespace usp::cpu {
namespace {

// A tile of query rows with its running softmax.
template <typename T>
struct RowTile {
  int64_t h;
  Range rows, visible, unmasked;  // visible and unmasked are keys
  Matrix<T> q_t;                  // (D, rows)
  Matrix<T> out;                  // (rows, Dv), not normalised
  SoftmaxRows<T> softmax;
  QueryPositions positions;

  RowTile() = default;

  RowTile(const Attention<T>& a, Carver& carver) {
    q_t = {carver.take<T>(a.D * kQueryTile), kQueryTile};
    out = {carver.take<T>(kQueryTile * padded(a.Dv)), padded(a.Dv)};
    softmax = {carver.take<T>(kQueryTile), carver.take<T>(kQueryTile), carver.take<T>(kQueryTile)};
    positions.carve(carver);
  }
};

template <typename T>
struct Workspace {
  int64_t held;
  RowTile<T> tiles[kTilesHeld];
  Matrix<T> q;    // (rows, D)
  Matrix<T> k;    // (keys, D)
  Matrix<T> v;    // (keys, Dv)
  T* scores;      // (keys, rows)
  T* weights;     // the same as left operand
  T* multiplier;  // (keys, rows), dropout only

  Workspace(const Attention<T>& a, int64_t tiles_held, Carver& carver) : held(tiles_held) {
    for (int64_t t = 0; t < held; ++t) tiles[t] = RowTile<T>(a, carver);
    q = {carver.take<T>(kQueryTile * padded(a.D)), padded(a.D)};
    k = {carver.take<T>(kKeyTile * padded(a.D)), padded(a.D)};
    v = {carver.take<T>(kKeyTile * padded(a.Dv)), padded(a.Dv)};
    scores = carver.take<T>(kKeyTile * kQueryTile);
    weights = carver.take<T>(kKeyTile * kQueryTile);
    multiplier = a.dropout_p > 0 ? carver.take<T>(kKeyTile * kQueryTile) : nullptr;
  }
};

template <typename T>
class ForwardTask {
 public:
  ForwardTask(const Attention<T>& a, const AttentionState<T>& state, const Kernels<T>& kernels,
              Workspace<T>& w, int64_t b, int64_t g, T headroom_sum)
      : a_(a), state_(state), kernels_(kernels), w_(w), b_(b), g_(g), headroom_sum_(headroom_sum) {}

  // Takes a tile of query rows in. Those that see nothing only matter to a result.
  void hold(int64_t h, Range rows) {
    RowTile<T>& tile = w_.tiles[count_];
    tile.visible = visible_keys(a_.span, rows);
    if (tile.visible.empty() && state_.result == nullptr) return;
    tile.unmasked = unmasked_keys(a_.span, rows);
    tile.h = h;
    tile.rows = rows;
    load_queries(tile);
    load_state(tile);
    ++count_;
  }

  void run() {
    if (count_ == 0) return;
    Range visible = w_.tiles[0].visible;
    for (const RowTile<T>& tile : held()) {
      visible = {std::min(visible.begin, tile.visible.begin),
                 std::max(visible.end, tile.visible.end)};
    }
    for (int64_t begin = visible.begin; begin < visible.end; begin += kKeyTile) {
      add_keys({begin, std::min(begin + kKeyTile, visible.end)});
    }
    for (const RowTile<T>& tile : held()) store_state(tile);
  }

 private:
  std::span<RowTile<T>> held() { return {w_.tiles, static_cast<size_t>(count_)}; }

  void load_queries(RowTile<T>& tile) {
    const int64_t num_rows = tile.rows.size();
    const auto q = left_rows(kernels_, a_.q, b_, tile.h, tile.rows, a_.D, w_.q);
    tile.q_t.ld = padded(num_rows);
    kernels_.right_transpose(q, num_rows, a_.D, tile.q_t);
    tile.positions.load(a_, tile.rows);
  }

  RunningSoftmax<T> carried(T lse) const {
    return RunningSoftmax<T>::from_lse(lse, kernels_.headroom, headroom_sum_);
  }

  void load_state(RowTile<T>& tile) {
    const T* lse = lse_of(tile);
    for (int64_t i = 0; i < padded(tile.rows.size()); ++i) {
      const auto row = carried(i < tile.rows.size() ? lse[i] : minus_infinity<T>());
      tile.softmax.max[i] = row.max;
      tile.softmax.sum[i] = row.sum;
    }
    std::fill(tile.out.data, tile.out.data + tile.rows.size() * tile.out.ld, T(0));
    if (state_.out == nullptr) return;
    kernels_.store_rows({state_.out + row_offset(tile), a_.H * a_.Dv}, tile.rows.size(), a_.Dv,
                        tile.softmax.sum, kDType<T>, tile.out.data, tile.out.ld);
  }

  void add_keys(Range keys) {
    bool loaded = false;
    Matrix<const T> k;
    for (RowTile<T>& tile : held()) {
      Range seen = intersect(keys, tile.visible);
      if (seen.empty()) continue;
      seen.begin -= (seen.begin - keys.begin) % kernels_.word;  // words of v are whole
      const bool masked = !tile.unmasked.contains(seen);
      if (masked && !sees_any(a_.span, tile.rows, seen)) continue;
      if (!loaded) {
        k = left_rows(kernels_, a_.k, b_, g_, keys, a_.D, w_.k);
        right_rows(kernels_, a_.v, b_, g_, keys, a_.Dv, w_.v);
        loaded = true;
      }
      const int64_t skipped = seen.begin - keys.begin;
      add_tile(tile, {b_, tile.h, tile.rows, seen, masked}, {k.data + skipped * k.ld, k.ld},
               {w_.v.data + skipped / kernels_.word * w_.v.ld, w_.v.ld});
    }
  }

  void add_tile(RowTile<T>& tile, const TileIndex& at, Matrix<const T> k, Matrix<const T> v) {
    const int64_t num_rows = at.rows.size(), num_keys = at.keys.size();
    const Tile<T> s{w_.scores, num_keys, padded(num_rows)};
    compute_scores<T>(a_, kernels_, at, k, as_const(tile.q_t), tile.positions, s, nullptr);
    if (a_.dropout_p > 0) {
      dropout_multiplier<T>(a_, kernels_, at, tile.positions, {w_.multiplier, s.keys, s.queries});
    }
    const auto weights = kernels_.softmax_update(s, tile.softmax, w_.multiplier, w_.weights);
    kernels_.scale_rows(tile.out, num_rows, tile.out.ld, tile.softmax.factor);
    kernels_.gemm(num_rows, tile.out.ld, num_keys, weights, v, tile.out, T(1), true);
  }

  void store_state(const RowTile<T>& tile) {
    T *lse = lse_of(tile), *factor = tile.softmax.factor;
    for (int64_t i = 0; i < tile.rows.size(); ++i) {
      const RunningSoftmax<T> row{tile.softmax.max[i], tile.softmax.sum[i]};
      factor[i] = row.normaliser();
      if (row == carried(lse[i])) continue;  // saw nothing: what it has stays, to the bit
      lse[i] = row.lse();
      if (state_.result == nullptr) store_rows(tile, {i, i + 1});
    }
    if (state_.result != nullptr) store_rows(tile, {0, tile.rows.size()});
  }

  // To the result where there is one.
  void store_rows(const RowTile<T>& tile, Range rows) {
    const bool last = state_.result != nullptr;
    const DType dtype = last ? state_.result_dtype : kDType<T>;
    const int64_t row_stride = a_.H * a_.Dv;
    const int64_t place = row_offset(tile) + rows.begin * row_stride;
    char* to = static_cast<char*>(last ? state_.result : state_.out) + place * element_size(dtype);
    kernels_.store_rows({tile.out.data + rows.begin * tile.out.ld, tile.out.ld}, rows.size(), a_.Dv,
                        tile.softmax.factor + rows.begin, dtype, to, row_stride);
  }

  T* lse_of(const RowTile<T>& tile) const {
    return state_.lse + (b_ * a_.H + tile.h) * a_.Lq + tile.rows.begin;
  }

  int64_t row_offset(const RowTile<T>& tile) const {
    return ((b_ * a_.Lq + tile.rows.begin) * a_.H + tile.h) * a_.Dv;
  }

  const Attention<T>& a_;
  const AttentionState<T>& state_;
  const Kernels<T>& kernels_;
  Workspace<T>& w_;
  const int64_t b_, g_;
  const T headroom_sum_;  // exp(headroom)
  int64_t count_ = 0;
};

}  // namespace

template <typename T>
void attention_forward(const Attention<T>& a, const AttentionState<T>& state,
                       const ParallelFor& parallel) {
  if (a.H == 0 || a.Lq == 0) return;
  // Tiles of one key head: rows from the last, for under a causal mask they are the heaviest, and
  // for the same rows head by head.
  const int64_t row_tiles = (a.Lq + kQueryTile - 1) / kQueryTile;
  const int64_t heads = std::min(a.group_size, a.H);
  const int64_t held = tiles_held(a.B * a.H * row_tiles, parallel.num_threads);
  const int64_t runs = (row_tiles * heads + held - 1) / held;
  const int64_t tasks = a.B * a.G * runs;
  Carver measure(nullptr);
  Workspace<T>(a, held, measure);
  Scratch scratch(parallel.workers_for(tasks), measure.used());
  const Kernels<T>& table = kernels<T>(a.q.dtype);
  const T headroom_sum = std::exp(table.headroom);
  parallel.for_each_task(tasks, [&](int64_t worker, int64_t index) {
    Carver carver(scratch.of(worker));
    Workspace<T> workspace(a, held, carver);
    const int64_t b = index / runs / a.G, g = index / runs % a.G;
    const Range own = a.query_heads(g);
    ForwardTask<T> task(a, state, table, workspace, b, g, headroom_sum);
    const Range tiles =
        intersect({index % runs * held, (index % runs + 1) * held}, {0, row_tiles * own.size()});
    for (int64_t t = tiles.begin; t < tiles.end; ++t) {
      const int64_t block = row_tiles - 1 - t / own.size();
      const Range rows = intersect({block * kQueryTile, (block + 1) * kQueryTile}, {0, a.Lq});
      task.hold(own.begin + t % own.size(), rows);
    }
    task.run();
  });
}

template void attention_forward(const Attention<float>&, const AttentionState<float>&,
                                const ParallelFor&);
template void attention_forward(const Attention<double>&, const AttentionState<double>&,
                                const ParallelFor&);

}  // namespace usp::cpu
