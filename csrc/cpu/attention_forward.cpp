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
#include <vector>

#include "cpu/attention.h"
#include "cpu/riders.h"

namespace usp::cpu {
namespace {

// A tile of query rows with its running softmax.
template <typename T>
struct RowTile {
  int64_t h;
  bool rides;
  bool fresh;    // no row had seen a key
  bool started;  // out holds something
  Range rows;
  Matrix<T> q_room;   // (few rows, D)
  QueryOperand<T> q;  // (D, rows)
  Matrix<T> out;      // (rows, Dv), not normalised, or its transpose
  SoftmaxRows<T> softmax;
  QueryPositions positions;

  RowTile() = default;

  RowTile(const Attention<T>& a, const Kernels<T>& kernels, Carver& carver) {
    q_room = {carver.take<T>(kFew * padded(a.D)), padded(a.D)};
    q.transposed = {carver.take<T>(a.D * kQueryTile), kQueryTile};
    out =
        by_query_sums(kernels, carver.take<T>(kQueryTile * padded(a.Dv)), kQueryTile, padded(a.Dv));
    softmax = {carver.take<T>(kQueryTile), carver.take<T>(kQueryTile), carver.take<T>(kQueryTile)};
    positions.carve(carver);
  }
};

template <typename T>
struct Workspace {
  int64_t held;
  RowTile<T> tiles[kTilesHeld + 1];  // and riders
  Matrix<T> q;                       // (rows, D)
  Matrix<T> k;                       // (keys, D)
  Matrix<T> v;                       // (keys, Dv), or its transpose
  T* scores;                         // (keys, rows)
  T* weights;                        // the same as left operand
  T* multiplier;                     // (keys, rows), dropout only

  Workspace(const Attention<T>& a, const Kernels<T>& kernels, const Shares<T>& shares,
            Carver& carver)
      : held(shares.held + (shares.riders() > 0)) {
    for (int64_t t = 0; t < held; ++t) tiles[t] = RowTile<T>(a, kernels, carver);
    q = {carver.take<T>(kQueryTile * padded(a.D)), padded(a.D)};
    k = {carver.take<T>(kKeyTile * padded(a.D)), padded(a.D)};
    v = by_query_sums(kernels, carver.take<T>(kKeyTile * padded(a.Dv)), kernels.in_words(kKeyTile),
                      padded(a.Dv));
    scores = carver.take<T>(kKeyTile * kQueryTile);
    weights = carver.take<T>(kKeyTile * kQueryTile);
    multiplier = a.dropout_p > 0 ? carver.take<T>(kKeyTile * kQueryTile) : nullptr;
  }
};

// One worker's tasks, one after another.
template <typename T>
class ForwardWorker {
 public:
  ForwardWorker(const Attention<T>& a, const AttentionState<T>& state, const Shares<T>& shares,
                const RiderParts<T>& parts, Carver& carver)
      : a_(a),
        state_(state),
        shares_(shares),
        parts_(parts),
        kernels_(kernels<T>(a.q.dtype)),
        headroom_sum_(std::exp(kernels_.headroom)),
        w_(a, kernels_, shares, carver) {}

  void run(int64_t task, int64_t probably_next) {
    const Share& share = shares_[task];
    task_ = task;
    next_ = probably_next < shares_.count() ? &shares_[probably_next] : nullptr;
    b_ = share.b;
    g_ = share.g;
    count_ = 0;
    for (int64_t number = 0; number < share.tiles.size(); ++number) {
      shares_.with_tile(share, number, [&](int64_t h, Range rows) { hold(h, rows); });
    }
    if (shares_.riders() > 0) {
      const Range rows = count_ > 0 ? hull(w_.tiles[0].rows, w_.tiles[count_ - 1].rows) : Range{};
      ride_.set(a_, shares_.keys_of_riders(share), rows);
      take(g_, {0, shares_.riders()}, true, shares_.begins_head(share));
    }
    if (count_ > 0) walk();
  }

  // Of all shares, when they are done.
  void store_riders() {
    parts_.merge([&](int64_t b, int64_t h, int64_t task) {
      RowTile<T>& tile = w_.tiles[0];
      b_ = b;
      tile.h = h;
      tile.fresh = false;
      tile.rows = {0, shares_.riders()};
      std::copy_n(parts_.max(task), shares_.riders(), tile.softmax.max);
      std::copy_n(parts_.sum(task), shares_.riders(), tile.softmax.sum);
      store_state(tile, {parts_.out(task), a_.Dv});
    });
  }

 private:
  std::span<RowTile<T>> held() { return {w_.tiles, static_cast<size_t>(count_)}; }

