// Gradients of one block, from the final lse and delta.
//
//   P^T  = exp(S^T - lse)                (keys, rows)
//   dS^T = P^T * ((V dO^T) * m - delta)  m: dropout's multiplier; dbias += dS
//   dS^T = dS^T * d softcap / dx
//   dV += (P^T * m) dO,  dK += scale dS^T Q,  dQ += scale dS K
//
// A walk holds a few tiles of keys of one key head and passes the tiles of query rows that see
// them, each row tile's dQ in its hands and the keys' dK and dV in its own memory. Where there are
// enough heads to go round, a task walks all keys of its heads. Else the threads walk together,
// each past its own share of the rows, and their dK and dV are summed in order. The scores are
// computed once, nothing has two writers, and there are no atomics.
//
// Source: Dao 2023, arXiv:2307.08691, algorithm 2.

#include <vector>

#include "attention.h"
#include "tiles.h"

namespace usp::cpu {
namespace {

inline constexpr int64_t kKeysHeld = kTilesHeld * kKeyTile;

template <typename T>
struct Workspace {
  Matrix<T> q_left, q, q_t;           // (rows, D) twice, (D, rows)
  Matrix<T> dout_left, dout, dout_t;  // (rows, Dv) twice, (Dv, rows)
  Matrix<T> k_left, v_left;           // (keys held, D) (keys held, Dv)
  Matrix<T> k;                        // (keys held, D)
  Matrix<T> dq;                       // (rows, D)
  Matrix<T> dk, dv;                   // (keys held, D) (keys held, Dv)
  T *s, *dp;                          // (keys, rows)
  T* operands[3];                     // (keys, rows), see GradientOperands
  T* derivative;                      // (keys, rows), softcap only
  T* multiplier;                      // (keys, rows), dropout only
  T* ds;                              // (keys, rows), with a gradient of the bias only
  T *lse, *delta;                     // (rows,)
  QueryPositions positions;

  Workspace(const Attention<T>& a, bool with_dbias, Carver& carver) {
    const auto matrix = [&](int64_t rows, int64_t ld) {
      return Matrix<T>{carver.take<T>(rows * ld), ld};
    };
    constexpr int64_t kTile = kKeyTile * kQueryTile;
    q_left = matrix(kQueryTile, padded(a.D));
    q = matrix(kQueryTile, padded(a.D));
    q_t = matrix(a.D, kQueryTile);
    dout_left = matrix(kQueryTile, padded(a.Dv));
    dout = matrix(kQueryTile, padded(a.Dv));
    dout_t = matrix(a.Dv, kQueryTile);
    k_left = matrix(kKeysHeld, padded(a.D));
    v_left = matrix(kKeysHeld, padded(a.Dv));
    k = matrix(kKeysHeld, padded(a.D));
    dq = matrix(kQueryTile, padded(a.D));
    dk = matrix(kKeysHeld, padded(a.D));
    dv = matrix(kKeysHeld, padded(a.Dv));
    s = carver.take<T>(kTile);
    dp = carver.take<T>(kTile);
    for (T*& operand : operands) operand = carver.take<T>(kTile);
    derivative = a.softcap > 0 ? carver.take<T>(kTile) : nullptr;
    multiplier = a.dropout_p > 0 ? carver.take<T>(kTile) : nullptr;
    ds = with_dbias ? carver.take<T>(kTile) : nullptr;
    lse = carver.take<T>(kQueryTile);
    delta = carver.take<T>(kQueryTile);
    positions.carve(carver);
  }
};

template <typename T>
void set_zero(Matrix<T> m, int64_t rows) {
  std::memset(m.data, 0, static_cast<size_t>(rows * m.ld) * sizeof(T));
}

template <typename T>
class Walk {
 public:
  Walk(const Attention<T>& a, const AttentionGradients<T>& grads, const Kernels<T>& kernels,
       Workspace<T>& w)
      : a_(a), grads_(grads), kernels_(kernels), w_(w) {}

