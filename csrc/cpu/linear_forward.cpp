#include "cpu/linear_decays.h"

namespace usp::cpu {
namespace {

template <typename T, typename Decays>
struct Workspace {
  Matrix<T> state, q, k, k_transposed, v, decayed, scores, out;
  Decays decays;
  int64_t bytes;

  Workspace(const LinearAttention<T>& a, char* base) {
    Carver carver(base);
    const int64_t d = padded(a.D), e = padded(a.Dv);
    state = {carver.take<T>(a.D * e), e};
    q = {carver.take<T>(kChunk * d), d};
    k = {carver.take<T>(kChunk * d), d};
    k_transposed = {carver.take<T>(a.D * kChunk), kChunk};
    v = {carver.take<T>(kChunk * e), e};
    decayed = {carver.take<T>(kChunk * d), d};
    scores = {carver.take<T>(kChunk * kChunk), kChunk};
    out = {carver.take<T>(kChunk * e), e};
    decays.carve(carver, a, false);
    bytes = carver.used();
  }
};

template <typename T, typename Decays>
class ForwardWalk {
 public:
  ForwardWalk(const LinearAttention<T>& a, HeadTask at, char* room)
      : a_(a), at_(at), table_(kernels<T>(kDType<T>)), w_(a, room) {}

  void run(T* states, T* kept, LinearResult out) {
    const int64_t each = a_.D * a_.Dv;
    T* mine = states + at_.state * each;
    table_.right_rows(kDType<T>, mine, a_.Dv, a_.D, a_.Dv, w_.state);
    const Range tokens = a_.tokens(at_.part);
    for (int64_t begin = tokens.begin; begin < tokens.end; begin += kChunk) {
      if (kept != nullptr && begin % a_.segment == 0) {
        const int64_t place = (begin / a_.segment * a_.B + at_.b) * a_.H + at_.h;
        store_state(kept + place * each);
      }
      chunk({begin, std::min(begin + kChunk, tokens.end)}, out);
    }
    store_state(mine);
  }

 private:
  void store_state(T* to) const {
    table_.store_rows(as_const(w_.state), a_.D, a_.Dv, T(1), nullptr, kDType<T>, to, a_.Dv);
  }

  void chunk(Range tokens, LinearResult out) {
    const int64_t rows = tokens.size();
    look_ahead(tokens.end);
    const int64_t seeing = out.data != nullptr ? rows : 0;
    ahead_.spread(table_.blocks(a_.D, w_.state.ld) + table_.blocks(seeing, w_.out.ld));
    w_.decays.load(table_, a_.g, at_.b, at_.h, tokens);
    const auto k = rows_of(table_, a_.k, at_, a_.H, tokens, a_.D, w_.k);
    const auto v = rows_of(table_, a_.v, at_, a_.H, tokens, a_.Dv, w_.v);
    if (out.data != nullptr) see(tokens, k, v, out);
    const auto update = w_.decays.to_end(table_, rows, k, w_.decayed);
    w_.decays.decay_state(table_, rows, w_.state);
    table_.gemm(
        {a_.D, w_.state.ld, rows, transposed(update), v, w_.state, {T(1), true, nullptr, &ahead_}});
  }

  // What the tokens see of the state before them, and of each other.
  void see(Range tokens, Matrix<const T> k, Matrix<const T> v, LinearResult out) {
    const int64_t rows = tokens.size();
    const auto q = rows_of(table_, a_.q, at_, a_.H, tokens, a_.D, w_.q);
    const auto decayed = w_.decays.since_start(table_, rows, q, w_.decayed);
    table_.gemm({rows,
                 w_.out.ld,
                 a_.D,
                 decayed,
                 as_const(w_.state),
                 w_.out,
                 {T(1), false, nullptr, &ahead_}});
    w_.decays.scores(table_, rows, q, k, w_.k_transposed, w_.scores);
    add_lower_times(table_, rows, w_.out.ld, w_.scores, v, w_.out);
    store_result(table_, a_, at_, tokens, w_.out, a_.Dv, out);
  }

  void look_ahead(int64_t begin) {
    const Range next{begin, std::min(begin + kChunk, a_.tokens(at_.part).end)};
    ahead_.forget();
    expect(ahead_, a_.k, at_.b, a_.k.head(at_.h, a_.H), next, a_.D);
    expect(ahead_, a_.v, at_.b, a_.v.head(at_.h, a_.H), next, a_.Dv);
    look_ahead_at(a_, at_, next, ahead_);
    if (a_.q.data != nullptr) expect(ahead_, a_.q, at_.b, a_.q.head(at_.h, a_.H), next, a_.D);
  }

  const LinearAttention<T>& a_;
  const HeadTask at_;
  const Kernels<T>& table_;
  Workspace<T, Decays> w_;
  Lookahead ahead_;
};

}  // namespace

template <typename T>
void linear_forward(const LinearAttention<T>& a, T* states, T* kept, LinearResult out,
                    const ParallelFor& parallel) {
  const int64_t tasks = a.parts * a.B * a.H;
  with_decays(a.g, [&]<typename Decays>(Decays) {
    Scratch scratch(parallel.workers_for(tasks), Workspace<T, Decays>(a, nullptr).bytes);
    parallel.for_each_task(tasks, [&](int64_t worker, int64_t task) {
      ForwardWalk<T, Decays>(a, HeadTask(a, task), scratch.of(worker)).run(states, kept, out);
    });
  });
}

template void linear_forward<float>(const LinearAttention<float>&, float*, float*, LinearResult,
                                    const ParallelFor&);
template void linear_forward<double>(const LinearAttention<double>&, double*, double*, LinearResult,
                                     const ParallelFor&);

}  // namespace usp::cpu
