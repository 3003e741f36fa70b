// Gradients of one block, from the final lse and delta.
//
//   P^T  = exp(S^T - lse)                (keys, rows)
//   dS^T = P^T * ((V dO^T) * m - delta)  m: dropout's multiplier; dbias += dS
//   dS^T = dS^T * d softcap / dx
//   dV += (P^T * m) dO,  dK += scale dS^T Q,  dQ += scale dS K
//
// The key-major pass gives dK, dV and dbias: a task owns a tile of keys of one key head, walks the
// rows that see it, and is the only one to write its gradients. dQ would have many writers there.
// Where there are enough heads to go round, a task takes all key tiles of its head and so owns dQ
// too; else a query-major pass computes the scores once more. No atomics either way.
//
// Source: Dao 2023, arXiv:2307.08691, algorithm 2.

#include "attention.h"
#include "tiles.h"

namespace usp::cpu {
namespace {

template <typename T>
struct Workspace {
  Matrix<T> q, q_t;        // (rows, D) (D, rows)
  Matrix<T> dout, dout_t;  // (rows, Dv) (Dv, rows)
  Matrix<T> k, v;          // (keys, D) (keys, Dv)
  Matrix<T> dq;            // (rows, D)
  Matrix<T> dk, dv;        // (keys, D) (keys, Dv)
  // In words along a column, where that differs: as right operands.
  Matrix<T> q_room, dout_room, k_room;
  Matrix<const T> q_words, dout_words, k_words;
  T *p, *ds;       // (keys, rows)
  T* left;         // one of them as left operand
  T* derivative;   // (keys, rows), softcap only
  T* multiplier;   // (keys, rows), dropout only
  T *lse, *delta;  // (rows,)
  QueryPositions positions;