  // Takes a tile of query rows in. Those that see nothing only matter to a result.
  void hold(int64_t h, Range rows) {
    if (!first_keys(rows).empty() || state_.result != nullptr) take(h, rows, false, true);
  }

  void take(int64_t h, Range rows, bool rides, bool carries) {
    RowTile<T>& tile = w_.tiles[count_];
    tile.h = h;
    tile.rows = rows;
    tile.rides = rides;
    load_queries(tile);
    load_state(tile, carries);
    ++count_;
  }

  void walk() {
    walk_keys();
    for (RowTile<T>& tile : held()) {
      start(tile);
      const auto out = as_rows(kernels_, tile.out, tile.rows.size(), a_.Dv, w_.v.data);
      if (tile.rides) {
        store_part(tile, out);
      } else {
        store_state(tile, out);
      }
    }
  }

  Span span(const RowTile<T>& tile, int64_t band) const {
    return tile.rides ? ride_.span(a_, shares_.riders(), band) : a_.band(band);
  }

  void walk_keys() {
    const Products<T> products(kernels_);
    int64_t left = 0;
    for (Pace pace = from_band(0); !pace.keys.empty(); pace = after(pace)) ++left;
    const int64_t last_paces = std::clamp<int64_t>(left, 1, kTilesHeld);
    tiles_expected_ = 0;
    for (Pace pace = from_band(0); left > 0; --left) {
      const Pace next = after(pace);
      look_ahead(next.keys);
      expect_tiles(expected_tiles() * std::max<int64_t>(last_paces - left + 1, 0) / last_paces);
      ahead_.spread(turns(pace));
      add_keys(pace.band, pace.keys);
      pace = next;
    }
  }

  // A tile of the keys that some row held sees in a band.
  struct Pace {
    int64_t band;
    Range keys, visible;
  };

  Pace after(const Pace& pace) const {
    const Range rest{pace.keys.end, pace.visible.end};
    if (rest.empty()) return from_band(pace.band + 1);
    return {pace.band, first_tile(rest), pace.visible};
  }

  // The first of this band or of one behind it; without keys where there is none.
  Pace from_band(int64_t band) const {
    for (; band < a_.num_bands; ++band) {
      Range visible;
      for (int64_t t = 0; t < count_; ++t) {
        visible = hull(visible, visible_keys(span(w_.tiles[t], band), w_.tiles[t].rows));
      }
      if (!visible.empty()) return {band, first_tile(visible), visible};
    }
    return {};
  }

  static Range first_tile(Range keys) {
    return intersect(keys, {keys.begin, keys.begin + kKeyTile});
  }

  // How often ahead_ is asked while the tiles take these keys, about.
  int64_t turns(const Pace& pace) const {
    int64_t turns = 0;
    for (int64_t t = 0; t < count_; ++t) {
      const Range rows = w_.tiles[t].rows;
      const Span span = this->span(w_.tiles[t], pace.band);
      const Range keys = intersect(visible_keys(span, rows), pace.keys);
      if (keys.empty()) continue;
      const bool all_see = unmasked_keys(span, rows).contains(keys);  // else it takes a search
      const int64_t count = (all_see ? rows : visible_queries(span, rows, keys)).size();
      turns += QueryOperand<T>::turns(kernels_, count, keys.size()) + kernels_.blocks(count, a_.Dv);
    }
    return turns;
  }

  // That some of the rows see, of the first band in which they see any.
  Range first_keys(Range rows) const {
    Range visible;
    for (int64_t band = 0; band < a_.num_bands && visible.empty(); ++band) {
      visible = visible_keys(a_.band(band), rows);
    }
    return visible;
  }

  // To the next keys; after the last, to those of the next task.
  void look_ahead(Range keys) {
    ahead_.forget();
    if (!keys.empty()) return look_ahead_at_keys(b_, g_, keys);
    if (next_ == nullptr) return;
    shares_.with_tile(*next_, next_->tiles.size() - 1, [&](int64_t, Range rows) {
      look_ahead_at_keys(next_->b, next_->g, first_tile(first_keys(rows)));
    });
  }

  void look_ahead_at_keys(int64_t b, int64_t g, Range keys) {
    expect(ahead_, a_.k, b, g, keys, a_.D);
    expect(ahead_, a_.v, b, g, keys, a_.Dv);
  }

  // Where results go, and then the queries of the next task: a few tiles in each of the last paces.
  int64_t expected_tiles() const { return count_ + (next_ != nullptr ? next_->tiles.size() : 0); }

