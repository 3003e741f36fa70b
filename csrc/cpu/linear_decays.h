#pragma once

// What decays between the tokens of a chunk of linear attention: nothing or a factor of all
// channels (HeadDecays), or a factor of each (ChannelDecays, by channels.h). Forward and backward
// are walks over either.
//
// Methods take rows of tokens of a chunk: queries are decayed since its start, keys up to its end.

#include "cpu/linear_chunk.h"

namespace usp::cpu {

// What a chunk sees of itself, backward.
template <typename T>
struct ChunkGradients {
  int64_t rows;
  Matrix<const T> q, k;
  Matrix<T> dq, dk;           // by states, when `of_states` reads them; are added to
  Matrix<T> scores, dscores;  // triangles; dscores is still without decays
};

// Two states and gradients as factors of each other, each (Dv, D).
template <typename T>
struct StatePair {
  Matrix<const T> before, gradient;
};

template <typename T>
class HeadDecays {
 public:
  void carve(Carver& carver, const LinearAttention<T>& a, bool backward) {
    channels_ = a.D;
    value_channels_ = a.Dv;
    between_ = {carver.take<T>(kChunk * kChunk), kChunk};
    since_start_ = carver.take<T>(kChunk);
    logs_ = carver.take<T>(kChunk);
    is_known_ = false;
    if (a.g.data == nullptr) since_start_ = nullptr;
    if (!backward) return;
    of_queries_ = carver.take<T>(kChunk);
    of_keys_ = carver.take<T>(kChunk);
    room_ = carver.take<T>(std::max(kChunk, a.Dv));
  }

  void load(const Kernels<T>& table, const LogDecays<T>& g, int64_t b, int64_t h, Range tokens) {
    if (is_known_) return;
    is_known_ = g.is_constant();
    if (g.data == nullptr) return table.decays_between(nullptr, kChunk, between_);
    const int64_t rows = is_known_ ? kChunk : tokens.size();
    const T* from = g.at(b, tokens.begin, h);
    for (int64_t i = 0; i < kChunk; ++i) logs_[i] = i < rows ? from[i * g.row_stride] : T(0);
    table.decays_between(logs_, rows, between_);
    table.decays_since_start(logs_, rows, since_start_);
  }

  Matrix<const T> since_start(const Kernels<T>& table, int64_t rows, Matrix<const T> m,
                              Matrix<T> room) const {
    return scaled(table, rows, m, since_start_, room);
  }
  Matrix<const T> to_end(const Kernels<T>& table, int64_t rows, Matrix<const T> m,
                         Matrix<T> room) const {
    return scaled(table, rows, m, of_end(rows), room);
  }
  void scale_since_start(const Kernels<T>& table, int64_t rows, Matrix<T> m) const {
    if (since_start_ != nullptr) table.scale_rows(m, rows, m.ld, since_start_);
  }
  void scale_to_end(const Kernels<T>& table, int64_t rows, Matrix<T> m) const {
    if (since_start_ != nullptr) table.scale_rows(m, rows, m.ld, of_end(rows));
  }

  // A state (D, Dv) by all of the chunk, or its transpose.
  void decay_state(const Kernels<T>&, int64_t rows, Matrix<T> state) const {
    scale(state, channels_, of_all(rows));
  }
  void decay_transposed(const Kernels<T>&, int64_t rows, Matrix<T> state) const {
    scale(state, value_channels_, of_all(rows));
  }

  void scores(const Kernels<T>& table, int64_t rows, Matrix<const T> q, Matrix<const T> k,
              Matrix<T> k_transposed, Matrix<T> scores) const {
    k_transposed.ld = padded(rows);
    table.right_transpose(k, rows, channels_, k_transposed);
    lower_product(table, rows, channels_, q, as_const(k_transposed), scores);
    table.multiply_lower(as_const(scores), as_const(between_), rows, scores);
  }

  // A token's decay is a factor of what those from it on see of what was before it: of earlier
  // tokens of the chunk, and of the state; and of what these leave behind the chunk.
  void of_states(const Kernels<T>& table, const ChunkGradients<T>& at, StatePair<T> states) {
    row_products(table, at.rows, at.q, at.dq, of_queries_);
    row_products(table, at.rows, at.k, at.dk, of_keys_);
    table.row_products(kDType<T>, states.before.data, states.before.ld, states.gradient.data,
                       states.gradient.ld, value_channels_, channels_, room_, 1);
    through_ = 0;
    for (int64_t e = 0; e < value_channels_; ++e) through_ += room_[e];
    through_ *= of_all(at.rows);
  }

  void within(const Kernels<T>& table, const ChunkGradients<T>& at, bool decays) {
    if (decays) {
      table.sums_across(as_const(at.scores), as_const(at.dscores), at.rows, logs_, room_);
    }
    table.multiply_lower(as_const(at.dscores), as_const(between_), at.rows, at.dscores);
    add_lower_times(table, at.rows, at.dq.ld, at.dscores, at.k, at.dq);
    add_upper_times(table, at.rows, at.dk.ld, at.dscores, at.q, at.dk);
  }

