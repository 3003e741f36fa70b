#pragma once

// Tiles of keys of one key head, and the tiles of query rows that pass them: all their gradients.

#include <initializer_list>
#include <utility>
#include <vector>

#include "cpu/attention.h"
#include "cpu/gradient_workspace.h"

namespace usp::cpu {

template <typename T>
class GradientWalk {
 public:
  GradientWalk(const Attention<T>& a, const AttentionGradients<T>& grads, const Kernels<T>& kernels,
               GradientWorkspace<T>& w, Places places)
      : a_(a),
        grads_(grads),
        kernels_(kernels),
        w_(w),
        places_(places),
        operands_(static_cast<size_t>(places.count)),
        overwrite_(grads.results.dq != nullptr) {}

  void enter(int64_t b, int64_t g) {
    b_ = b;
    g_ = g;
  }

  // Takes tiles of keys in.
  void hold(Range keys) {
    for_each_tile(keys, [&](Range tile, int64_t row) {
      auto& [k, v] = operands_[static_cast<size_t>(row / kKeyTile)];
      weighted_rows(kernels_, a_.k, b_, g_, tile, a_.D, weighted_keys(row));
      k = left_of(weighted_keys(row), a_.k, g_, tile, a_.D, rows_from(w_.k_left, row));
      v = left_rows(kernels_, a_.v, b_, g_, tile, a_.Dv, rows_from(w_.v_left, row));
      set_zero(rows_from(w_.dk, row), tile.size(), w_.dk.ld);
      set_zero(rows_from(w_.dv, row), tile.size(), w_.dv.ld);
    });
  }

  // What the next calls will read, and where they will write.
  void expect_keys(int64_t b, int64_t g, Range keys) {
    expect(a_.k, b, g, keys, a_.D);
    expect(a_.v, b, g, keys, a_.Dv);
  }

  void expect_queries(int64_t b, int64_t h, Range rows) {
    expect(a_.q, b, h, rows, a_.D);
    expect(grads_.dout, b, h, rows, a_.Dv);
    expect(of_queries(b, h, rows), rows, a_.D);
  }

  void expect_key_gradients(Range keys) {
    if (keys.empty()) return;
    expect(of_keys(keys), keys, a_.D);
    expect(of_values(keys), keys, a_.Dv);
  }

  // A tile of query rows past some of the keys held: all their gradients but what
  // put_key_gradients puts. Their gradients are added to those of earlier passes, but for the
  // first where they are written over.
  void pass(int64_t h, Range rows, Range keys, bool first) { pass(h, rows, {0, 0}, keys, first); }

  void pass(int64_t h, Range rows, Range pinned, Range keys, bool first) {
    first &= overwrite_;
    const int64_t tiles = tiles_seen(rows, pinned) + tiles_seen(rows, keys);
    if (tiles > 0 || first) {
      set_zero(w_.dq, rows.size(), padded(a_.D));
      if (tiles > 0) {
        ahead_.spread(tiles * turns(rows.size(), kKeyTile));
        add_tiles(h, rows, {pinned, keys}, w_.dq);
      }
      put_queries(h, rows, w_.dq, !first);
    }
    ahead_.forget();
  }

  // The wide tile, which passes some keys after the other: its dq, of all its heads, is summed in
  // memory of its own.
  void begin_wide() {
    for (int64_t h = 0; h < heads().size(); ++h) set_zero(wide_dq(h), kQueryTile, padded(a_.D));
  }

  void pass_wide(Range rows, Range keys) {
    if (rows.empty() || tiles_seen(rows, keys) == 0) return;
    const Range heads = this->heads();
    for (int64_t h = heads.begin; h < heads.end; ++h) {
      add_tiles(h, rows, {keys}, wide_dq(h - heads.begin));
    }
  }

  void put_wide(Range rows) {
    const Range heads = this->heads();
    for (int64_t h = heads.begin; h < heads.end; ++h) {
      put_queries(h, rows, wide_dq(h - heads.begin), !overwrite_);
    }
  }

  void take_key_gradients_of(const GradientWalk& other, Range keys) {
    for_each_tile(keys, [&](Range tile, int64_t row) {
      const auto take = [&](Matrix<T> from, int64_t cols, Matrix<T> to) {
        kernels_.add_rows(as_const(rows_from(from, row)), tile.size(), cols, T(1),
                          rows_from(to, row).data, to.ld);
      };
      take(other.w_.dk, a_.D, w_.dk);
      take(other.w_.dv, a_.Dv, w_.dv);
    });
  }

  void put_key_gradients(Range keys) {
    for_each_tile(keys, [&](Range tile, int64_t row) {
      put(as_const(rows_from(w_.dk, row)), tile, a_.D, scale(), !overwrite_, of_keys(tile));
      put(as_const(rows_from(w_.dv, row)), tile, a_.Dv, T(1), !overwrite_, of_values(tile));
    });
  }

