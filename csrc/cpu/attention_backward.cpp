// Gradients of one block, from the final lse and delta.
//
//   P^T  = exp(S^T - lse)                (keys, rows)
//   dS^T = P^T * ((V dO^T) * m - delta)  m: dropout's multiplier; dbias += dS
//   dS^T = dS^T * d softcap / dx
//   dV += (P^T * m) dO,  dK += scale dS^T Q,  dQ += scale dS K
//
// The only block writes its gradients over what is there, in their own dtype.
//
// A walk holds a few tiles of keys of one key head and passes the tiles of query rows that see
// them, each row tile's dQ in its hands and the keys' dK and dV in its own memory. Where there are
// enough heads to go round, a task walks all keys of its heads, or lets them move along with the
// rows (gradient_slide.h). Else the threads walk together, each past its own share of the rows, and
// their dK and dV are summed in order. The scores are computed once, nothing has two writers, and
// there are no atomics.
//
// Source: Dao 2023, arXiv:2307.08691, algorithm 2.

#include <algorithm>
#include <memory>
#include <vector>

#include "cpu/attention.h"
#include "cpu/gradient_slide.h"

namespace usp::cpu {
namespace {

// Where keys do not move along.
constexpr int64_t kTilesHeld = 4, kKeysHeld = kTilesHeld * kKeyTile;
constexpr Places kHoldPlaces{0, kTilesHeld};

// The tiles of query rows that may see the keys held: for the same rows head by head. Where dq is
// overwritten, all rows pass the first keys.
class Passage {
 public:
  Range heads;

  template <typename T>
  Passage(const Attention<T>& a, int64_t g, Range keys, bool all_rows)
      : heads(a.query_heads(g)), num_rows_(a.Lq) {
    std::vector<Range> runs;
    if (all_rows) {
      runs = {tiles_of({0, a.Lq})};
    } else {
      for (int64_t band = 0; band < a.num_bands; ++band) {
        const Range rows = visible_queries(a.band(band), keys);
        if (!rows.empty()) runs.push_back(tiles_of(rows));
      }
    }
    add_once_each(runs);
  }

  int64_t count() const { return num_tiles_ * heads.size(); }
  int64_t head(int64_t t) const { return heads.begin + t % heads.size(); }

  Range rows(int64_t t) const {
    int64_t tile = t / heads.size();
    auto run = runs_.begin();
    for (; tile >= run->size(); ++run) tile -= run->size();
    const int64_t begin = (run->begin + tile) * kQueryTile;
    return {begin, std::min(begin + kQueryTile, num_rows_)};
  }

  // Calls before_last() when one tile is left, to say what will be read after it.
  template <typename T, typename BeforeLast>
  void let_pass(Range tiles, int64_t b, Range keys, GradientWalk<T>& walk,
                BeforeLast&& before_last) const {
    for (int64_t t = tiles.begin; t < tiles.end; ++t) {
      if (t + 1 < tiles.end) {
        walk.expect_queries(b, head(t + 1), rows(t + 1));
      } else {
        before_last();
      }
      walk.pass(head(t), rows(t), keys, keys.begin == 0);
    }
  }

 private:
  static Range tiles_of(Range rows) {
    return {rows.begin / kQueryTile, (rows.end + kQueryTile - 1) / kQueryTile};
  }

  // Bands may share tiles.
  void add_once_each(std::vector<Range>& runs) {
    std::sort(runs.begin(), runs.end(), [](Range a, Range b) { return a.begin < b.begin; });
    for (Range run : runs) {
      if (!runs_.empty()) run.begin = std::max(run.begin, runs_.back().end);
      if (run.empty()) continue;
      runs_.push_back(run);
      num_tiles_ += run.size();
    }
  }

  int64_t num_rows_, num_tiles_ = 0;
  std::vector<Range> runs_;  // of tiles
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
  Team(const Attention<T>& a, const AttentionGradients<T>& grads, int64_t workers, Places places,
       bool with_wide = false)
      : scratch_(workers, workspace_size(a, grads, places, with_wide)) {
    workspaces_.reserve(static_cast<size_t>(workers));
    for (int64_t worker = 0; worker < workers; ++worker) {
      Carver carver(scratch_.of(worker));
      const Kernels<T>& table = kernels<T>(a.q.dtype);
      workspaces_.emplace_back(a, table, places.count, grads.dbias.data != nullptr, with_wide,
                               carver);
      walks_.emplace_back(a, grads, table, workspaces_.back(), places);
    }
  }

