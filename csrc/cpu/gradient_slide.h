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
};

inline int64_t tiles_of_keys(int64_t keys) { return (keys + kKeyTile - 1) / kKeyTile; }
inline int64_t tiles_of_rows(int64_t rows) { return (rows + kQueryTile - 1) / kQueryTile; }

template <typename T>
Range rows_of_tile(const Attention<T>& a, int64_t tile) {
  return {tile * kQueryTile, std::min((tile + 1) * kQueryTile, a.Lq)};
}

// Tiles of keys that a tile of rows sees, but for the pinned ones.
template <typename T>
Range moving_tiles(const Attention<T>& a, int64_t pinned, int64_t tile) {
  Range keys;
  for (int64_t band = 0; band < a.num_bands; ++band) {
    const Range seen = visible_keys(a.band(band), rows_of_tile(a, tile));
    keys = hull(keys, intersect(seen, {pinned * kKeyTile, a.Lk}));
  }
  return {keys.begin / kKeyTile, tiles_of_keys(keys.end)};
}

template <typename T>
Slide slide_with(const Attention<T>& a, int64_t pinned) {
  constexpr int64_t kMost = 10;  // tiles: a window of 1024 keys has 9
  Slide slide{.pinned = pinned, .moving = 1};
  Range held{pinned, pinned};
  for (int64_t tile = 0; tile < tiles_of_rows(a.Lq); ++tile) {
    const Range seen = moving_tiles(a, pinned, tile);
    if (seen.empty()) continue;
    if (seen.size() > kMost) {
      if (slide.wide >= 0) return {};
      slide.wide = tile;
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
  const Slide slide = slide_with(a, 0);
  return slide.moving > 0 || a.Lk <= kKeyTile ? slide : slide_with(a, 1);
}

// All keys of one key head past a walk.
template <typename T>
class SlidingKeys {
 public:
  SlidingKeys(const Attention<T>& a, const Slide& slide, bool overwrite, GradientWalk<T>& walk)
      : a_(a), slide_(slide), all_(overwrite || slide.wide >= 0), walk_(walk) {}

  // Calls before_last() when one tile of rows is left, to say what will be read after it.
  template <typename BeforeLast>
  void let_pass(int64_t b, int64_t g, BeforeLast&& before_last) {
    b_ = b;
    g_ = g;
    heads_ = a_.query_heads(g);
    held_ = {slide_.pinned, slide_.pinned};
    walk_.enter(b, g);
    if (slide_.wide >= 0) walk_.begin_wide();
    walk_.hold(keys({0, slide_.pinned}));
    for (int64_t tile = after(-1); tile < tiles_of_rows(a_.Lq); tile = after(tile)) {
      slide_to(moving_tiles(a_, slide_.pinned, tile));
      pass(tile, before_last);
    }
    const int64_t end = tiles_of_keys(a_.Lk);
    if (all_) slide_to({end, end});
    put(held_);
    put({0, slide_.pinned});
    if (slide_.wide >= 0) walk_.put_wide(rows_of_tile(a_, slide_.wide));
  }

 private:
  Range keys(Range tiles) const {
    return {tiles.begin * kKeyTile, std::min(tiles.end * kKeyTile, a_.Lk)};
  }

  int64_t after(int64_t tile) const { return tile + 1 == slide_.wide ? tile + 2 : tile + 1; }

  // Takes all tiles before the end of `seen`. Where somebody must pass or write those that are seen
  // by no other, these are taken too.
  void slide_to(Range seen) {
    if (!all_ && seen.empty()) return;
    if (!all_ && held_.end < seen.begin) {
      put(held_);
      held_ = {seen.begin, seen.begin};
    }
    while (held_.end < seen.end) {
      if (held_.size() == slide_.moving) put(leaving(seen));
      walk_.hold(keys({held_.end, held_.end + 1}));
      ++held_.end;
    }
  }

  Range leaving(Range seen) const { return intersect(held_, {0, seen.begin}); }

  template <typename BeforeLast>
  void pass(int64_t tile, BeforeLast&& before_last) {
    const Range rows = rows_of_tile(a_, tile);
    for (int64_t h = heads_.begin; h < heads_.end; ++h) {
      if (h + 1 < heads_.end) {
        walk_.expect_queries(b_, h + 1, rows);
      } else if (after(tile) < tiles_of_rows(a_.Lq)) {
        expect(after(tile));
      } else {
        before_last();
      }
      walk_.pass(h, rows, keys({0, slide_.pinned}), keys(held_), true);
    }
  }

  void expect(int64_t tile) {
    const Range seen = moving_tiles(a_, slide_.pinned, tile);
    walk_.expect_queries(b_, heads_.begin, rows_of_tile(a_, tile));
    if (seen.end <= held_.end) return;
    walk_.expect_keys(b_, g_, keys({held_.end, seen.end}));
    walk_.expect_key_gradients(keys(leaving(seen)));
  }

  void put(Range tiles) {
    if (tiles.empty()) return;
    if (slide_.wide >= 0) walk_.pass_wide(wide_rows(keys(tiles)), keys(tiles));
    walk_.put_key_gradients(keys(tiles));
    held_.begin = std::max(held_.begin, tiles.end);
  }

  // From the first of the tile up to the last that sees some of the keys.
  Range wide_rows(Range keys) const {
    const Range tile = rows_of_tile(a_, slide_.wide);
    Range rows;
    for (int64_t band = 0; band < a_.num_bands; ++band) {
      rows = hull(rows, visible_queries(a_.band(band), tile, keys));
    }
    return {tile.begin, std::max(tile.begin, rows.end)};
  }

  const Attention<T>& a_;
  const Slide slide_;
  const bool all_;  // tiles of keys are taken and put
  GradientWalk<T>& walk_;
  int64_t b_ = 0, g_ = 0;
  Range heads_, held_;  // tiles
};

}  // namespace usp::cpu
