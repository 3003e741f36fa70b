#include "cpu/linear_chunk.h"

namespace usp::cpu {
namespace {

template <typename T>
struct Workspace {
  Matrix<T> q, k, v, dout, scaled;  // rows
  Matrix<T> k_transposed, v_transposed;
  Matrix<T> scores, dscores;
  Matrix<T> gradient, gradient_transposed;  // of the state: (D, Dv) and (Dv, D)
  Matrix<T> states;                         // before each chunk of a segment, each (Dv, D)
  Matrix<T> d_keys, d_values;               // rows of dq or dk, and of dv
  T *of_queries, *of_keys, *room;           // products of rows
  ChunkDecays<T> decays;
  int64_t bytes;

  Workspace(const LinearAttention<T>& a, char* base) {
    Carver carver(base);
    const int64_t d = padded(a.D), e = padded(a.Dv), chunks = a.segment / kChunk;
    const auto take = [&](int64_t rows, int64_t ld) {
      return Matrix<T>{carver.take<T>(rows * ld), ld};
    };
    for (Matrix<T>* m : {&q, &k, &d_keys}) *m = take(kChunk, d);
    for (Matrix<T>* m : {&v, &dout, &scaled, &d_values}) *m = take(kChunk, e);
    k_transposed = take(a.D, kChunk);
    v_transposed = take(a.Dv, kChunk);
    scores = take(kChunk, kChunk);
    dscores = take(kChunk, kChunk);
    gradient = take(a.D, e);
    gradient_transposed = take(a.Dv, d);
    states = take(chunks * a.Dv, d);
    of_queries = carver.take<T>(kChunk);
    of_keys = carver.take<T>(kChunk);
    room = carver.take<T>(std::max(kChunk, a.Dv));
    decays.carve(carver, a.g);
    bytes = carver.used();
  }
};

template <typename T>
class BackwardWalk {
 public:
  BackwardWalk(const LinearAttention<T>& a, const LinearGradients<T>& g, HeadTask at, char* room)
      : a_(a), g_(g), at_(at), table_(kernels<T>(kDType<T>)), w_(a, room) {}

  void run() {
    T* mine = g_.states + at_.state * a_.D * a_.Dv;
    table_.right_rows(kDType<T>, mine, a_.Dv, a_.D, a_.Dv, w_.gradient);
    const Range tokens = a_.tokens(at_.part);
    const int64_t segments = (tokens.size() + a_.segment - 1) / a_.segment;
    for (int64_t i = segments - 1; i >= 0; --i) {
      const int64_t begin = tokens.begin + i * a_.segment;
      segment({begin, std::min(begin + a_.segment, tokens.end)});
    }
    table_.store_rows(as_const(w_.gradient), a_.D, a_.Dv, T(1), nullptr, kDType<T>, mine, a_.Dv);
  }

 private:
  bool wants_inputs() const { return g_.dq.data != nullptr; }

  static Range chunk_of(Range segment, int64_t i) {
    const int64_t begin = segment.begin + i * kChunk;
    return {begin, std::min(begin + kChunk, segment.end)};
  }

  Matrix<T> state(int64_t i) const { return from_row(w_.states, i * a_.Dv); }

  void segment(Range segment) {
    const int64_t chunks = (segment.size() + kChunk - 1) / kChunk;
    if (wants_inputs()) walk_states(segment, chunks);
    for (int64_t i = chunks - 1; i >= 0; --i) chunk(chunk_of(segment, i), i);
  }

  // The state before each chunk again, transposed.
  void walk_states(Range segment, int64_t chunks) {
    const int64_t place = (segment.begin / a_.segment * a_.B + at_.b) * a_.H + at_.h;
    const T* kept = g_.kept + place * a_.D * a_.Dv;
    table_.right_transpose({kept, a_.Dv}, a_.D, a_.Dv, state(0));
    for (int64_t i = 0; i + 1 < chunks; ++i) {
      const Range tokens = chunk_of(segment, i);
      w_.decays.load(table_, a_.g, at_.b, at_.h, tokens);
      const auto k = rows_of(table_, a_.k, at_, a_.H, tokens, a_.D, w_.k);
      const auto v = rows_of(table_, a_.v, at_, a_.H, tokens, a_.Dv, w_.v);
      const auto update = scaled(table_, v, kChunk, w_.decays.to_end(kChunk), w_.scaled);
      const Matrix<T> next = state(i + 1);
      std::copy_n(state(i).data, a_.Dv * next.ld, next.data);
      decay_state(next, a_.Dv, w_.decays.of_all(kChunk));
      table_.gemm(a_.Dv, next.ld, kChunk, transposed(update), k, next, {T(1), true});
    }
  }

