#pragma once

// Keys that move along with the rows. Where every tile of query rows sees few tiles of keys,
// further on from one to the next, as under a window or in documents, a walk holds these and takes
// and puts a tile of keys when its time comes. Then each tile of rows passes once: it is loaded
// once, and its gradient is written once, rounded.
//
// Two exceptions are as common as the rule. The first keys may be seen by all (sinks): they stay.
// One tile of rows may see everything (registers, a class token): it passes the keys that leave,
// and its gradient is written when all have.

#include "cpu/gradient_walk.h"

namespace usp::cpu {

struct Slide {
  int64_t pinned = 0;  // the first tiles of keys, which stay
  int64_t moving = 0;  // how many others are held at once; 0: keys do not move along
  int64_t wide = -1;   // the tile of rows that sees more of them
  bool turns = false;  // they also move along from the last rows to the first
};

inline int64_t tiles_of_keys(int64_t keys) { return (keys + kKeyTile - 1) / kKeyTile; }
inline int64_t tiles_of_rows(int64_t rows) { return (rows + kQueryTile - 1) / kQueryTile; }

// In which order tiles come: as they lie, or the last ones first, but for the pinned ones.
template <typename T>
class Way {
 public:
  Way(const Attention<T>& a, int64_t pinned, bool back) : a_(a), pinned_(pinned), back_(back) {}

  int64_t steps() const { return tiles_of_rows(a_.Lq); }

  // Of a tile of rows the step, and of a step the tile.
  int64_t turned(int64_t tile) const { return back_ ? steps() - 1 - tile : tile; }

  Range rows(int64_t step) const {
    const int64_t begin = turned(step) * kQueryTile;
    return {begin, std::min(begin + kQueryTile, a_.Lq)};
  }

  // Of tiles of keys in this order.
  Range keys(Range tiles) const {
    tiles = turned(tiles);
    return {tiles.begin * kKeyTile, std::min(tiles.end * kKeyTile, a_.Lk)};
  }

  // Tiles of keys, in this order, that the rows of a step see, but for the pinned ones.
  Range seen(int64_t step) const {
    Range keys;
    for (int64_t band = 0; band < a_.num_bands; ++band) {
      const Range seen = visible_keys(a_.band(band), rows(step));
      keys = hull(keys, intersect(seen, {pinned_ * kKeyTile, a_.Lk}));
    }
    return turned(Range{keys.begin / kKeyTile, tiles_of_keys(keys.end)});
  }

 private:
  Range turned(Range tiles) const {
    if (!back_ || tiles.empty()) return tiles;
    const int64_t ends = pinned_ + tiles_of_keys(a_.Lk);
    return {ends - tiles.end, ends - tiles.begin};
  }

  const Attention<T>& a_;
  const int64_t pinned_;
  const bool back_;
};

template <typename T>
Slide slide_with(const Attention<T>& a, int64_t pinned, bool back) {
  constexpr int64_t kMost = 10;  // tiles: a window of 1024 keys has 9
  const Way<T> way(a, pinned, back);
  Slide slide{.pinned = pinned, .moving = 1};
  Range held{pinned, pinned};
  for (int64_t step = 0; step < way.steps(); ++step) {
    const Range seen = way.seen(step);
    if (seen.empty()) continue;
    if (seen.size() > kMost) {
      if (slide.wide >= 0) return {};
      slide.wide = way.turned(step);
      continue;
    }
    if (seen.begin < held.begin) return {};
    held = {seen.begin, std::max(held.end, seen.end)};
    slide.moving = std::max(slide.moving, held.size());
  }
  return slide.moving > kMost ? Slide{} : slide;
}

template <typename T>
Slide slide_of(const Attention<T>& a) {
  Slide slide = slide_with(a, 0, false);
  if (slide.moving == 0 && a.Lk > kKeyTile) slide = slide_with(a, 1, false);
  if (slide.moving == 0) return slide;
  const Slide back = slide_with(a, slide.pinned, true);
  slide.turns = back.moving > 0;
  if (slide.turns) slide.moving = std::max(slide.moving, back.moving);
  return slide;
}

// All keys of one key head past a walk. Neighbouring heads go opposite ways where they can: they
// lie on the same pages, and threads that read and write there at the same time hold each other up.
template <typename T>
class SlidingKeys {
 public:
  SlidingKeys(const Attention<T>& a, const Slide& slide, bool overwrite, GradientWalk<T>& walk,
              int64_t b, int64_t g)
      : a_(a),
        slide_(slide),
        way_(a, slide.pinned, slide.turns && g % 2 != 0),
        pinned_{0, std::min(slide.pinned * kKeyTile, a.Lk)},
        end_(tiles_of_keys(a.Lk)),
        wide_(slide.wide < 0 ? -1 : way_.turned(slide.wide)),
        all_(overwrite || slide.wide >= 0),
        walk_(walk),
        b_(b),
        g_(g),
        heads_(a.query_heads(g)),
        held_{slide.pinned, slide.pinned} {}

