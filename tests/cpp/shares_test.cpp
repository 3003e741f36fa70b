// Shares of the query rows: each tile in one of them, the heaviest first, small ones last.

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
    const Shares<float> shares(a, 1 + random() % 5);
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

// 4 rows of the first tile see all keys, the others a few: their share comes first, whichever
// heads there are, and the last ones are smaller.
TEST(Shares, HeaviestComesFirst) {
  constexpr int64_t kRows = 4096;
  Attention<float> a;
  a.B = 2, a.H = a.G = 3, a.Lq = a.Lk = kRows;
  std::vector<int32_t> firsts(2 * kRows, 0), stops(2 * kRows, 0);
  for (int32_t i = 0; i < kRows; ++i) {
    firsts[i] = std::max(i - 4, 0);
    stops[i] = i + 1;
    firsts[kRows + i] = i < 4 ? i + 1 : kRows;
    stops[kRows + i] = kRows;
  }
  a.span = {firsts.data(), stops.data(), kRows, kRows};
  a.num_bands = 2;
  const Shares<float> shares(a, 2);
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

}  // namespace
}  // namespace usp::cpu
