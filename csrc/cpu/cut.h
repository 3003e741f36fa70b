#pragma once

// How an edge of the mask cuts a tile of scores. Its rows are taken in strips, each with the run of
// the tile's keys that it sees. Scores of keys are computed in blocks, each for all strips that see
// some of it, and products with weights a few rows at a time; what is in no strip is never read.

#include <algorithm>

#include "common/span.h"

namespace usp::cpu {

// Columns of a tile of scores, which are rows of queries; those of them that see something; and
// keys.
struct Strip {
  Range columns, rows, keys;
};

// Of `keys` what the rows see, counted from the first of these, in whole `unit`s: a power of two.
inline Range seen_in(const Span& span, Range rows, Range keys, int64_t unit) {
  const Range seen = intersect(visible_keys(span, rows), keys);
  const int64_t begin = seen.begin - keys.begin, end = seen.end - keys.begin;
  return {begin & -unit, std::min((end + unit - 1) & -unit, keys.size())};
}

class Cut {
 public:
  static constexpr int64_t kRows = 16;  // of a strip, and keys of a block
  static constexpr int64_t kMostRows = 64, kMostKeys = 128;

  bool empty() const { return num_strips_ == 0; }

  // Cuts the tile where strips of its rows see some of `keys`. The last strip has columns up to
  // `columns`, without rows.
  void set(const Span& span, Range rows, Range keys, int64_t columns, int64_t unit) {
    num_strips_ = num_blocks_ = 0;
    for (int64_t at = 0; at < columns; at += kRows) {
      const Range some =
          rows_that_see(span, intersect({rows.begin + at, rows.begin + at + kRows}, rows), keys);
      if (some.empty()) continue;
      add({{at, std::min(at + kRows, columns)},
           {some.begin - rows.begin, some.end - rows.begin},
           seen_in(span, some, keys, unit)});
    }
    for (int64_t begin = 0; begin < keys.size(); begin += kRows) {
      add_blocks({begin, std::min(begin + kRows, keys.size())});
    }
  }

  // Whether each of the rows sees some key, but for those between others that do.
  bool covers(int64_t rows) const {
    for_each_strip([&](const Strip& strip) { rows -= strip.rows.size(); });
    return rows == 0;
  }

  template <typename Visit>
  void for_each_strip(const Visit& visit) const {
    for (int64_t i = 0; i < num_strips_; ++i) visit(strips_[i]);
  }

  // Blocks of keys with neighbouring strips that see some of them, by their keys.
  template <typename Visit>
  void for_each_block(const Visit& visit) const {
    for (int64_t i = 0; i < num_blocks_; ++i) visit(blocks_[i]);
  }

 private:
  static bool same(Range a, Range b) { return a.begin == b.begin && a.end == b.end; }

  static Range rows_that_see(const Span& span, Range rows, Range keys) {
    const auto sees = [&](int64_t row) {
      return !intersect({span.first[row], span.stop[row]}, keys).empty();
    };
    while (!rows.empty() && !sees(rows.begin)) ++rows.begin;
    while (!rows.empty() && !sees(rows.end - 1)) --rows.end;
    return rows;
  }

  // A strip that sees what the one before it sees is taken with it.
  void add(const Strip& strip) {
    if (num_strips_ > 0) {
      Strip& last = strips_[num_strips_ - 1];
      if (last.columns.end == strip.columns.begin && same(last.keys, strip.keys)) {
        last.columns.end = strip.columns.end;
        last.rows.end = strip.rows.end;
        return;
      }
    }
    strips_[num_strips_++] = strip;
  }

  // Neighbouring strips that see some of the keys. Rows that see nothing at all may part them.
  void add_blocks(Range keys) {
    Strip block{{}, {}, keys};
    for_each_strip([&](const Strip& strip) {
      if (intersect(strip.keys, keys).empty()) return;
      if (!block.columns.empty() && block.columns.end != strip.columns.begin) {
        add_block(block);
        block = {{}, {}, keys};
      }
      block.columns = hull(block.columns, strip.columns);
      block.rows = hull(block.rows, strip.rows);
    });
    if (!block.columns.empty()) add_block(block);
  }

  // A block with the strips of the one before it is taken with it.
  void add_block(const Strip& block) {
    if (num_blocks_ > 0) {
      Strip& last = blocks_[num_blocks_ - 1];
      if (last.keys.end == block.keys.begin && same(last.columns, block.columns)) {
        last.keys.end = block.keys.end;
        last.rows = hull(last.rows, block.rows);
        return;
      }
    }
    blocks_[num_blocks_++] = block;
  }

  int64_t num_strips_ = 0, num_blocks_ = 0;
  Strip strips_[kMostRows / kRows];
  Strip blocks_[kMostKeys / kRows * 2];  // four strips have two parts at most
};

}  // namespace usp::cpu