  // The gradient of the logs of the chunk's tokens; `to` (B, L, H).
  void store(const Kernels<T>&, const LinearAttention<T>& a, const HeadTask& at, Range tokens,
             T* to) const {
    to += (at.b * a.L + tokens.begin) * a.H + at.h;
    const int64_t rows = tokens.size();
    T behind = 0;
    for (int64_t i = rows - 1; i >= 0; --i) logs_[i] += behind += of_queries_[i];
    T before = through_;
    for (int64_t i = 0; i < rows; ++i) {
      to[i * a.H] = logs_[i] + before;
      before += of_keys_[i];
    }
  }

 private:
  // (rows,), of each token's update up to the end of the chunk; null where nothing decays.
  const T* of_end(int64_t rows) const {
    return since_start_ == nullptr ? nullptr : between_.data + (rows - 1) * between_.ld;
  }
  T of_all(int64_t rows) const { return since_start_ == nullptr ? T(1) : since_start_[rows - 1]; }

  static Matrix<const T> scaled(const Kernels<T>& table, int64_t rows, Matrix<const T> m,
                                const T* factor, Matrix<T> room) {
    if (factor == nullptr) return m;
    table.store_rows(m, rows, room.ld, T(1), factor, kDType<T>, room.data, room.ld);
    return as_const(room);
  }

  static void scale(Matrix<T> state, int64_t rows, T decay) {
    if (decay == T(1)) return;
    for (int64_t i = 0; i < rows * state.ld; ++i) state.data[i] *= decay;
  }

  void row_products(const Kernels<T>& table, int64_t rows, Matrix<const T> x, Matrix<T> dx,
                    T* result) const {
    table.row_products(kDType<T>, x.data, x.ld, dx.data, dx.ld, rows, channels_, result, 1);
  }

  int64_t channels_, value_channels_;
  Matrix<T> between_;  // a lower triangle
  T* since_start_;     // (rows,), of the state before the chunk; null where nothing decays
  T* logs_;
  bool is_known_;  // those of a whole chunk, the same for all of the head
  T *of_queries_, *of_keys_, *room_;
  T through_;
};

template <typename T>
class ChannelDecays {
 public:
  void carve(Carver& carver, const LinearAttention<T>& a, bool backward) {
    channels_ = a.D;
    value_channels_ = a.Dv;
    cols_ = padded(a.D);
    const auto take = [&](int64_t rows) { return Matrix<T>{carver.take<T>(rows * cols_), cols_}; };
    for (Matrix<T>* m : {&factors_.each, &factors_.since_start, &factors_.to_end})
      *m = take(kChunk);
    for (Matrix<T>* m : {&factors_.since_middle, &factors_.to_middle, &later_, &earlier_}) {
      *m = take(kPad);
    }
    if (!backward) return;
    later_gradient_ = take(kPad);
    earlier_gradient_ = take(kPad);
    gradient_ = take(kChunk);
    room_ = carver.take<T>(cols_);
  }

  void load(const Kernels<T>& table, const LogDecays<T>& g, int64_t b, int64_t h, Range tokens) {
    table.right_rows(kDType<T>, g.at(b, tokens.begin, h), g.row_stride, tokens.size(), channels_,
                     factors_.each);
    table.channel_decays(tokens.size(), cols_, factors_);
  }

  Matrix<const T> since_start(const Kernels<T>& table, int64_t rows, Matrix<const T> m,
                              Matrix<T> room) const {
    return product(table, rows, m, factors_.since_start, room);
  }
  Matrix<const T> to_end(const Kernels<T>& table, int64_t rows, Matrix<const T> m,
                         Matrix<T> room) const {
    return product(table, rows, m, factors_.to_end, room);
  }
  void scale_since_start(const Kernels<T>& table, int64_t rows, Matrix<T> m) const {
    product(table, rows, as_const(m), factors_.since_start, m);
  }
  void scale_to_end(const Kernels<T>& table, int64_t rows, Matrix<T> m) const {
    product(table, rows, as_const(m), factors_.to_end, m);
  }

  void decay_state(const Kernels<T>& table, int64_t rows, Matrix<T> state) const {
    table.scale_rows(state, channels_, state.ld, of_all(rows));
  }
  void decay_transposed(const Kernels<T>& table, int64_t rows, Matrix<T> state) const {
    table.multiply(as_const(state), {of_all(rows), 0}, value_channels_, cols_, state);
  }

  void scores(const Kernels<T>& table, int64_t rows, Matrix<const T> q, Matrix<const T> k,
              Matrix<T> k_transposed, Matrix<T> scores) const {
    for_each_half(rows, [&](int64_t first, int64_t count) {
      table.channel_scores(count, cols_, from_row(q, first), from_row(k, first),
                           as_const(from_row(factors_.each, first)), block(scores, first, first));
    });
    if (rows <= kPad) return;
    // the second half sees the first through the seam between them
    const auto [later, earlier] = across(table, rows, q, k);
    k_transposed.ld = kPad;
    table.right_transpose(earlier, kPad, channels_, k_transposed);
    table.gemm({rows - kPad,
                kPad,
                channels_,
                later,
                as_const(k_transposed),
                block(scores, kPad, 0),
                {T(1), false}});
  }