 private:
  Range heads() const { return a_.query_heads(g_); }

  Matrix<T> wide_dq(int64_t head) const {
    return by_query_sums(kernels_, w_.wide_dq + head * kQueryTile * padded(a_.D), kQueryTile,
                         padded(a_.D));
  }

  // Rows of a gradient: in the result where there is one, else in the sum.
  struct Place {
    void* data;
    DType dtype;
    int64_t stride;
  };

  Place of_queries(int64_t b, int64_t h, Range rows) const {
    const auto& results = grads_.results;
    const int64_t row = (b * a_.Lq + rows.begin) * a_.H + h;
    return place(grads_.dq, results.dq, results.dq_dtype, row * a_.D, a_.H * a_.D);
  }

  Place of_keys(Range keys) const {
    const auto& results = grads_.results;
    return place(grads_.dk, results.dk, results.kv_dtype, key_row(keys) * a_.D, a_.G * a_.D);
  }

  Place of_values(Range keys) const {
    const auto& results = grads_.results;
    return place(grads_.dv, results.dv, results.kv_dtype, key_row(keys) * a_.Dv, a_.G * a_.Dv);
  }

  int64_t key_row(Range keys) const { return (b_ * a_.Lk + keys.begin) * a_.G + g_; }

  Place place(T* sum, void* result, DType dtype, int64_t offset, int64_t stride) const {
    if (!overwrite_) return {sum + offset, kDType<T>, stride};
    return {static_cast<char*>(result) + offset * element_size(dtype), dtype, stride};
  }

  void expect(const TensorView& x, int64_t b, int64_t h, Range rows, int64_t cols) {
    cpu::expect(ahead_, x, b, h, rows, cols);
  }

  void expect(Place at, Range rows, int64_t cols) {
    const int64_t size = element_size(at.dtype);
    ahead_.add(at.data, at.stride * size, rows.size(), cols * size);
  }

  void put_queries(int64_t h, Range rows, Matrix<T> sums, bool add) {
    const auto dq = as_rows(kernels_, sums, rows.size(), a_.D, w_.q_left.data);
    put(dq, rows, a_.D, scale(), add, of_queries(b_, h, rows));
  }

  void put(Matrix<const T> sum, Range rows, int64_t cols, T scale, bool add, Place to) {
    if (add) {
      kernels_.add_rows(sum, rows.size(), cols, scale, static_cast<T*>(to.data), to.stride);
    } else {
      kernels_.store_rows(sum, rows.size(), cols, scale, nullptr, to.dtype, to.data, to.stride);
    }
  }

  // The keys of a tile, held from row `tile` on, as the product for dq takes them.
  Matrix<T> weighted_keys(int64_t tile) const {
    return by_query_sums(kernels_, w_.k.data + kernels_.in_words(tile) * w_.k.ld,
                         kernels_.in_words(kKeyTile), w_.k.ld);
  }

  // Calls visit(tile, row) for each tile of keys, with the row of its first in the memory.
  template <typename Visit>
  void for_each_tile(Range keys, Visit&& visit) const {
    for (int64_t begin = keys.begin; begin < keys.end; begin += kKeyTile) {
      visit(intersect({begin, begin + kKeyTile}, keys), places_.of(begin / kKeyTile) * kKeyTile);
    }
  }

  // Of the keys, once a band.
  int64_t tiles_seen(Range rows, Range keys) const {
    int64_t tiles = 0;
    for (int64_t band = 0; band < a_.num_bands; ++band) {
      const Range seen = intersect(visible_keys(a_.band(band), rows), keys);
      if (!seen.empty()) tiles += (seen.end - 1) / kKeyTile - seen.begin / kKeyTile + 1;
    }
    return tiles;
  }

  // A tile of query rows past keys held, with its gradient added to `dq`.
  void add_tiles(int64_t h, Range rows, std::initializer_list<Range> runs, Matrix<T> dq) {
    const Products<T> products(kernels_);
    load_queries(h, rows);
    dq_ = dq;
    for (Range keys : runs) add_tiles(h, rows, keys);
  }

  void add_tiles(int64_t h, Range rows, Range keys) {
    for (int64_t band = 0; band < a_.num_bands; ++band) {
      const Span span = a_.band(band);
      const Range seen = intersect(visible_keys(span, rows), keys);
      if (seen.empty()) continue;
      for_each_tile({seen.begin / kKeyTile * kKeyTile, seen.end}, [&](Range tile, int64_t row) {
        with_seen(span, {b_, h, rows}, tile, kernels_.word, Cut::kRows, cut_,
                  [&](const TileIndex& at) { add_seen(at, row, at.keys.begin - tile.begin); });
      });
    }
  }