  // Says what will be read first.
  void expect() {
    walk_.expect_keys(b_, g_, pinned_);
    expect(after(-1));
  }

  // Calls before_last() when one tile of rows is left, to say what will be read after it.
  template <typename BeforeLast>
  void let_pass(BeforeLast&& before_last) {
    walk_.enter(b_, g_);
    if (wide_ >= 0) walk_.begin_wide();
    walk_.hold(pinned_);
    for (int64_t step = after(-1); step < way_.steps(); step = after(step)) {
      slide_to(way_.seen(step));
      pass(step, before_last);
    }
    if (all_) slide_to({end_, end_});
    leave(held_);
    put(pinned_);
    if (wide_ >= 0) walk_.put_wide(way_.rows(wide_));
  }

 private:
  int64_t after(int64_t step) const { return step + 1 == wide_ ? step + 2 : step + 1; }

  // Takes all tiles before the end of `seen`. Where somebody must pass or write those that are seen
  // by no other, these are taken too.
  void slide_to(Range seen) {
    if (!all_ && seen.empty()) return;
    if (!all_ && held_.end < seen.begin) {
      leave(held_);
      held_ = {seen.begin, seen.begin};
    }
    while (held_.end < seen.end) {
      if (held_.size() == slide_.moving) leave(leaving(seen));
      walk_.hold(way_.keys({held_.end, held_.end + 1}));
      ++held_.end;
    }
  }

  Range leaving(Range seen) const { return intersect(held_, {0, seen.begin}); }

  template <typename BeforeLast>
  void pass(int64_t step, BeforeLast&& before_last) {
    const Range rows = way_.rows(step);
    for (int64_t h = heads_.begin; h < heads_.end; ++h) {
      if (h + 1 < heads_.end) {
        walk_.expect_queries(b_, h + 1, rows);
      } else if (after(step) < way_.steps()) {
        expect(after(step));
      } else {
        before_last();
      }
      walk_.pass(h, rows, pinned_, way_.keys(held_), true);
    }
  }

  void expect(int64_t step) {
    const Range seen = way_.seen(step);
    walk_.expect_queries(b_, heads_.begin, way_.rows(step));
    if (seen.end <= held_.end) return;
    walk_.expect_keys(b_, g_, way_.keys({held_.end, seen.end}));
    walk_.expect_key_gradients(way_.keys(leaving(seen)));
  }

  void leave(Range tiles) {
    if (tiles.empty()) return;
    put(way_.keys(tiles));
    held_.begin = std::max(held_.begin, tiles.end);
  }

  void put(Range keys) {
    if (keys.empty()) return;
    if (wide_ >= 0) walk_.pass_wide(wide_rows(keys), keys);
    walk_.put_key_gradients(keys);
  }

  // From the first of the tile up to the last that sees some of the keys.
  Range wide_rows(Range keys) const {
    const Range tile = way_.rows(wide_);
    Range rows;
    for (int64_t band = 0; band < a_.num_bands; ++band) {
      rows = hull(rows, visible_queries(a_.band(band), tile, keys));
    }
    return {tile.begin, std::max(tile.begin, rows.end)};
  }

  const Attention<T>& a_;
  const Slide slide_;
  const Way<T> way_;
  const Range pinned_;  // keys
  const int64_t end_;   // of the tiles of keys
  const int64_t wide_;  // its step
  const bool all_;      // tiles of keys are taken and put
  GradientWalk<T>& walk_;
  const int64_t b_, g_;
  const Range heads_;
  Range held_;  // tiles, in the order in which they come
};

}  // namespace usp::cpu