  void chunk(Range tokens, int64_t i) {
    const int64_t rows = tokens.size();
    look_ahead(tokens.begin);
    w_.decays.load(table_, a_.g, at_.b, at_.h, tokens);
    const auto q = rows_of(table_, a_.q, at_, a_.H, tokens, a_.D, w_.q);
    const auto dout = rows_of(table_, g_.dout, at_.b, at_.h, tokens, a_.Dv, w_.dout);
    if (wants_inputs()) inputs(tokens, q, dout, state(i));
    const auto update = scaled(table_, dout, rows, w_.decays.since_start, w_.scaled);
    decay_state(w_.gradient, a_.D, w_.decays.of_all(rows));
    table_.gemm(a_.D, w_.gradient.ld, rows, transposed(q), update, w_.gradient, {T(1), true});
  }

  // The chunk that ends there comes next.
  void look_ahead(int64_t end) {
    const Range next{std::max(end - kChunk, a_.tokens(at_.part).begin), end};
    ahead_.forget();
    ahead_.add(a_.q, at_.b, a_.q.head(at_.h, a_.H), next, a_.D);
    ahead_.add(g_.dout, at_.b, at_.h, next, a_.Dv);
    if (!wants_inputs()) return;
    ahead_.add(a_.k, at_.b, a_.k.head(at_.h, a_.H), next, a_.D);
    ahead_.add(a_.v, at_.b, a_.v.head(at_.h, a_.H), next, a_.Dv);
  }

  // dq, dk, dv and dg of a chunk, by the gradient of the state behind it.
  void inputs(Range tokens, Matrix<const T> q, Matrix<const T> dout, Matrix<T> state) {
    const int64_t rows = tokens.size();
    const auto k = rows_of(table_, a_.k, at_, a_.H, tokens, a_.D, w_.k);
    const auto v = rows_of(table_, a_.v, at_, a_.H, tokens, a_.Dv, w_.v);
    triangles(rows, q, k, v, dout);
    ahead_.advance();
    of_queries(tokens, q, k, dout, state);
    ahead_.advance();
    table_.right_transpose(as_const(w_.gradient), a_.D, a_.Dv, w_.gradient_transposed);
    of_keys(tokens, q, k, v);
    ahead_.advance();
    of_values(tokens, k, dout);
    if (g_.dg != nullptr) of_decays(tokens, state);
    ahead_.advance();
  }

  // Scores and their gradients with their decays; sums of products across each token.
  void triangles(int64_t rows, Matrix<const T> q, Matrix<const T> k, Matrix<const T> v,
                 Matrix<const T> dout) {
    w_.k_transposed.ld = w_.v_transposed.ld = padded(rows);
    table_.right_transpose(k, rows, a_.D, w_.k_transposed);
    table_.right_transpose(v, rows, a_.Dv, w_.v_transposed);
    lower_product(table_, rows, a_.D, q, as_const(w_.k_transposed), w_.scores);
    lower_product(table_, rows, a_.Dv, dout, as_const(w_.v_transposed), w_.dscores);
    const auto between = as_const(w_.decays.between);
    table_.multiply_lower(as_const(w_.dscores), between, rows, w_.dscores);
    if (g_.dg != nullptr) {
      table_.sums_across(as_const(w_.scores), as_const(w_.dscores), rows, w_.decays.logs, w_.room);
    }
    table_.multiply_lower(as_const(w_.scores), between, rows, w_.scores);
  }