  Workspace(const Attention<T>& a, Carver& carver) {
    const auto matrix = [&](int64_t rows, int64_t ld) {
      return Matrix<T>{carver.take<T>(rows * ld), ld};
    };
    constexpr int64_t kTile = kKeyTile * kQueryTile;
    q = matrix(kQueryTile, padded(a.D));
    q_t = matrix(a.D, kQueryTile);
    dout = matrix(kQueryTile, padded(a.Dv));
    dout_t = matrix(a.Dv, kQueryTile);
    k = matrix(kKeyTile, padded(a.D));
    v = matrix(kKeyTile, padded(a.Dv));
    dq = matrix(kQueryTile, padded(a.D));
    dk = matrix(kKeyTile, padded(a.D));
    dv = matrix(kKeyTile, padded(a.Dv));
    q_room = matrix(kQueryTile, padded(a.D));
    dout_room = matrix(kQueryTile, padded(a.Dv));
    k_room = matrix(kKeyTile, padded(a.D));
    p = carver.take<T>(kTile);
    ds = carver.take<T>(kTile);
    left = carver.take<T>(kTile);
    derivative = a.softcap > 0 ? carver.take<T>(kTile) : nullptr;
    multiplier = a.dropout_p > 0 ? carver.take<T>(kTile) : nullptr;
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
class BackwardTask {
 public:
  BackwardTask(const Attention<T>& a, const AttentionGradients<T>& grads, const Kernels<T>& kernels,
               Workspace<T>& w)
      : a_(a), grads_(grads), kernels_(kernels), w_(w) {}

  // dq of a tile of rows, over all keys they see.
  void query_major(int64_t b, int64_t h, Range rows) {
    const Range visible = visible_keys(a_.span, rows);
    if (visible.empty()) return;
    load_queries(b, h, rows);
    set_zero(w_.dq, rows.size());
    for_each_tile(visible, unmasked_keys(a_.span, rows), kKeyTile, [&](Range keys, bool masked) {
      const TileIndex at{b, h, rows, keys, masked};
      if (masked && !sees_any(a_.span, rows, keys)) return;
      load_keys(b, a_.key_head(h), keys);
      const Tile<T> ds = score_gradients(at, false);
      add_product(rows.size(), keys.size(), kernels_.tile_by_query(ds, w_.left), w_.k_words, w_.dq);
    });
    add_dq(b, h, rows);
  }

  // dk, dv and dbias of a tile of keys over all rows that see them, and these rows' share of dq.
  void key_major(int64_t b, int64_t g, Range keys, bool with_dq) {
    const Range visible = visible_queries(a_.span, keys);
    if (visible.empty()) return;
    const Range unmasked = unmasked_queries(a_.span, keys);
    load_keys(b, g, keys);
    set_zero(w_.dk, keys.size());
    set_zero(w_.dv, keys.size());
    const Range heads = a_.query_heads(g);
    for (int64_t h = heads.begin; h < heads.end; ++h) {
      for_each_tile(visible, unmasked, kQueryTile, [&](Range rows, bool masked) {
        if (masked && !sees_any(a_.span, rows, keys)) return;
        add_queries({b, h, rows, keys, masked}, with_dq);
      });
    }
    T* dk = grads_.dk + ((b * a_.Lk + keys.begin) * a_.G + g) * a_.D;
    T* dv = grads_.dv + ((b * a_.Lk + keys.begin) * a_.G + g) * a_.Dv;
    kernels_.add_rows(as_const(w_.dk), keys.size(), a_.D, scale(), dk, a_.G * a_.D);
    kernels_.add_rows(as_const(w_.dv), keys.size(), a_.Dv, T(1), dv, a_.G * a_.Dv);
  }

 private:
  void add_queries(const TileIndex& at, bool with_dq) {
    const int64_t num_rows = at.rows.size(), num_keys = at.keys.size();
    load_queries(at.b, at.h, at.rows);
    const Tile<T> ds = score_gradients(at, grads_.dbias.data != nullptr);
    const Tile<T> p{w_.p, ds.keys, ds.queries};
    add_product(num_keys, num_rows, kernels_.tile_by_key(p, w_.left), w_.dout_words, w_.dv);
    add_product(num_keys, num_rows, kernels_.tile_by_key(ds, w_.left), w_.q_words, w_.dk);
    if (!with_dq) return;
    set_zero(w_.dq, num_rows);
    add_product(num_rows, num_keys, kernels_.tile_by_query(ds, w_.left), w_.k_words, w_.dq);
    add_dq(at.b, at.h, at.rows);
  }

  void add_product(int64_t m, int64_t k, Matrix<const T> left, Matrix<const T> right,
                   Matrix<T> sum) {
    kernels_.gemm(m, sum.ld, k, left, right, sum, T(1), true);
  }

  // Leaves P * m in w.p and returns dS, ready for its products with Q and K.
  Tile<T> score_gradients(const TileIndex& at, bool with_dbias) {
    const Tile<T> p{w_.p, at.keys.size(), padded(at.rows.size())};
    const Tile<T> ds{w_.ds, p.keys, p.queries};
    compute_scores<T>(a_, kernels_, at, as_const(w_.k), as_const(w_.q_t), w_.positions, p,
                      w_.derivative);
    kernels_.probabilities(p, w_.lse);
    kernels_.gemm(ds.keys, ds.queries, a_.Dv, as_const(w_.v), as_const(w_.dout_t),
                  {ds.data, ds.queries}, T(1), false);
    if (a_.dropout_p > 0) {
      dropout_multiplier<T>(a_, kernels_, at, w_.positions, {w_.multiplier, p.keys, p.queries});
      kernels_.multiply(ds, w_.multiplier);
    }
    kernels_.score_gradient(ds, p.data, w_.delta);
    if (a_.dropout_p > 0) kernels_.multiply(p, w_.multiplier);
    if (with_dbias) {
      const auto& dbias = grads_.dbias;
      kernels_.add_bias_gradient(ds, at.rows.size(),
                                 dbias.at(at.b, at.h, at.rows.begin, at.keys.begin),
                                 dbias.query_stride, dbias.key_stride);
    }
    if (a_.softcap > 0) kernels_.multiply(ds, w_.derivative);
    return ds;
  }

  void load_queries(int64_t b, int64_t h, Range rows) {
    const int64_t num_rows = rows.size(), row_of_lse = (b * a_.H + h) * a_.Lq + rows.begin;
    w_.q_t.ld = w_.dout_t.ld = padded(num_rows);
    load_rows(kernels_, a_.q, b, h, rows, a_.D, w_.q);
    load_rows(kernels_, grads_.dout, b, h, rows, a_.Dv, w_.dout);
    kernels_.transpose(as_const(w_.q), num_rows, a_.D, w_.q_t);
    kernels_.transpose(as_const(w_.dout), num_rows, a_.Dv, w_.dout_t);
    w_.q_words = kernels_.by_row_words(as_const(w_.q), num_rows, a_.D, w_.q_room);
    w_.dout_words = kernels_.by_row_words(as_const(w_.dout), num_rows, a_.Dv, w_.dout_room);
    for (int64_t i = 0; i < padded(num_rows); ++i) {
      const bool exists = i < num_rows;
      w_.lse[i] = backward_lse(exists ? grads_.lse[row_of_lse + i] : minus_infinity<T>());
      w_.delta[i] = exists ? grads_.delta[row_of_lse + i] : T(0);
    }
    w_.positions.load(a_, rows);
  }

  void load_keys(int64_t b, int64_t g, Range keys) {
    load_rows(kernels_, a_.k, b, g, keys, a_.D, w_.k);
    load_rows(kernels_, a_.v, b, g, keys, a_.Dv, w_.v);
    w_.k_words = kernels_.by_row_words(as_const(w_.k), keys.size(), a_.D, w_.k_room);
  }

  void add_dq(int64_t b, int64_t h, Range rows) {
    T* dq = grads_.dq + ((b * a_.Lq + rows.begin) * a_.H + h) * a_.D;
    kernels_.add_rows(as_const(w_.dq), rows.size(), a_.D, scale(), dq, a_.H * a_.D);
  }

  T scale() const { return static_cast<T>(a_.softmax_scale); }

  const Attention<T>& a_;
  const AttentionGradients<T>& grads_;
  const Kernels<T>& kernels_;
  Workspace<T>& w_;
};

// How the key-major pass is cut into tasks. Axes that dbias is summed over stay whole inside one
// task, and so do the key tiles where the task owns dq.
struct KeyMajorTasks {
  int64_t batches, heads, tiles;          // tasks along each axis
  int64_t batch_run, head_run, tile_run;  // batch entries, key heads, key tiles of one task

  template <typename T>
  KeyMajorTasks(const Attention<T>& a, const AttentionGradients<T>& grads, bool with_dq) {
    const bool has_dbias = grads.dbias.data != nullptr;
    const int64_t key_tiles = (a.Lk + kKeyTile - 1) / kKeyTile;
    batch_run = has_dbias && grads.dbias.batch_stride == 0 ? a.B : 1;
    head_run = has_dbias && grads.dbias.head_stride == 0 ? a.G : 1;
    tile_run = with_dq ? key_tiles : 1;
    batches = a.B / batch_run;
    heads = a.G / head_run;
    tiles = key_tiles / tile_run;
  }

  int64_t count() const { return batches * heads * tiles; }

  // Calls visit(b, g, tile) for all that belongs to one task.
  template <typename Visit>
  void for_each(int64_t task, Visit&& visit) const {
    const int64_t tile = task % tiles, head = task / tiles % heads, batch = task / tiles / heads;
    for (int64_t b = batch * batch_run; b < (batch + 1) * batch_run; ++b) {
      for (int64_t g = head * head_run; g < (head + 1) * head_run; ++g) {
        for (int64_t t = tile * tile_run; t < (tile + 1) * tile_run; ++t) visit(b, g, t);
      }
    }
  }
};

// One pass over the scores where whole heads keep all threads busy.
bool balances(int64_t tasks, int64_t threads) {
  constexpr int64_t kEnough = 4;
  return tasks % threads == 0 || tasks >= kEnough * threads;
}

}  // namespace

template <typename T>
void attention_backward(const Attention<T>& a, const AttentionGradients<T>& grads,
                        const ParallelFor& parallel) {
  if (a.B == 0 || a.H == 0 || a.Lq == 0 || a.Lk == 0) return;
  const bool one_pass = balances(KeyMajorTasks(a, grads, true).count(), parallel.num_threads);
  const KeyMajorTasks key_major(a, grads, one_pass);
  const int64_t row_tiles = (a.Lq + kQueryTile - 1) / kQueryTile;
  const int64_t query_major_tasks = one_pass ? 0 : a.B * a.H * row_tiles;

  Carver measure(nullptr);
  Workspace<T>(a, measure);
  const int64_t tasks = std::max(key_major.count(), query_major_tasks);
  Scratch scratch(parallel.workers_for(tasks), measure.used());
  const Kernels<T>& table = kernels<T>(a.q.dtype);
  const auto with_task = [&](int64_t worker, auto&& body) {
    Carver carver(scratch.of(worker));
    Workspace<T> workspace(a, carver);
    body(BackwardTask<T>(a, grads, table, workspace));
  };

  parallel.for_each_task(key_major.count(), [&](int64_t worker, int64_t index) {
    with_task(worker, [&](BackwardTask<T> task) {
      key_major.for_each(index, [&](int64_t b, int64_t g, int64_t tile) {
        const Range keys = intersect({tile * kKeyTile, (tile + 1) * kKeyTile}, {0, a.Lk});
        task.key_major(b, g, keys, one_pass);
      });
    });
  });
  parallel.for_each_task(query_major_tasks, [&](int64_t worker, int64_t index) {
    with_task(worker, [&](BackwardTask<T> task) {
      const int64_t head = index / row_tiles, tile = row_tiles - 1 - index % row_tiles;
      const Range rows = intersect({tile * kQueryTile, (tile + 1) * kQueryTile}, {0, a.Lq});
      task.query_major(head / a.H, head % a.H, rows);
    });
  });
}

template void attention_backward(const Attention<float>&, const AttentionGradients<float>&,
                                 const ParallelFor&);
template void attention_backward(const Attention<double>&, const AttentionGradients<double>&,
                                 const ParallelFor&);

}  // namespace usp::cpu