  void hold(int64_t b, int64_t g, Range keys) {
    b_ = b;
    g_ = g;
    keys_ = keys;
    k_ = left_rows(kernels_, a_.k, b, g, keys, a_.D, w_.k_left);
    v_ = left_rows(kernels_, a_.v, b, g, keys, a_.Dv, w_.v_left);
    right_rows(kernels_, a_.k, b, g, keys, a_.D, w_.k);
    set_zero(w_.dk, keys.size());
    set_zero(w_.dv, keys.size());
  }

  // A tile of query rows past the keys held: all their gradients but what add_key_gradients adds.
  void pass(int64_t h, Range rows) {
    const Range visible = intersect(visible_keys(a_.span, rows), keys_);
    if (visible.empty()) return;
    load_queries(h, rows);
    set_zero(w_.dq, rows.size());
    const Range unmasked = unmasked_keys(a_.span, rows);
    for (int64_t begin = keys_.begin; begin < visible.end; begin += kKeyTile) {
      Range keys = intersect({begin, begin + kKeyTile}, visible);
      if (keys.empty()) continue;
      keys.begin -= (keys.begin - keys_.begin) % kernels_.word;  // words of k are whole
      const bool masked = !unmasked.contains(keys);
      if (masked && !sees_any(a_.span, rows, keys)) continue;
      add_tile({b_, h, rows, keys, masked});
    }
    T* dq = grads_.dq + ((b_ * a_.Lq + rows.begin) * a_.H + h) * a_.D;
    kernels_.add_rows(as_const(w_.dq), rows.size(), a_.D, scale(), dq, a_.H * a_.D);
  }

  void add_key_gradients() {
    T* dk = grads_.dk + ((b_ * a_.Lk + keys_.begin) * a_.G + g_) * a_.D;
    T* dv = grads_.dv + ((b_ * a_.Lk + keys_.begin) * a_.G + g_) * a_.Dv;
    kernels_.add_rows(as_const(w_.dk), keys_.size(), a_.D, scale(), dk, a_.G * a_.D);
    kernels_.add_rows(as_const(w_.dv), keys_.size(), a_.Dv, T(1), dv, a_.G * a_.Dv);
  }

 private:
  void add_tile(const TileIndex& at) {
    const int64_t num_rows = at.rows.size(), num_keys = at.keys.size();
    const int64_t skipped = at.keys.begin - keys_.begin;
    const auto gradients = compute_gradients(at, {k_.data + skipped * k_.ld, k_.ld},
                                             {v_.data + skipped * v_.ld, v_.ld});
    add_product(num_keys, num_rows, gradients.weights_by_key, as_const(w_.dout),
                {w_.dv.data + skipped * w_.dv.ld, w_.dv.ld});
    add_product(num_keys, num_rows, gradients.scores_by_key, as_const(w_.q),
                {w_.dk.data + skipped * w_.dk.ld, w_.dk.ld});
    add_product(num_rows, num_keys, gradients.scores_by_query,
                {w_.k.data + skipped / kernels_.word * w_.k.ld, w_.k.ld}, w_.dq);
  }

  void add_product(int64_t m, int64_t k, Matrix<const T> left, Matrix<const T> right,
                   Matrix<T> sum) {
    kernels_.gemm(m, sum.ld, k, left, right, sum, T(1), true);
  }

  GradientOperands<T> compute_gradients(const TileIndex& at, Matrix<const T> k, Matrix<const T> v) {
    const Tile<T> s{w_.s, at.keys.size(), padded(at.rows.size())}, dp{w_.dp, s.keys, s.queries};
    compute_scores<T>(a_, kernels_, at, k, as_const(w_.q_t), w_.positions, s, w_.derivative);
    kernels_.gemm(s.keys, s.queries, a_.Dv, v, as_const(w_.dout_t), {dp.data, s.queries}, T(1),
                  false);
    if (a_.dropout_p > 0) {
      dropout_multiplier<T>(a_, kernels_, at, w_.positions, {w_.multiplier, s.keys, s.queries});
    }
    const auto [weights, by_key, by_query] = w_.operands;
    const auto operands = kernels_.gradients({s,
                                              dp,
                                              w_.lse,
                                              w_.delta,
                                              w_.multiplier,
                                              w_.derivative,
                                              w_.ds,
                                              {weights, by_key, by_query}});
    if (w_.ds != nullptr) {
      const auto& dbias = grads_.dbias;
      kernels_.add_bias_gradient({w_.ds, s.keys, s.queries}, at.rows.size(),
                                 dbias.at(at.b, at.h, at.rows.begin, at.keys.begin),
                                 dbias.query_stride, dbias.key_stride);
    }
    return operands;
  }