  GradientWalk<T>& operator[](int64_t worker) { return walks_[static_cast<size_t>(worker)]; }

 private:
  static int64_t workspace_size(const Attention<T>& a, const AttentionGradients<T>& grads,
                                Places places, bool with_wide) {
    Carver measure(nullptr);
    GradientWorkspace<T>(a, kernels<T>(a.q.dtype), places.count, grads.dbias.data != nullptr,
                         with_wide, measure);
    return measure.used();
  }

  Scratch scratch_;
  std::vector<GradientWorkspace<T>> workspaces_;
  std::vector<GradientWalk<T>> walks_;
};

// One run of keys of one key head.
struct Hold {
  int64_t b, g;
  Range keys;
};

// What is held after it, if the same walk goes on with the head `step` heads later.
template <typename T>
Hold next_hold(const Attention<T>& a, const Hold& hold, int64_t step) {
  if (hold.keys.end < a.Lk) {
    return {hold.b, hold.g, {hold.keys.end, std::min(hold.keys.end + kKeysHeld, a.Lk)}};
  }
  const int64_t head = hold.b * a.G + hold.g + step;
  if (head >= a.B * a.G) return {0, 0, {0, 0}};
  return {head / a.G, head % a.G, {0, std::min(kKeysHeld, a.Lk)}};
}

// Calls visit(hold, passage) for every run of keys that some row sees, or for all of them where
// the gradients are overwritten.
template <typename T, typename Visit>
void for_each_hold(const Attention<T>& a, int64_t b, int64_t g, bool overwrite, Visit&& visit) {
  for (int64_t begin = 0; begin < a.Lk; begin += kKeysHeld) {
    const Range keys{begin, std::min(begin + kKeysHeld, a.Lk)};
    const Passage passage(a, g, keys, overwrite && begin == 0);
    if (overwrite || passage.count() > 0) visit(Hold{b, g, keys}, passage);
  }
}

// Each walk on its own, over all keys of whole heads.
template <typename T>
void walk_apart(const Attention<T>& a, const AttentionGradients<T>& grads, const Division& division,
                const Slide& slide, const ParallelFor& parallel) {
  const int64_t head_tasks = a.G / division.head_run;
  const int64_t tasks = a.B / division.batch_run * head_tasks;
  const int64_t workers = parallel.workers_for(tasks);
  const bool overwrite = grads.results.dq != nullptr, slides = slide.moving > 0;
  Team<T> team(a, grads, workers,
               slides ? Places{slide.pinned, slide.pinned + slide.moving} : kHoldPlaces,
               slide.wide >= 0);
  const auto expect = [&](GradientWalk<T>& walk, const Hold& next) {
    walk.expect_keys(next.b, next.g, next.keys);
    const Passage after(a, next.g, next.keys, overwrite);
    if (after.count() > 0) walk.expect_queries(next.b, after.head(0), after.rows(0));
  };
  const auto slide_past = [&](GradientWalk<T>& walk, int64_t b, int64_t g) {
    SlidingKeys<T>(a, slide, overwrite, walk, b, g).let_pass([&] {
      const Hold next = next_hold(a, {b, g, {0, a.Lk}}, workers);
      if (next.keys.empty()) return;
      SlidingKeys<T>(a, slide, overwrite, walk, next.b, next.g).expect();
    });
  };
  const auto visit = [&](GradientWalk<T>& walk, const Hold& hold, const Passage& passage) {
    walk.enter(hold.b, hold.g);
    walk.hold(hold.keys);
    passage.let_pass({0, passage.count()}, hold.b, hold.keys, walk, [&] {
      walk.expect_key_gradients(hold.keys);
      expect(walk, next_hold(a, hold, workers));
    });
    walk.put_key_gradients(hold.keys);
  };
  parallel.for_each_task(tasks, [&](int64_t worker, int64_t task) {
    const int64_t b0 = task / head_tasks * division.batch_run;
    const int64_t g0 = task % head_tasks * division.head_run;
    for (int64_t b = b0; b < b0 + division.batch_run; ++b) {
      for (int64_t g = g0; g < g0 + division.head_run; ++g) {
        if (slides) {
          slide_past(team[worker], b, g);
          continue;
        }
        for_each_hold(a, b, g, overwrite, [&](const Hold& hold, const Passage& passage) {
          visit(team[worker], hold, passage);
        });
      }
    }
  });
}

// All walks over the same keys, each past its share of the rows.
template <typename T>
void walk_together(const Attention<T>& a, const AttentionGradients<T>& grads,
                   const Division& division, const ParallelFor& parallel) {
  Team<T> team(a, grads, division.shares, kHoldPlaces);
  const auto visit = [&](const Hold& hold, const Passage& passage) {
    parallel.for_each_task(division.shares, [&](int64_t, int64_t share) {
      team[share].enter(hold.b, hold.g);
      team[share].hold(hold.keys);
      passage.let_pass(division.share(share, passage), hold.b, hold.keys, team[share], [&] {
        if (share == 0) team[share].expect_key_gradients(hold.keys);
        const Hold next = next_hold(a, hold, 1);
        team[share].expect_keys(next.b, next.g, next.keys);
      });
    });
    for (int64_t share = 1; share < division.shares; ++share) {
      team[0].take_key_gradients_of(team[share], hold.keys);
    }
    team[0].put_key_gradients(hold.keys);
  };
  for (int64_t head = 0; head < a.B * a.G; ++head) {
    for_each_hold(a, head / a.G, head % a.G, grads.results.dq != nullptr, visit);
  }
}

// Results of a block without queries or keys.
template <typename T>
void clear(const Attention<T>& a, const GradientResults& results) {
  const auto clear_one = [](void* data, int64_t count, DType dtype) {
    if (data != nullptr) std::memset(data, 0, static_cast<size_t>(count * element_size(dtype)));
  };
  clear_one(results.dq, a.B * a.Lq * a.H * a.D, results.dq_dtype);
  clear_one(results.dk, a.B * a.Lk * a.G * a.D, results.kv_dtype);
  clear_one(results.dv, a.B * a.Lk * a.G * a.Dv, results.kv_dtype);
}

// Whether keys move along, and how: not where threads walk together.
template <typename T>
Slide slide_in(const Attention<T>& a, const Division& division) {
  return division.shares == 1 ? slide_of(a) : Slide{};
}

template <typename T>
void walk(const Attention<T>& a, const AttentionGradients<T>& grads, const ParallelFor& parallel) {
  const Division division(a, grads.dbias, parallel.num_threads);
  if (division.shares > 1) return walk_together(a, grads, division, parallel);
  walk_apart(a, grads, division, slide_in(a, division), parallel);
}

// Whether a row's dq is complete when it is first written.
template <typename T>
bool rows_pass_once(const Attention<T>& a, const AttentionGradients<T>& grads,
                    const ParallelFor& parallel) {
  const Slide slide = slide_in(a, Division(a, grads.dbias, parallel.num_threads));
  return slide.moving > 0 || a.Lk <= kKeysHeld;
}

// dq is summed over passes in its own memory. Where that is too narrow for sums, they are
// made beside it and rounded once.
template <typename T>
void walk_beside_dq(const Attention<T>& a, AttentionGradients<T> grads,
                    const ParallelFor& parallel) {
  const int64_t rows = a.B * a.Lq * a.H;
  const std::unique_ptr<T[]> sums(new T[static_cast<size_t>(rows * a.D)]);
  char* dq = static_cast<char*>(grads.results.dq);
  const DType dtype = grads.results.dq_dtype;
  grads.results.dq = sums.get();
  grads.results.dq_dtype = kDType<T>;
  walk(a, grads, parallel);
  constexpr int64_t kRowsPerTask = 1024;
  const Kernels<T>& table = kernels<T>(a.q.dtype);
  const int64_t row_bytes = a.D * element_size(dtype);
  parallel.for_each_task((rows + kRowsPerTask - 1) / kRowsPerTask, [&](int64_t, int64_t task) {
    const int64_t begin = task * kRowsPerTask, count = std::min(kRowsPerTask, rows - begin);
    table.store_rows({sums.get() + begin * a.D, a.D}, count, a.D, T(1), nullptr, dtype,
                     dq + begin * row_bytes, a.D);
  });
}

}  // namespace

template <typename T>
void attention_backward(const Attention<T>& a, const AttentionGradients<T>& grads,
                        const ParallelFor& parallel) {
  const GradientResults& results = grads.results;
  if (a.B == 0 || a.H == 0 || a.Lq == 0 || a.Lk == 0) return clear(a, results);
  const bool narrow = results.dq != nullptr && results.dq_dtype != kDType<T>;
  if (narrow && !rows_pass_once(a, grads, parallel)) return walk_beside_dq(a, grads, parallel);
  walk(a, grads, parallel);
}

template void attention_backward(const Attention<float>&, const AttentionGradients<float>&,
                                 const ParallelFor&);
template void attention_backward(const Attention<double>&, const AttentionGradients<double>&,
                                 const ParallelFor&);

}  // namespace usp::cpu