  void of_queries(Range tokens, Matrix<const T> q, Matrix<const T> k, Matrix<const T> dout,
                  Matrix<T> state) {
    const int64_t rows = tokens.size();
    table_.gemm(rows, w_.d_keys.ld, a_.Dv, dout, as_const(state), w_.d_keys, {T(1), false});
    decay_rows(table_, w_.d_keys, rows, w_.decays.since_start);
    if (g_.dg != nullptr) row_products(rows, q, w_.of_queries);
    add_lower_times(table_, rows, w_.d_keys.ld, w_.dscores, k, w_.d_keys);
    store_result(table_, a_, at_, tokens, w_.d_keys, a_.D, g_.dq);
  }

  void of_keys(Range tokens, Matrix<const T> q, Matrix<const T> k, Matrix<const T> v) {
    const int64_t rows = tokens.size();
    table_.gemm(rows, w_.d_keys.ld, a_.Dv, v, as_const(w_.gradient_transposed), w_.d_keys,
                {T(1), false});
    decay_rows(table_, w_.d_keys, rows, w_.decays.to_end(rows));
    if (g_.dg != nullptr) row_products(rows, k, w_.of_keys);
    add_upper_times(table_, rows, w_.d_keys.ld, w_.dscores, q, w_.d_keys);
    store_result(table_, a_, at_, tokens, w_.d_keys, a_.D, g_.dk);
  }

  void of_values(Range tokens, Matrix<const T> k, Matrix<const T> dout) {
    const int64_t rows = tokens.size();
    table_.gemm(rows, w_.d_values.ld, a_.D, k, as_const(w_.gradient), w_.d_values, {T(1), false});
    decay_rows(table_, w_.d_values, rows, w_.decays.to_end(rows));
    add_upper_times(table_, rows, w_.d_values.ld, w_.scores, dout, w_.d_values);
    store_result(table_, a_, at_, tokens, w_.d_values, a_.Dv, g_.dv);
  }

  void row_products(int64_t rows, Matrix<const T> x, T* result) const {
    table_.row_products(kDType<T>, x.data, x.ld, w_.d_keys.data, w_.d_keys.ld, rows, a_.D, result,
                        1);
  }

  // A token's decay is a factor of what those from it on see of what was before it: of earlier
  // tokens of the chunk, and of the state; and of what these leave behind the chunk.
  void of_decays(Range tokens, Matrix<T> state) const {
    const int64_t rows = tokens.size();
    table_.row_products(kDType<T>, state.data, state.ld, w_.gradient_transposed.data,
                        w_.gradient_transposed.ld, a_.Dv, a_.D, w_.room, 1);
    T through = 0;
    for (int64_t e = 0; e < a_.Dv; ++e) through += w_.room[e];
    through *= w_.decays.of_all(rows);
    T* to = g_.dg + (at_.b * a_.L + tokens.begin) * a_.H + at_.h;
    T* within = w_.decays.logs;
    T behind = 0;
    for (int64_t i = rows - 1; i >= 0; --i) within[i] += behind += w_.of_queries[i];
    T before = through;
    for (int64_t i = 0; i < rows; ++i) {
      to[i * a_.H] = within[i] + before;
      before += w_.of_keys[i];
    }
  }

  const LinearAttention<T>& a_;
  const LinearGradients<T>& g_;
  const HeadTask at_;
  const Kernels<T>& table_;
  Workspace<T> w_;
  Lookahead ahead_;
};

}  // namespace

template <typename T>
void linear_backward(const LinearAttention<T>& a, const LinearGradients<T>& gradients,
                     const ParallelFor& parallel) {
  const int64_t tasks = a.parts * a.B * a.H;
  Scratch scratch(parallel.workers_for(tasks), Workspace<T>(a, nullptr).bytes);
  parallel.for_each_task(tasks, [&](int64_t worker, int64_t task) {
    BackwardWalk<T>(a, gradients, HeadTask(a, task), scratch.of(worker)).run();
  });
}

template void linear_backward<float>(const LinearAttention<float>&, const LinearGradients<float>&,
                                     const ParallelFor&);
template void linear_backward<double>(const LinearAttention<double>&,
                                      const LinearGradients<double>&, const ParallelFor&);

}  // namespace usp::cpu