  void load_queries(int64_t h, Range rows) {
    const int64_t num_rows = rows.size(), row_of_lse = (b_ * a_.H + h) * a_.Lq + rows.begin;
    w_.q_t.ld = w_.dout_t.ld = padded(num_rows);
    const auto q = left_rows(kernels_, a_.q, b_, h, rows, a_.D, w_.q_left);
    const auto dout = left_rows(kernels_, grads_.dout, b_, h, rows, a_.Dv, w_.dout_left);
    kernels_.right_transpose(q, num_rows, a_.D, w_.q_t);
    kernels_.right_transpose(dout, num_rows, a_.Dv, w_.dout_t);
    right_rows(kernels_, a_.q, b_, h, rows, a_.D, w_.q);
    right_rows(kernels_, grads_.dout, b_, h, rows, a_.Dv, w_.dout);
    for (int64_t i = 0; i < padded(num_rows); ++i) {
      const bool exists = i < num_rows;
      w_.lse[i] = backward_lse(exists ? grads_.lse[row_of_lse + i] : minus_infinity<T>());
      w_.delta[i] = exists ? grads_.delta[row_of_lse + i] : T(0);
    }
    w_.positions.load(a_, rows);
  }

  T scale() const { return static_cast<T>(a_.softmax_scale); }

  const Attention<T>& a_;
  const AttentionGradients<T>& grads_;
  const Kernels<T>& kernels_;
  Workspace<T>& w_;
  int64_t b_ = 0, g_ = 0;
  Range keys_;
  Matrix<const T> k_, v_;  // left operands
};

// The tiles of query rows that may see the keys held: for the same rows head by head.
struct Passage {
  Range heads, row_tiles;
  int64_t num_rows;

  template <typename T>
  Passage(const Attention<T>& a, int64_t g, Range keys) : heads(a.query_heads(g)), num_rows(a.Lq) {
    const Range rows = visible_queries(a.span, keys);
    row_tiles = {rows.begin / kQueryTile, (rows.end + kQueryTile - 1) / kQueryTile};
  }

  int64_t count() const { return row_tiles.size() * heads.size(); }

  template <typename T>
  void let_pass(Range tiles, Walk<T>& walk) const {
    for (int64_t t = tiles.begin; t < tiles.end; ++t) {
      const int64_t tile = row_tiles.begin + t / heads.size();
      const Range rows{tile * kQueryTile, std::min((tile + 1) * kQueryTile, num_rows)};
      walk.pass(heads.begin + t % heads.size(), rows);
    }
  }
};

// How the work is cut among threads. Axes that dbias is summed over stay in one hand.
struct Division {
  int64_t batch_run = 1, head_run = 1;  // batch entries and key heads of one task
  int64_t shares = 1;                   // of the rows, where threads walk together
  bool heads_together = false;          // heads that share a key head, in one share

  template <typename T>
  Division(const Attention<T>& a, const BiasView<T*>& dbias, int64_t threads) {
    bool rows_together = false;
    if (dbias.data != nullptr) {
      rows_together = dbias.query_stride == 0;
      heads_together = dbias.head_stride == 0;
      if (dbias.batch_stride == 0) batch_run = a.B;
      if (heads_together) head_run = a.G;
    }
    const int64_t tasks = a.B / batch_run * (a.G / head_run);
    constexpr int64_t kEnough = 4;
    const bool balances = tasks % threads == 0 || tasks >= kEnough * threads;
    if (!balances && !rows_together) shares = threads;
  }