  void expect_tiles(int64_t number) {
    for (; tiles_expected_ < number; ++tiles_expected_) {
      if (tiles_expected_ < count_) {
        const RowTile<T>& tile = w_.tiles[tiles_expected_];
        const int64_t size = element_size(stored());
        ahead_.add(place(tile, 0), a_.H * a_.Dv * size, tile.rows.size(), a_.Dv * size);
      } else {
        shares_.with_tile(*next_, tiles_expected_ - count_, [&](int64_t h, Range rows) {
          expect(ahead_, a_.q, next_->b, h, rows, a_.D);
        });
      }
    }
  }

  void load_queries(RowTile<T>& tile) {
    const int64_t num_rows = tile.rows.size();
    const Matrix<T> room = num_rows <= kFew ? tile.q_room : w_.q;
    const auto q = left_rows(kernels_, a_.q, b_, tile.h, tile.rows, a_.D, room);
    tile.q.set(kernels_, q, num_rows, a_.D, q.data != w_.q.data);
    tile.positions.load(a_, tile.rows);
  }

  RunningSoftmax<T> carried(T lse) const {
    return RunningSoftmax<T>::from_lse(lse, kernels_.headroom, headroom_sum_);
  }

  // What is carried, or what has seen nothing.
  void load_state(RowTile<T>& tile, bool carries) {
    const int64_t count = padded(tile.rows.size());
    const T *lse = lse_of(tile), *end = carries ? lse + tile.rows.size() : lse;
    tile.started = false;
    tile.fresh = std::count(lse, end, minus_infinity<T>()) == end - lse;
    if (tile.fresh) {
      std::fill_n(tile.softmax.max, count, minus_infinity<T>());
      std::fill_n(tile.softmax.sum, count, T(0));
      return;
    }
    for (int64_t i = 0; i < count; ++i) {
      const auto row = carried(i < tile.rows.size() ? lse[i] : minus_infinity<T>());
      tile.softmax.max[i] = row.max;
      tile.softmax.sum[i] = row.sum;
    }
    if (state_.out == nullptr) return;
    start(tile);
    const Matrix<T> to = tile.out.transposed ? Matrix<T>{w_.v.data, padded(a_.Dv)} : tile.out;
    kernels_.store_rows({state_.out + row_offset(tile), a_.H * a_.Dv}, tile.rows.size(), a_.Dv,
                        T(1), tile.softmax.sum, kDType<T>, to.data, to.ld);
    if (!tile.out.transposed) return;
    kernels_.right_transpose(as_const(to), tile.rows.size(), a_.Dv * kernels_.word, tile.out);
  }

  // With zeros, and their padding.
  void start(RowTile<T>& tile) {
    if (tile.started) return;
    set_zero(tile.out, tile.rows.size(), padded(a_.Dv));
    tile.started = true;
  }

  void add_keys(int64_t band, Range keys) {
    bool loaded = false;
    Matrix<const T> k;
    for (RowTile<T>& tile : held()) {
      const Span span = this->span(tile, band);
      with_seen(span, {b_, tile.h, tile.rows}, keys, kernels_.word, kernels_.word, cut_,
                [&](const TileIndex& at) {
                  if (!loaded) {
                    k = left_rows(kernels_, a_.k, b_, g_, keys, a_.D, w_.k);
                    weighted_rows(kernels_, a_.v, b_, g_, keys, a_.Dv, w_.v);
                    loaded = true;
                  }
                  const int64_t skipped = at.keys.begin - keys.begin;
                  add_seen(tile, at, rows_from(k, skipped),
                           as_const(rows_from(w_.v, kernels_.in_words(skipped))));
                });
    }
  }

  void add_seen(RowTile<T>& tile, const TileIndex& at, Matrix<const T> k, Matrix<const T> v) {
    const Tile<T> s = score_tile(a_, kernels_, at, w_.scores);
    compute_scores<T>(a_, kernels_, at, k, tile.q, tile.positions, s, nullptr, ahead_);
    if (a_.dropout_p > 0) {
      dropout_multiplier<T>(a_, kernels_, at, tile.positions, {w_.multiplier, s.keys, s.queries});
    }
    const auto weights = kernels_.softmax_update(s, tile.softmax, w_.multiplier, w_.weights);
    if (at.mask != nullptr && !at.cut->covers(at.rows.size())) start(tile);
    at.for_each_run(kernels_, [&](Range rows, Range seen) {
      kernels_.gemm({rows.size(),
                     padded(a_.Dv),
                     seen.size(),
                     at.by_query(kernels_, weights, rows, seen),
                     rows_from(v, kernels_.in_words(seen.begin)),
                     rows_from(tile.out, rows.begin),
                     {T(1), tile.started, tile.softmax.factor + rows.begin, &ahead_}});
    });
    tile.started = true;
  }

