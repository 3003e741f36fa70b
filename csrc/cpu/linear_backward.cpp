#include "cpu/linear_decays.h"

namespace usp::cpu {
namespace {

template <typename T, typename Decays>
struct Workspace {
  Matrix<T> q, k, v, dout, decayed;  // rows
  Matrix<T> k_transposed, v_transposed;
  Matrix<T> scores, dscores;
  Matrix<T> gradient, gradient_transposed;  // of the state: (D, Dv) and (Dv, D)
  Matrix<T> states;                         // before each chunk of a segment, each (Dv, D)
  Matrix<T> dq, dk, dv;
  Decays decays;
  int64_t bytes;

  Workspace(const LinearAttention<T>& a, char* base) {
    Carver carver(base);
    const int64_t d = padded(a.D), e = padded(a.Dv), chunks = a.segment / kChunk;
    const auto take = [&](int64_t rows, int64_t ld) {
      return Matrix<T>{carver.take<T>(rows * ld), ld};
    };
    for (Matrix<T>* m : {&q, &k, &decayed, &dq, &dk}) *m = take(kChunk, d);
    for (Matrix<T>* m : {&v, &dout, &dv}) *m = take(kChunk, e);
    k_transposed = take(a.D, kChunk);
    v_transposed = take(a.Dv, kChunk);
    scores = take(kChunk, kChunk);
    dscores = take(kChunk, kChunk);
    gradient = take(a.D, e);
    gradient_transposed = take(a.Dv, d);
    states = take(chunks * a.Dv, d);
    decays.carve(carver, a, true);
    bytes = carver.used();
  }
};

template <typename T, typename Decays>
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
      const auto update = w_.decays.to_end(table_, kChunk, k, w_.decayed);
      const Matrix<T> next = state(i + 1);
      std::copy_n(state(i).data, a_.Dv * next.ld, next.data);
      w_.decays.decay_transposed(table_, kChunk, next);
      table_.gemm({a_.Dv, next.ld, kChunk, transposed(v), update, next, {T(1), true}});
    }
  }

  void chunk(Range tokens, int64_t i) {
    const int64_t rows = tokens.size();
    look_ahead(tokens.begin);
    const int64_t written = wants_inputs() ? rows : 0;
    ahead_.spread(table_.blocks(a_.D, w_.gradient.ld) + 2 * table_.blocks(written, a_.D) +
                  table_.blocks(written, a_.Dv));
    w_.decays.load(table_, a_.g, at_.b, at_.h, tokens);
    const auto q = rows_of(table_, a_.q, at_, a_.H, tokens, a_.D, w_.q);
    const auto dout = rows_of(table_, g_.dout, at_.b, at_.h, tokens, a_.Dv, w_.dout);
    if (wants_inputs()) inputs(tokens, q, dout, state(i));
    const auto update = w_.decays.since_start(table_, rows, q, w_.decayed);
    w_.decays.decay_state(table_, rows, w_.gradient);
    table_.gemm({a_.D,
                 w_.gradient.ld,
                 rows,
                 transposed(update),
                 dout,
                 w_.gradient,
                 {T(1), true, nullptr, &ahead_}});
  }

  // The chunk that ends there comes next.
  void look_ahead(int64_t end) {
    const Range next{std::max(end - kChunk, a_.tokens(at_.part).begin), end};
    ahead_.forget();
    expect(ahead_, a_.q, at_.b, a_.q.head(at_.h, a_.H), next, a_.D);
    expect(ahead_, g_.dout, at_.b, at_.h, next, a_.Dv);
    look_ahead_at(a_, at_, next, ahead_);
    if (!wants_inputs()) return;
    expect(ahead_, a_.k, at_.b, a_.k.head(at_.h, a_.H), next, a_.D);
    expect(ahead_, a_.v, at_.b, a_.v.head(at_.h, a_.H), next, a_.Dv);
  }

  // dq, dk, dv and dg of a chunk, by the gradient of the state behind it.
  void inputs(Range tokens, Matrix<const T> q, Matrix<const T> dout, Matrix<T> state) {
    const int64_t rows = tokens.size();
    const auto k = rows_of(table_, a_.k, at_, a_.H, tokens, a_.D, w_.k);
    const auto v = rows_of(table_, a_.v, at_, a_.H, tokens, a_.Dv, w_.v);
    const bool decays = g_.dg != nullptr;
    triangles(rows, q, k, v, dout);
    table_.right_transpose(as_const(w_.gradient), a_.D, a_.Dv, w_.gradient_transposed);
    of_states(rows, v, dout, state);
    const ChunkGradients<T> at{rows, q, k, w_.dq, w_.dk, w_.scores, w_.dscores};
    if (decays)
      w_.decays.of_states(table_, at, {as_const(state), as_const(w_.gradient_transposed)});
    w_.decays.within(table_, at, decays);
    store_result(table_, a_, at_, tokens, w_.dq, a_.D, g_.dq);
    store_result(table_, a_, at_, tokens, w_.dk, a_.D, g_.dk);
    if (decays) w_.decays.store(table_, a_, at_, tokens, g_.dg);
    of_values(tokens, k, dout);
  }

  // Scores with their decays, and their gradients without.
  void triangles(int64_t rows, Matrix<const T> q, Matrix<const T> k, Matrix<const T> v,
                 Matrix<const T> dout) {
    w_.v_transposed.ld = padded(rows);
    table_.right_transpose(v, rows, a_.Dv, w_.v_transposed);
    w_.decays.scores(table_, rows, q, k, w_.k_transposed, w_.scores);
    lower_product(table_, rows, a_.Dv, dout, as_const(w_.v_transposed), w_.dscores);
  }

  // What queries read of the state before the chunk, and keys write into the one behind it.
  void of_states(int64_t rows, Matrix<const T> v, Matrix<const T> dout, Matrix<T> state) {
    table_.gemm(
        {rows, w_.dq.ld, a_.Dv, dout, as_const(state), w_.dq, {T(1), false, nullptr, &ahead_}});
    w_.decays.scale_since_start(table_, rows, w_.dq);
    table_.gemm({rows,
                 w_.dk.ld,
                 a_.Dv,
                 v,
                 as_const(w_.gradient_transposed),
                 w_.dk,
                 {T(1), false, nullptr, &ahead_}});
    w_.decays.scale_to_end(table_, rows, w_.dk);
  }

  void of_values(Range tokens, Matrix<const T> k, Matrix<const T> dout) {
    const int64_t rows = tokens.size();
    const auto written = w_.decays.to_end(table_, rows, k, w_.decayed);
    table_.gemm({rows,
                 w_.dv.ld,
                 a_.D,
                 written,
                 as_const(w_.gradient),
                 w_.dv,
                 {T(1), false, nullptr, &ahead_}});
    add_upper_times(table_, rows, w_.dv.ld, w_.scores, dout, w_.dv);
    store_result(table_, a_, at_, tokens, w_.dv, a_.Dv, g_.dv);
  }

  const LinearAttention<T>& a_;
  const LinearGradients<T>& g_;
  const HeadTask at_;
  const Kernels<T>& table_;
  Workspace<T, Decays> w_;
  Lookahead ahead_;
};

}  // namespace

template <typename T>
void linear_backward(const LinearAttention<T>& a, const LinearGradients<T>& gradients,
                     const ParallelFor& parallel) {
  const int64_t tasks = a.parts * a.B * a.H;
  with_decays(a.g, [&]<typename Decays>(Decays) {
    Scratch scratch(parallel.workers_for(tasks), Workspace<T, Decays>(a, nullptr).bytes);
    parallel.for_each_task(tasks, [&](int64_t worker, int64_t task) {
      BackwardWalk<T, Decays>(a, gradients, HeadTask(a, task), scratch.of(worker)).run();
    });
  });
}

template void linear_backward<float>(const LinearAttention<float>&, const LinearGradients<float>&,
                                     const ParallelFor&);
template void linear_backward<double>(const LinearAttention<double>&,
                                      const LinearGradients<double>&, const ParallelFor&);

}  // namespace usp::cpu
