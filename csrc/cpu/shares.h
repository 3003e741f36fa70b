#pragma once

// How the tiles of query rows are cut into tasks: shares of neighbouring tiles, heaviest first.

#include <algorithm>
#include <bit>
#include <vector>

#include "cpu/parallel.h"
#include "cpu/tiles.h"

namespace usp::cpu {

// The tiles of query rows that a task holds: keys and values that it loads serve all of them.
inline constexpr int64_t kTilesHeld = 8;

inline constexpr int64_t kMostRiders = 16;

// Some tiles of query rows that read one key head, counted from the last rows, and for the same
// rows head by head.
struct Share {
  int64_t b = 0, g = 0;
  Range tiles;
  int weight = 0;  // of its heaviest tile: how many bits its number of keys has
};

template <typename T>
class Shares {
 public:
  const int64_t held;  // tiles of one share, at most

  Shares(const Attention<T>& a, const ParallelFor& parallel)
      : held(tiles_held(a, parallel.num_threads)), a_(a), row_tiles_(row_tiles(a)) {
    const int64_t threads = parallel.num_threads;
    const int64_t tiles = row_tiles_ * std::min(a.group_size, a.H);
    const int64_t of_head = (tiles + held - 1) / held, of_heads = a.B * of_head;
    const int64_t stretch = (of_heads + threads - 1) / threads;
    const int64_t at_once = std::min(parallel.taken_at_once(of_heads * a.G), a.G);
    if (a.group_size == 1 && of_head > 1 && !a.span.sees_all()) riders_ = count_riders();
    const std::vector<int> weights = weights_of_tiles();
    // Each thread has its own stretch of rows, which it takes head by head: heads lie beside each
    // other, so it stays on few pages of memory, and far from those that others write.
    for (int64_t i = 0; i < stretch; ++i) {
      for (int64_t begin = 0; begin < a.G; begin += at_once) {
        for (int64_t at = i; at < of_heads; at += stretch) {
          for (int64_t g = begin; g < std::min(begin + at_once, a.G); ++g) {
            const int64_t tile = at % of_head * held;
            add({at / of_head, g, {tile, tile + held}}, weights);
          }
        }
      }
    }
    // What is about as heavy stays in its order.
    std::stable_sort(shares_.begin(), shares_.end(), [](const Share& one, const Share& other) {
      return one.weight > other.weight;
    });
    if (threads > 1) split_last(threads);
  }

  int64_t count() const { return static_cast<int64_t>(shares_.size()); }
  const Share& operator[](int64_t task) const { return shares_[static_cast<size_t>(task)]; }

  // How many of the first rows are in no tile, but ride along with each share (riders.h).
  int64_t riders() const { return riders_; }

  // The keys that they see with it: each key with one share of a head.
  Range keys_of_riders(const Share& share) const {
    return {a_.Lk * (row_tiles_ - share.tiles.end) / row_tiles_,
            a_.Lk * (row_tiles_ - share.tiles.begin) / row_tiles_};
  }

  // Whether the tile of the first rows is in it.
  bool begins_head(const Share& share) const { return share.tiles.end == row_tiles_; }

  // Calls visit(h, rows) for one of its tiles.
  template <typename Visit>
  void with_tile(const Share& share, int64_t number, Visit&& visit) const {
    const Range own = a_.query_heads(share.g);
    const int64_t t = share.tiles.begin + number;
    visit(own.begin + t % own.size(), rows(t / own.size()));
  }

 private:
  static int64_t row_tiles(const Attention<T>& a) { return (a.Lq + kQueryTile - 1) / kQueryTile; }

  // As many as leave several tasks to each thread.
  static int64_t tiles_held(const Attention<T>& a, int64_t threads) {
    constexpr int64_t kTasksPerThread = 8;
    return std::clamp<int64_t>(a.B * a.H * row_tiles(a) / (kTasksPerThread * threads), 1,
                               kTilesHeld);
  }

  Range rows(int64_t from_last) const {
    const int64_t begin = (row_tiles_ - 1 - from_last) * kQueryTile;
    return {std::max(begin, riders_), std::min(begin + kQueryTile, a_.Lq)};
  }

  // The first rows that see all keys, where no tile behind theirs sees many.
  int64_t count_riders() const {
    constexpr int64_t kFewer = 4;
    for (int64_t t = 0; t + 1 < row_tiles_; ++t) {
      if (kFewer * keys_seen(rows(t)) > a_.Lk) return 0;
    }
    int64_t count = 0;
    while (count <= kMostRiders && keys_seen({count, count + 1}) == a_.Lk) ++count;
    return count <= kMostRiders ? count : 0;
  }

  int64_t keys_seen(Range rows) const {
    int64_t keys = 0;
    for (int64_t band = 0; band < a_.num_bands; ++band) {
      keys += visible_keys(a_.band(band), rows).size();
    }
    return keys;
  }

  std::vector<int> weights_of_tiles() const {
    std::vector<int> weights(static_cast<size_t>(row_tiles_));
    for (int64_t t = 0; t < row_tiles_; ++t) {
      const auto keys = static_cast<uint64_t>(keys_seen(rows(t)));
      weights[static_cast<size_t>(t)] = static_cast<int>(std::bit_width(keys));
    }
    return weights;
  }

  // The last key head may serve fewer.
  void add(Share share, const std::vector<int>& weights) {
    const int64_t heads = a_.query_heads(share.g).size();
    share.tiles = intersect(share.tiles, {0, row_tiles_ * heads});
    if (share.tiles.empty()) return;
    const auto begin = weights.begin() + share.tiles.begin / heads;
    share.weight = *std::max_element(begin, weights.begin() + (share.tiles.end - 1) / heads + 1);
    shares_.push_back(share);
  }

  // So that all threads end at about the same time.
  void split_last(int64_t threads) {
    constexpr int64_t kParts = 4;
    const int64_t kept = std::max<int64_t>(count() - threads, 0);
    const std::vector<Share> last(shares_.begin() + kept, shares_.end());
    shares_.resize(static_cast<size_t>(kept));
    for (const Share& share : last) {
      const int64_t size = (share.tiles.size() + kParts - 1) / kParts;
      for (int64_t begin = share.tiles.begin; begin < share.tiles.end; begin += size) {
        shares_.push_back(
            {share.b, share.g, intersect({begin, begin + size}, share.tiles), share.weight});
      }
    }
  }

  const Attention<T>& a_;
  const int64_t row_tiles_;
  int64_t riders_ = 0;
  std::vector<Share> shares_;
};

}  // namespace usp::cpu