  // How often ahead_ is asked in a tile, about.
  int64_t turns(int64_t rows, int64_t keys) const {
    return 2 * QueryOperand<T>::turns(kernels_, rows, keys) + kernels_.blocks(keys, a_.D) +
           kernels_.blocks(keys, a_.Dv) + kernels_.blocks(rows, a_.D);
  }

  // Keys that lie `skipped` behind the first of a tile held.
  void add_seen(const TileIndex& at, int64_t tile, int64_t skipped) {
    const auto& [k, v] = operands_[static_cast<size_t>(tile / kKeyTile)];
    const auto gradients = compute_gradients(at, rows_from(k, skipped), rows_from(v, skipped));
    at.for_each_block([&](const Strip& block) {
      const auto [columns, rows, keys] = block;
      const int64_t key = tile + skipped + keys.begin, row = kernels_.in_words(columns.begin);
      const auto add = [&](Matrix<const T> left, int64_t cols, Matrix<T> right, Matrix<T> sum) {
        left.data += keys.begin * left.ld + row;
        add_product(keys.size(), cols, rows.end - columns.begin, left, rows_from(right, row),
                    rows_from(sum, key));
      };
      add(gradients.weights_by_key, a_.Dv, w_.dout, w_.dv);
      add(gradients.scores_by_key, a_.D, w_.q, w_.dk);
    });
    at.for_each_run(kernels_, [&](Range rows, Range keys) {
      add_product(rows.size(), a_.D, keys.size(),
                  at.by_query(kernels_, gradients.scores_by_query, rows, keys),
                  rows_from(weighted_keys(tile), kernels_.in_words(skipped + keys.begin)),
                  rows_from(dq_, rows.begin));
    });
  }

  void add_product(int64_t m, int64_t n, int64_t k, Matrix<const T> left, Matrix<T> right,
                   Matrix<T> sum) {
    kernels_.gemm({m, padded(n), k, left, as_const(right), sum, {T(1), true, nullptr, &ahead_}});
  }

  GradientOperands<T> compute_gradients(const TileIndex& at, Matrix<const T> k, Matrix<const T> v) {
    const Tile<T> s = score_tile(a_, kernels_, at, w_.s), dp{w_.dp, s.keys, s.queries, T(1), s.cut};
    compute_scores<T>(a_, kernels_, at, k, w_.q_t, w_.positions, s, w_.derivative, ahead_);
    w_.dout_t.multiply(kernels_, at, a_.Dv, v, dp.data, T(1), ahead_);
    if (a_.dropout_p > 0) {
      dropout_multiplier<T>(a_, kernels_, at, w_.positions, {w_.multiplier, s.keys, s.queries});
    }
    if (w_.ds != nullptr && at.mask != nullptr) {  // dbias takes all of it
      std::fill(w_.ds, w_.ds + s.keys * s.queries, T(0));
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
    right_rows(kernels_, a_.q, b_, h, rows, a_.D, w_.q);
    right_rows(kernels_, grads_.dout, b_, h, rows, a_.Dv, w_.dout);
    const auto q = left_of(w_.q, a_.q, h, rows, a_.D, w_.q_left);
    const auto dout = left_of(w_.dout, grads_.dout, h, rows, a_.Dv, w_.dout_left);
    w_.q_t.set(kernels_, q, num_rows, a_.D, true);
    w_.dout_t.set(kernels_, dout, num_rows, a_.Dv, true);
    for (int64_t i = 0; i < padded(num_rows); ++i) {
      const bool exists = i < num_rows;
      w_.lse[i] = backward_lse(exists ? grads_.lse[row_of_lse + i] : minus_infinity<T>());
      w_.delta[i] = exists ? grads_.delta[row_of_lse + i] : T(0);
    }
    w_.positions.load(a_, rows);
  }

  // Rows as left operand that were loaded as right one: that one, where words are elements. Both
  // are read often, and caches should hold but one of them.
  Matrix<const T> left_of(Matrix<T> right, const TensorView& x, int64_t h, Range rows, int64_t cols,
                          Matrix<T> room) const {
    return kernels_.word == 1 ? as_const(right) : left_rows(kernels_, x, b_, h, rows, cols, room);
  }

  T scale() const { return static_cast<T>(a_.softmax_scale); }

  const Attention<T>& a_;
  const AttentionGradients<T>& grads_;
  const Kernels<T>& kernels_;
  GradientWorkspace<T>& w_;
  const Places places_;
  std::vector<std::pair<Matrix<const T>, Matrix<const T>>> operands_;  // keys and values, left
  const bool overwrite_;
  Cut cut_;
  Matrix<T> dq_{};  // of the rows that pass
  int64_t b_ = 0, g_ = 0;
  Lookahead ahead_;
};

}  // namespace usp::cpu