  // Of a channel the sums are those of HeadDecays.
  void of_states(const Kernels<T>& table, const ChunkGradients<T>& at, StatePair<T> states) {
    table.sum_products(states.before, states.gradient, value_channels_, cols_, room_);
    table.multiply({room_, 0}, {of_all(at.rows), 0}, at.rows, cols_, gradient_);
    table.add_products_behind(at.q, as_const(at.dq), at.rows, cols_, gradient_);
    table.add_products_before(at.k, as_const(at.dk), at.rows, cols_, gradient_);
  }

  void within(const Kernels<T>& table, const ChunkGradients<T>& at, bool decays) {
    if (at.rows > kPad) through_the_seam(table, at, decays);
    for_each_half(at.rows, [&](int64_t first, int64_t count) {
      const Matrix<T> dg = decays ? from_row(gradient_, first) : Matrix<T>{nullptr, 0};
      table.channel_gradients(
          count, cols_, as_const(block(at.dscores, first, first)),
          {from_row(at.q, first), from_row(at.k, first), as_const(from_row(factors_.each, first)),
           from_row(at.dq, first), from_row(at.dk, first), dg});
    });
  }

  // The same, `to` (B, L, H, D).
  void store(const Kernels<T>& table, const LinearAttention<T>& a, const HeadTask& at, Range tokens,
             T* to) const {
    store_result(table, a, at, tokens, gradient_, channels_, {to, kDType<T>});
  }

 private:
  struct Halves {
    Matrix<const T> later, earlier;
  };

  const T* of_all(int64_t rows) const {
    return factors_.since_start.data + (rows - 1) * factors_.since_start.ld;
  }

  static Matrix<T> block(Matrix<T> m, int64_t row, int64_t column) {
    return {m.data + row * m.ld + column, m.ld};
  }

  template <typename Visit>
  static void for_each_half(int64_t rows, const Visit& visit) {
    static_assert(kChunk == 2 * kPad);
    for (int64_t first = 0; first < rows; first += kPad) visit(first, std::min(kPad, rows - first));
  }

  Matrix<const T> product(const Kernels<T>& table, int64_t rows, Matrix<const T> a, Matrix<T> b,
                          Matrix<T> room) const {
    table.multiply(a, as_const(b), rows, cols_, room);
    return as_const(room);
  }

  // Queries of the second half and keys of the first, both decayed to the seam.
  Halves across(const Kernels<T>& table, int64_t rows, Matrix<const T> q, Matrix<const T> k) const {
    return {product(table, rows - kPad, from_row(q, kPad), factors_.since_middle, later_),
            product(table, kPad, k, factors_.to_middle, earlier_)};
  }

  void through_the_seam(const Kernels<T>& table, const ChunkGradients<T>& at, bool decays) {
    const int64_t rows = at.rows - kPad;
    const auto [later, earlier] = across(table, at.rows, at.q, at.k);
    const Matrix<T> dscores = block(at.dscores, kPad, 0);
    table.gemm({rows, cols_, kPad, as_const(dscores), earlier, later_gradient_, {T(1), false}});
    table.gemm({kPad,
                cols_,
                rows,
                transposed(as_const(dscores)),
                later,
                earlier_gradient_,
                {T(1), false}});
    product(table, rows, as_const(later_gradient_), factors_.since_middle, later_gradient_);
    product(table, kPad, as_const(earlier_gradient_), factors_.to_middle, earlier_gradient_);
    const Matrix<T> dq = from_row(at.dq, kPad);
    table.add_rows(as_const(later_gradient_), rows, cols_, T(1), dq.data, dq.ld);
    table.add_rows(as_const(earlier_gradient_), kPad, cols_, T(1), at.dk.data, at.dk.ld);
    if (!decays) return;
    table.add_products_behind(from_row(at.q, kPad), as_const(later_gradient_), rows, cols_,
                              from_row(gradient_, kPad));
    table.add_products_before(at.k, as_const(earlier_gradient_), kPad, cols_, gradient_);
  }

  int64_t channels_, value_channels_, cols_;
  ChannelFactors<T> factors_;
  Matrix<T> later_, earlier_, later_gradient_, earlier_gradient_;
  Matrix<T> gradient_;  // of the logs
  T* room_;
};

// Their logs are asked for where each token has many.
template <typename T>
void look_ahead_at(const LinearAttention<T>& a, const HeadTask& at, Range next, Lookahead& ahead) {
  if (!a.g.has_channels) return;
  const TensorView logs{a.g.data, kDType<T>, a.g.batch_stride, a.g.row_stride, a.g.head_stride};
  expect(ahead, logs, at.b, at.h, next, a.D);
}

// Calls visit with the decays that are given, as a type: visit(decays_of_that_type).
template <typename T, typename Visit>
void with_decays(const LogDecays<T>& g, const Visit& visit) {
  if (g.has_channels) return visit(ChannelDecays<T>{});
  visit(HeadDecays<T>{});
}

}  // namespace usp::cpu
