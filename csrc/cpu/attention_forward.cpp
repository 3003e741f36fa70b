// One block of keys into the running softmax.
//
// A task is a tile of query rows of one head. It loads the rows' state, walks the keys they see
// (edge, full, edge), and stores the state: no partial output, no merge pass.
//
//   S^T = K Q^T                        (keys, rows), scaled, capped, biased, masked
//   max, sum, P^T = exp(S^T - max)     along the columns
//   O = factor O + P V                 factor: what a raised maximum does to the past
//
// Sources: online softmax, Milakov & Gimelshein 2018, arXiv:1805.02867; tiling by query rows,
// Dao 2023, arXiv:2307.08691.

#include "attention.h"
#include "tiles.h"

namespace usp::cpu {
namespace {

template <typename T>
struct Workspace {
  Matrix<T> q;        // (rows, D)
  Matrix<T> q_t;      // (D, rows)
  Matrix<T> k;        // (keys, D)
  Matrix<T> v;        // (keys, Dv)
  Matrix<T> v_words;  // the same in words along a column
  Matrix<T> out;      // (rows, Dv), not normalised
  T* scores;          // (keys, rows)
  T* weights;         // the same as left operand
  T* multiplier;      // (keys, rows), dropout only
  T* max;             // (rows,), and so on
  T* sum;
  T* factor;
  QueryPositions positions;

  Workspace(const Attention<T>& a, Carver& carver) {
    q = {carver.take<T>(kQueryTile * padded(a.D)), padded(a.D)};
    q_t = {carver.take<T>(a.D * kQueryTile), kQueryTile};
    k = {carver.take<T>(kKeyTile * padded(a.D)), padded(a.D)};
    v = {carver.take<T>(kKeyTile * padded(a.Dv)), padded(a.Dv)};
    v_words = {carver.take<T>(kKeyTile * padded(a.Dv)), padded(a.Dv)};
    out = {carver.take<T>(kQueryTile * padded(a.Dv)), padded(a.Dv)};
    scores = carver.take<T>(kKeyTile * kQueryTile);
    weights = carver.take<T>(kKeyTile * kQueryTile);
    multiplier = a.dropout_p > 0 ? carver.take<T>(kKeyTile * kQueryTile) : nullptr;
    max = carver.take<T>(kQueryTile);
    sum = carver.take<T>(kQueryTile);
    factor = carver.take<T>(kQueryTile);
    positions.carve(carver);
  }
};

template <typename T>
class ForwardTask {
 public:
  ForwardTask(const Attention<T>& a, const AttentionState<T>& state, const Kernels<T>& kernels,
              Workspace<T>& w)
      : a_(a), state_(state), kernels_(kernels), w_(w) {}

  void run(int64_t b, int64_t h, Range rows) {
    const Range visible = visible_keys(a_.span, rows);
    if (visible.empty()) return;
    load_queries(b, h, rows);
    load_state(b, h, rows);
    for_each_tile(visible, unmasked_keys(a_.span, rows), kKeyTile, [&](Range keys, bool masked) {
      if (masked && !sees_any(a_.span, rows, keys)) return;
      add_keys({b, h, rows, keys, masked});
    });
    store_state(b, h, rows);
  }

 private:
  void load_queries(int64_t b, int64_t h, Range rows) {
    load_rows(kernels_, a_.q, b, h, rows, a_.D, w_.q);
    w_.q_t.ld = padded(rows.size());
    kernels_.transpose(as_const(w_.q), rows.size(), a_.D, w_.q_t);
    w_.positions.load(a_, rows);
  }

