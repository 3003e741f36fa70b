#pragma once

// A run of keys of one key head, and the tiles of query rows that pass it: all their gradients.

#include "cpu/attention.h"
#include "cpu/lookahead.h"
#include "cpu/tiles.h"

namespace usp::cpu {

inline constexpr int64_t kKeysHeld = kTilesHeld * kKeyTile;

template <typename T>
struct GradientWorkspace {
  Matrix<T> q_left, q;          // (rows, D)
  Matrix<T> dout_left, dout;    // (rows, Dv)
  QueryOperand<T> q_t, dout_t;  // (D, rows), (Dv, rows)
  Matrix<T> k_left, v_left;     // (keys held, D) (keys held, Dv)
  Matrix<T> k;                  // (keys held, D)
  Matrix<T> dq;                 // (rows, D)
  Matrix<T> dk, dv;             // (keys held, D) (keys held, Dv)
  T *s, *dp;                    // (keys, rows)
  T* operands[3];               // (keys, rows), see GradientOperands
  T* derivative;                // (keys, rows), softcap only
  T* multiplier;                // (keys, rows), dropout only
  T* ds;                        // (keys, rows), with a gradient of the bias only
  T *lse, *delta;               // (rows,)
  QueryPositions positions;

  GradientWorkspace(const Attention<T>& a, bool with_dbias, Carver& carver) {
    const auto matrix = [&](int64_t rows, int64_t ld) {
      return Matrix<T>{carver.take<T>(rows * ld), ld};
    };
    constexpr int64_t kTile = kKeyTile * kQueryTile;
    q_left = matrix(kQueryTile, padded(a.D));
    q = matrix(kQueryTile, padded(a.D));
    q_t.transposed = matrix(a.D, kQueryTile);
    dout_left = matrix(kQueryTile, padded(a.Dv));
    dout = matrix(kQueryTile, padded(a.Dv));
    dout_t.transposed = matrix(a.Dv, kQueryTile);
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
class GradientWalk {
 public:
  GradientWalk(const Attention<T>& a, const AttentionGradients<T>& grads, const Kernels<T>& kernels,
               GradientWorkspace<T>& w)
      : a_(a), grads_(grads), kernels_(kernels), w_(w), overwrite_(grads.results.dq != nullptr) {}

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

  // What the next calls will read.
  void expect_keys(int64_t b, int64_t g, Range keys) {
    ahead_.add(a_.k, b, g, keys, a_.D);
    ahead_.add(a_.v, b, g, keys, a_.Dv);
  }

  void expect_queries(int64_t b, int64_t h, Range rows) {
    ahead_.add(a_.q, b, h, rows, a_.D);
    ahead_.add(grads_.dout, b, h, rows, a_.Dv);
  }

  // A tile of query rows past the keys held: all their gradients but what put_key_gradients puts.
  void pass(int64_t h, Range rows) {
    const bool first = overwrite_ && keys_.begin == 0;  // of these rows' passes
    const bool sees = sees_some_held(rows);
    if (sees || first) {
      set_zero(w_.dq, rows.size());
      if (sees) add_tiles(h, rows);
      const int64_t row = (b_ * a_.Lq + rows.begin) * a_.H + h;
      const auto& results = grads_.results;
      put(w_.dq, rows.size(), a_.D, scale(), !first,
          place(grads_.dq, results.dq, results.dq_dtype, row * a_.D, a_.H * a_.D));
    }
    ahead_.forget();
  }

  void take_key_gradients_of(const GradientWalk& other) {
    const auto take = [&](Matrix<T> from, int64_t cols, Matrix<T> to) {
      kernels_.add_rows(as_const(from), keys_.size(), cols, T(1), to.data, to.ld);
    };
    take(other.w_.dk, a_.D, w_.dk);
    take(other.w_.dv, a_.Dv, w_.dv);
  }

  void put_key_gradients() {
    const int64_t row = (b_ * a_.Lk + keys_.begin) * a_.G + g_;
    const auto& [dq, dk, dv, dq_dtype, dtype] = grads_.results;
    put(w_.dk, keys_.size(), a_.D, scale(), !overwrite_,
        place(grads_.dk, dk, dtype, row * a_.D, a_.G * a_.D));
    put(w_.dv, keys_.size(), a_.Dv, T(1), !overwrite_,
        place(grads_.dv, dv, dtype, row * a_.Dv, a_.G * a_.Dv));
  }

 private:
  // Rows of a gradient.
  struct Place {
    void* data;
    DType dtype;
    int64_t stride;
  };

  // In the result where there is one, else in the sum.
  Place place(T* sum, void* result, DType dtype, int64_t offset, int64_t stride) const {
    if (!overwrite_) return {sum + offset, kDType<T>, stride};
    return {static_cast<char*>(result) + offset * element_size(dtype), dtype, stride};
  }

  void put(Matrix<T> sum, int64_t rows, int64_t cols, T scale, bool add, Place to) {
    if (add) {
      kernels_.add_rows(as_const(sum), rows, cols, scale, static_cast<T*>(to.data), to.stride);
    } else {
      kernels_.store_rows(as_const(sum), rows, cols, scale, nullptr, to.dtype, to.data, to.stride);
    }
  }

  bool sees_some_held(Range rows) const {
    for (int64_t band = 0; band < a_.num_bands; ++band) {
      if (!intersect(visible_keys(a_.band(band), rows), keys_).empty()) return true;
    }
    return false;
  }

  void add_tiles(int64_t h, Range rows) {
    load_queries(h, rows);
    for (int64_t band = 0; band < a_.num_bands; ++band) add_tiles_of(a_.band(band), h, rows);
  }

  void add_tiles_of(const Span& span, int64_t h, Range rows) {
    const int64_t end = intersect(visible_keys(span, rows), keys_).end;
    for (int64_t begin = keys_.begin; begin < end; begin += kKeyTile) {
      const Range keys = intersect({begin, begin + kKeyTile}, keys_);
      for_each_part(span, rows, keys, kernels_.word, [&](Range some, Range seen, const Span* mask) {
        add_part({b_, h, some, seen, mask}, rows);
      });
    }
  }

  // A tile of the queries, or a strip of it.
  void add_part(const TileIndex& at, Range rows) {
    const int64_t num_rows = at.rows.size(), num_keys = at.keys.size();
    const int64_t row = at.rows.begin - rows.begin, skipped = at.keys.begin - keys_.begin;
    const auto gradients = compute_gradients(at, row, {k_.data + skipped * k_.ld, k_.ld},
                                             {v_.data + skipped * v_.ld, v_.ld});
    const auto from = [](Matrix<T> m, int64_t first) {
      return Matrix<T>{m.data + first * m.ld, m.ld};
    };
    const int64_t word = row / kernels_.word;
    add_product(num_keys, num_rows, gradients.weights_by_key, as_const(from(w_.dout, word)),
                from(w_.dv, skipped));
    add_product(num_keys, num_rows, gradients.scores_by_key, as_const(from(w_.q, word)),
                from(w_.dk, skipped));
    add_product(num_rows, num_keys, gradients.scores_by_query,
                as_const(from(w_.k, skipped / kernels_.word)), from(w_.dq, row));
  }

  void add_product(int64_t m, int64_t k, Matrix<const T> left, Matrix<const T> right,
                   Matrix<T> sum) {
    kernels_.gemm(m, sum.ld, k, left, right, sum, {T(1), true});
    ahead_.advance();
  }

  GradientOperands<T> compute_gradients(const TileIndex& at, int64_t row, Matrix<const T> k,
                                        Matrix<const T> v) {
    const Tile<T> s{w_.s, at.keys.size(), padded(at.rows.size())}, dp{w_.dp, s.keys, s.queries};
    const QueryPositions positions = w_.positions.from(row);
    compute_scores<T>(a_, kernels_, at, k, w_.q_t.from(row), positions, s, w_.derivative);
    ahead_.advance();
    w_.dout_t.from(row).multiply(kernels_, at.rows.size(), a_.Dv, v, dp, T(1));
    if (a_.dropout_p > 0) {
      dropout_multiplier<T>(a_, kernels_, at, positions, {w_.multiplier, s.keys, s.queries});
    }
    const auto [weights, by_key, by_query] = w_.operands;
    const auto operands = kernels_.gradients({s,
                                              dp,
                                              w_.lse + row,
                                              w_.delta + row,
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
    const auto q = left_rows(kernels_, a_.q, b_, h, rows, a_.D, w_.q_left);
    const auto dout = left_rows(kernels_, grads_.dout, b_, h, rows, a_.Dv, w_.dout_left);
    w_.q_t.set(kernels_, q, num_rows, a_.D);
    w_.dout_t.set(kernels_, dout, num_rows, a_.Dv);
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
  GradientWorkspace<T>& w_;
  const bool overwrite_;
  int64_t b_ = 0, g_ = 0;
  Range keys_;
  Matrix<const T> k_, v_;  // left operands
  Lookahead ahead_;
};

}  // namespace usp::cpu
