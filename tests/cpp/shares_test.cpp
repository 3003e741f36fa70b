// Shares of the query rows: each tile in one of them, the heaviest first, small ones last; a
// thread's next one is another head of the same rows.

#include "cpu/shares.h"

#include <gtest/gtest.h>

#include <map>
#include <random>
#include <tuple>
#include <vector>

namespace usp::cpu {
namespace {

using Tile = std::tuple<int64_t, int64_t, int64_t>;  // batch entry, head, first row

template <typename Visit>
void for_each_tile(const Shares<float>& shares, const Share& share, const Visit& visit) {
  for (int64_t number = 0; number < share.tiles.size(); ++number) {
    shares.with_tile(share, number, [&](int64_t h, Range rows) { visit(h, rows); });
  }
}

TEST(Shares, HoldEachTileOnce) {
  std::mt19937 random(3);
  for (int round = 0; round < 300; ++round) {
    Attention<float> a;
    a.group_size = 1 + random() % 3;
    a.head_offset = random() % 5;
    a.B = 1 + random() % 3;
    a.H = 1 + random() % 7;
    a.G = a.key_head(a.H - 1) + 1;
    a.Lq = 1 + random() % 2000;
    a.Lk = 100;
    a.span = {nullptr, nullptr, a.Lq, a.Lk};
    const Shares<float> shares(a, ParallelFor{1 + static_cast<int64_t>(random() % 5), nullptr});
    std::map<Tile, int> times;
    int64_t rows_held = 0;
    for (int64_t task = 0; task < shares.count(); ++task) {
      const Share& share = shares[task];
      ASSERT_GE(share.tiles.size(), 1);
      ASSERT_LE(share.tiles.size(), shares.held);
      for_each_tile(shares, share, [&](int64_t h, Range rows) {
        ASSERT_EQ(a.key_head(h), share.g);
        ++times[{share.b, h, rows.begin}];
        rows_held += rows.size();
      });
    }
    ASSERT_EQ(rows_held, a.B * a.H * a.Lq);
    for (const auto& [tile, count] : times) ASSERT_EQ(count, 1);
  }
}

// 4 rows of the first tile see all keys but one, the others a few: their share comes first,
// whichever heads there are, and the last ones are smaller.
TEST(Shares, HeaviestComesFirst) {
  constexpr int64_t kRows = 4096;
  Attention<float> a;
  a.B = 2, a.H = a.G = 3, a.Lq = a.Lk = kRows;
  std::vector<int32_t> firsts(2 * kRows, 0), stops(2 * kRows, 0);
  for (int32_t i = 0; i < kRows; ++i) {
    firsts[i] = std::max(i - 4, 0);
    stops[i] = i + 1;
    firsts[kRows + i] = i < 4 ? i + 1 : kRows;
    stops[kRows + i] = i < 4 ? kRows - 1 : kRows;
  }
  a.span = {firsts.data(), stops.data(), kRows, kRows};
  a.num_bands = 2;
  const Shares<float> shares(a, ParallelFor{2, nullptr});
  for (int64_t task = 0; task < 6; ++task) {
    bool has_first_rows = false;
    for_each_tile(shares, shares[task],
                  [&](int64_t, Range rows) { has_first_rows |= rows.begin == 0; });
    EXPECT_TRUE(has_first_rows) << task;
  }
  EXPECT_EQ(shares[0].tiles.size(), shares.held);
  EXPECT_EQ(shares[shares.count() - 1].tiles.size(), shares.held / 4);
  EXPECT_EQ(shares[shares.count() - 9].tiles.size(), shares.held);
}

// Rows behind the first few see one key each: those ride, and see each key once in each head.
TEST(Shares, FirstRowsRideAlongWithAll) {
  constexpr int64_t kRiders = 5, kRows = 1001, kKeys = 733;
  Attention<float> a;
  a.B = 2, a.H = a.G = 3, a.Lq = kRows, a.Lk = kKeys;
  std::vector<int32_t> firsts(2 * kRows, 0), stops(2 * kRows, 0);
  for (int32_t i = 0; i < kRows; ++i) {
    firsts[i] = i * kKeys / kRows;
    stops[i] = firsts[i] + 1;
    firsts[kRows + i] = i < kRiders ? stops[i] : kKeys;
    stops[kRows + i] = kKeys;
  }
  for (int32_t i = 0; i < kRiders; ++i) firsts[i] = 0;
  a.span = {firsts.data(), stops.data(), kRows, kKeys};
  a.num_bands = 2;
  const Shares<float> shares(a, ParallelFor{3, nullptr});
  ASSERT_EQ(shares.riders(), kRiders);
  int64_t rows_held = 0, first_tiles = 0;
  std::vector<int> times(a.B * a.H * kKeys, 0);
  for (int64_t task = 0; task < shares.count(); ++task) {
    const Share& share = shares[task];
    const Range keys = shares.keys_of_riders(share);
    for (int64_t j = keys.begin; j < keys.end; ++j) {
      ++times[(share.b * a.H + share.g) * kKeys + j];
    }
    first_tiles += shares.begins_head(share);
    for_each_tile(shares, share, [&](int64_t, Range rows) {
      ASSERT_GE(rows.begin, kRiders);
      rows_held += rows.size();
    });
  }
  for (const int count : times) ASSERT_EQ(count, 1);
  EXPECT_EQ(first_tiles, a.B * a.H);
  EXPECT_EQ(rows_held, a.B * a.H * (kRows - kRiders));

  stops[kRiders - 1] = kKeys - 1, firsts[kRows + kRiders - 1] = kKeys;  // sees one less
  EXPECT_EQ(Shares<float>(a, ParallelFor{3, nullptr}).riders(), kRiders - 1);
  a.group_size = 3, a.G = 1;
  EXPECT_EQ(Shares<float>(a, ParallelFor{3, nullptr}).riders(), 0);
}

// Two batch entries of 32 shares a head and 8 heads for 2 threads: 4 tasks at once.
TEST(Shares, ThreadsTakeHeadsOfTheirOwnRows) {
  constexpr int64_t kRows = 32 * kTilesHeld * kQueryTile, kThreads = 2;
  const ParallelFor parallel{kThreads, nullptr};
  Attention<float> a;
  a.B = 2, a.H = a.G = 8, a.Lq = a.Lk = kRows;
  a.span = {nullptr, nullptr, kRows, kRows};
  const Shares<float> shares(a, parallel);
  const int64_t at_once = parallel.taken_at_once(shares.count());
  ASSERT_EQ(at_once, 4);
  const int64_t whole = shares.count() - 4 * kThreads;  // the last are quarters
  for (int64_t task = 0; parallel.probably_after(task, shares.count()) < whole; ++task) {
    const Share& share = shares[task];
    const Share& next = shares[parallel.probably_after(task, shares.count())];
    EXPECT_EQ(share.b, task / at_once % kThreads);
    EXPECT_EQ(next.b, share.b);
    if (share.g + 1 == a.G) continue;
    EXPECT_EQ(next.g, share.g + 1) << task;
    EXPECT_EQ(next.tiles.begin, share.tiles.begin) << task;
  }
}

}  // namespace
}  // namespace usp::cpu