  Range share(int64_t index, const Passage& passage) const {
    const int64_t unit = heads_together ? passage.heads.size() : 1;
    const int64_t units = passage.count() / unit;
    return {units * index / shares * unit, units * (index + 1) / shares * unit};
  }
};

// A walk for each worker, and the memory they share out.
template <typename T>
class Team {
 public:
  Team(const Attention<T>& a, const AttentionGradients<T>& grads, int64_t workers)
      : scratch_(workers, workspace_size(a, grads)) {
    workspaces_.reserve(static_cast<size_t>(workers));
    for (int64_t worker = 0; worker < workers; ++worker) {
      Carver carver(scratch_.of(worker));
      workspaces_.emplace_back(a, grads.dbias.data != nullptr, carver);
      walks_.emplace_back(a, grads, kernels<T>(a.q.dtype), workspaces_.back());
    }
  }

  Walk<T>& operator[](int64_t worker) { return walks_[static_cast<size_t>(worker)]; }

 private:
  static int64_t workspace_size(const Attention<T>& a, const AttentionGradients<T>& grads) {
    Carver measure(nullptr);
    Workspace<T>(a, grads.dbias.data != nullptr, measure);
    return measure.used();
  }

  Scratch scratch_;
  std::vector<Workspace<T>> workspaces_;
  std::vector<Walk<T>> walks_;
};

// Calls visit(keys, passage) for every run of keys that a walk holds and some row sees.
template <typename T, typename Visit>
void for_each_hold(const Attention<T>& a, int64_t g, Visit&& visit) {
  for (int64_t begin = 0; begin < a.Lk; begin += kKeysHeld) {
    const Range keys{begin, std::min(begin + kKeysHeld, a.Lk)};
    const Passage passage(a, g, keys);
    if (passage.count() > 0) visit(keys, passage);
  }
}

// Each walk on its own, over all keys of whole heads.
template <typename T>
void walk_apart(const Attention<T>& a, const AttentionGradients<T>& grads, const Division& division,
                const ParallelFor& parallel) {
  const int64_t head_tasks = a.G / division.head_run;
  const int64_t tasks = a.B / division.batch_run * head_tasks;
  Team<T> team(a, grads, parallel.workers_for(tasks));
  parallel.for_each_task(tasks, [&](int64_t worker, int64_t task) {
    const int64_t b0 = task / head_tasks * division.batch_run;
    const int64_t g0 = task % head_tasks * division.head_run;
    for (int64_t b = b0; b < b0 + division.batch_run; ++b) {
      for (int64_t g = g0; g < g0 + division.head_run; ++g) {
        for_each_hold(a, g, [&](Range keys, const Passage& passage) {
          team[worker].hold(b, g, keys);
          passage.let_pass({0, passage.count()}, team[worker]);
          team[worker].add_key_gradients();
        });
      }
    }
  });
}

// All walks over the same keys, each past its share of the rows.
template <typename T>
void walk_together(const Attention<T>& a, const AttentionGradients<T>& grads,
                   const Division& division, const ParallelFor& parallel) {
  Team<T> team(a, grads, division.shares);
  for (int64_t head = 0; head < a.B * a.G; ++head) {
    const int64_t b = head / a.G, g = head % a.G;
    for_each_hold(a, g, [&](Range keys, const Passage& passage) {
      parallel.for_each_task(division.shares, [&](int64_t, int64_t share) {
        team[share].hold(b, g, keys);
        passage.let_pass(division.share(share, passage), team[share]);
      });
      for (int64_t share = 0; share < division.shares; ++share) team[share].add_key_gradients();
    });
  }
}

}  // namespace

template <typename T>
void attention_backward(const Attention<T>& a, const AttentionGradients<T>& grads,
                        const ParallelFor& parallel) {
  if (a.B == 0 || a.H == 0 || a.Lq == 0 || a.Lk == 0) return;
  const Division division(a, grads.dbias, parallel.num_threads);
  (division.shares == 1 ? walk_apart<T> : walk_together<T>)(a, grads, division, parallel);
}

template void attention_backward(const Attention<float>&, const AttentionGradients<float>&,
                                 const ParallelFor&);
template void attention_backward(const Attention<double>&, const AttentionGradients<double>&,
                                 const ParallelFor&);

}  // namespace usp::cpu
