#pragma once

// How the tiles of query rows are cut into tasks: shares of neighbouring tiles, heaviest first.

#include <algorithm>
#include <bit>
#include <vector>

#include "cpu/tiles.h"

namespace usp::cpu {

// The tiles of query rows that a task holds: keys and values that it loads serve all of them.
inline constexpr int64_t kTilesHeld = 8;

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

  Shares(const Attention<T>& a, int64_t threads)
      : held(tiles_held(a, threads)), a_(a), row_tiles_(row_tiles(a)) {
    const int64_t tiles = row_tiles_ * std::min(a.group_size, a.H);
    const std::vector<int> weights = weights_of_tiles();
    for (int64_t b = 0; b < a.B; ++b) {
      for (int64_t g = 0; g < a.G; ++g) {
        for (int64_t begin = 0; begin < tiles; begin += held) {
          add({b, g, {begin, begin + held}}, weights);
        }
      }
    }
    // Neighbours read the same keys: what is about as heavy stays in its order.
    std::stable_sort(shares_.begin(), shares_.end(), [](const Share& one, const Share& other) {
      return one.weight > other.weight;
    });
    if (threads > 1) split_last(threads);
  }

  int64_t count() const { return static_cast<int64_t>(shares_.size()); }
  const Share& operator[](int64_t task) const { return shares_[static_cast<size_t>(task)]; }

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
    return {begin, std::min(begin + kQueryTile, a_.Lq)};
  }

  std::vector<int> weights_of_tiles() const {
    std::vector<int> weights(static_cast<size_t>(row_tiles_));
    for (int64_t t = 0; t < row_tiles_; ++t) {
      uint64_t keys = 0;
      for (int64_t band = 0; band < a_.num_bands; ++band) {
        keys += static_cast<uint64_t>(visible_keys(a_.band(band), rows(t)).size());
      }
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
  std::vector<Share> shares_;
};

}  // namespace usp::cpu