  void load_state(int64_t b, int64_t h, Range rows) {
    const T* lse = state_.lse + (b * a_.H + h) * a_.Lq + rows.begin;
    for (int64_t i = 0; i < padded(rows.size()); ++i) {
      const auto row = RunningSoftmax<T>::from_lse(i < rows.size() ? lse[i] : minus_infinity<T>());
      w_.max[i] = row.max;
      w_.sum[i] = row.sum;
    }
    for (int64_t i = 0; i < rows.size(); ++i) {
      const T* from = out_row(b, h, rows.begin + i);
      T* to = w_.out.data + i * w_.out.ld;
      std::copy(from, from + a_.Dv, to);
      std::fill(to + a_.Dv, to + w_.out.ld, T(0));
    }
  }

  void add_keys(const TileIndex& at) {
    const int64_t g = a_.key_head(at.h), num_rows = at.rows.size(), num_keys = at.keys.size();
    load_rows(kernels_, a_.k, at.b, g, at.keys, a_.D, w_.k);
    load_rows(kernels_, a_.v, at.b, g, at.keys, a_.Dv, w_.v);
    const Tile<T> s{w_.scores, num_keys, padded(num_rows)};
    compute_scores<T>(a_, kernels_, at, as_const(w_.k), as_const(w_.q_t), w_.positions, s, nullptr);
    kernels_.softmax_update(s, w_.max, w_.sum, w_.factor);
    if (a_.dropout_p > 0) {
      dropout_multiplier<T>(a_, kernels_, at, w_.positions, {w_.multiplier, s.keys, s.queries});
      kernels_.multiply(s, w_.multiplier);
    }
    kernels_.scale_rows(w_.out, num_rows, w_.out.ld, w_.factor);
    const auto v = kernels_.by_row_words(as_const(w_.v), num_keys, a_.Dv, w_.v_words);
    kernels_.gemm(num_rows, w_.out.ld, num_keys, kernels_.tile_by_query(s, w_.weights), v, w_.out,
                  T(1), true);
  }

  void store_state(int64_t b, int64_t h, Range rows) {
    T* lse = state_.lse + (b * a_.H + h) * a_.Lq + rows.begin;
    for (int64_t i = 0; i < rows.size(); ++i) {
      const RunningSoftmax<T> row{w_.max[i], w_.sum[i]};
      lse[i] = row.lse();
      const T normaliser = row.normaliser();
      const T* from = w_.out.data + i * w_.out.ld;
      T* to = out_row(b, h, rows.begin + i);
      for (int64_t d = 0; d < a_.Dv; ++d) to[d] = from[d] * normaliser;
    }
  }

  T* out_row(int64_t b, int64_t h, int64_t i) const {
    return state_.out + ((b * a_.Lq + i) * a_.H + h) * a_.Dv;
  }

  const Attention<T>& a_;
  const AttentionState<T>& state_;
  const Kernels<T>& kernels_;
  Workspace<T>& w_;
};

}  // namespace

template <typename T>
void attention_forward(const Attention<T>& a, const AttentionState<T>& state,
                       const ParallelFor& parallel) {
  if (a.Lk == 0) return;
  const int64_t blocks = (a.Lq + kQueryTile - 1) / kQueryTile;
  const int64_t tasks = a.B * a.H * blocks;
  Carver measure(nullptr);
  Workspace<T>(a, measure);
  Scratch scratch(parallel.workers_for(tasks), measure.used());
  const Kernels<T>& table = kernels<T>(a.q.dtype);
  parallel.for_each_task(tasks, [&](int64_t worker, int64_t task) {
    Carver carver(scratch.of(worker));
    Workspace<T> workspace(a, carver);
    const int64_t head = task / blocks;
    const int64_t block = blocks - 1 - task % blocks;  // under a causal mask the last are heaviest
    const Range rows = intersect({block * kQueryTile, (block + 1) * kQueryTile}, {0, a.Lq});
    ForwardTask<T>(a, state, table, workspace).run(head / a.H, head % a.H, rows);
  });
}

template void attention_forward(const Attention<float>&, const AttentionState<float>&,
                                const ParallelFor&);
template void attention_forward(const Attention<double>&, const AttentionState<double>&,
                                const ParallelFor&);

}  // namespace usp::cpu