  void store_part(const RowTile<T>& tile, Matrix<const T> out) {
    std::copy_n(tile.softmax.max, tile.rows.size(), parts_.max(task_));
    std::copy_n(tile.softmax.sum, tile.rows.size(), parts_.sum(task_));
    kernels_.store_rows(out, tile.rows.size(), a_.Dv, T(1), nullptr, kDType<T>, parts_.out(task_),
                        a_.Dv);
  }

  void store_state(RowTile<T>& tile, Matrix<const T> out) {
    T *lse = lse_of(tile), finished[kQueryTile];
    kernels_.finish_rows(tile.softmax, padded(tile.rows.size()), finished);
    if (tile.fresh && state_.result != nullptr) {
      std::copy_n(finished, tile.rows.size(), lse);
      return store_rows(tile, out, {0, tile.rows.size()});
    }
    Range moved{0, 0};  // rows that saw something, one behind the other
    for (int64_t i = 0; i < tile.rows.size(); ++i) {
      if (RunningSoftmax<T>{tile.softmax.max[i], tile.softmax.sum[i]} != carried(lse[i])) {
        lse[i] = finished[i];
        moved.end = i + 1;
      } else {  // saw nothing: what it has stays, to the bit
        if (state_.result == nullptr && !moved.empty()) store_rows(tile, out, moved);
        moved = {i + 1, i + 1};
      }
    }
    if (state_.result != nullptr) moved = {0, tile.rows.size()};
    if (!moved.empty()) store_rows(tile, out, moved);
  }

  void store_rows(const RowTile<T>& tile, Matrix<const T> out, Range rows) {
    kernels_.store_rows(rows_from(out, rows.begin), rows.size(), a_.Dv, T(1),
                        tile.softmax.factor + rows.begin, stored(), place(tile, rows.begin),
                        a_.H * a_.Dv);
  }

  DType stored() const { return state_.result != nullptr ? state_.result_dtype : kDType<T>; }

  // Of a row: in the result where there is one.
  void* place(const RowTile<T>& tile, int64_t row) const {
    char* data = static_cast<char*>(state_.result != nullptr ? state_.result : state_.out);
    return data + (row_offset(tile) + row * a_.H * a_.Dv) * element_size(stored());
  }

  T* lse_of(const RowTile<T>& tile) const {
    return state_.lse + (b_ * a_.H + tile.h) * a_.Lq + tile.rows.begin;
  }

  int64_t row_offset(const RowTile<T>& tile) const {
    return ((b_ * a_.Lq + tile.rows.begin) * a_.H + tile.h) * a_.Dv;
  }

  const Attention<T>& a_;
  const AttentionState<T>& state_;
  const Shares<T>& shares_;
  const RiderParts<T>& parts_;
  const Kernels<T>& kernels_;
  const T headroom_sum_;  // exp(headroom)
  Workspace<T> w_;
  Ride<T> ride_;
  Cut cut_;
  int64_t task_ = 0, b_ = 0, g_ = 0, count_ = 0;
  const Share* next_ = nullptr;
  int64_t tiles_expected_ = 0;  // of expected_tiles()
  Lookahead ahead_;
};

}  // namespace

template <typename T>
void attention_forward(const Attention<T>& a, const AttentionState<T>& state,
                       const ParallelFor& parallel) {
  if (a.H == 0 || a.Lq == 0) return;
  const Shares<T> shares(a, parallel);
  const RiderParts<T> parts(a, shares);
  Carver measure(nullptr);
  Workspace<T>(a, kernels<T>(a.q.dtype), shares, measure);
  const int64_t count = parallel.workers_for(shares.count());
  Scratch scratch(count, measure.used());
  std::vector<ForwardWorker<T>> workers;
  workers.reserve(static_cast<size_t>(count));
  for (int64_t worker = 0; worker < count; ++worker) {
    Carver carver(scratch.of(worker));
    workers.emplace_back(a, state, shares, parts, carver);
  }
  parallel.for_each_task(shares.count(), [&](int64_t worker, int64_t task) {
    const int64_t next = parallel.probably_after(task, shares.count());
    workers[static_cast<size_t>(worker)].run(task, next);
  });
  if (shares.riders() > 0) workers[0].store_riders();
}

template void attention_forward(const Attention<float>&, const AttentionState<float>&,
                                const ParallelFor&);
template void attention_forward(const Attention<double>&, const AttentionState<double>&,
                                const ParallelFor&);

}  // namespace usp::cpu
