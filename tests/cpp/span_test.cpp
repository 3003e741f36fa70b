#include "common/span.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <random>
#include <vector>

namespace usp {
namespace {

struct Ends {
  std::vector<int32_t> first, stop;
  int64_t num_keys;

  Span span() const {
    return {first.data(), stop.data(), static_cast<int64_t>(first.size()), num_keys};
  }
  bool sees(int64_t i, int64_t j) const { return first[i] <= j && j < stop[i]; }
};

Ends random_ends(std::mt19937& random, int64_t num_queries, int64_t num_keys) {
  std::uniform_int_distribution<int32_t> key(0, static_cast<int32_t>(num_keys));
  Ends ends{{}, {}, num_keys};
  for (auto* side : {&ends.first, &ends.stop}) {
    for (int64_t i = 0; i < num_queries; ++i) side->push_back(key(random));
    std::sort(side->begin(), side->end());
  }
  for (int64_t i = 0; i < num_queries; ++i) {
    if (ends.first[i] > ends.stop[i]) std::swap(ends.first[i], ends.stop[i]);
  }
  return ends;
}

bool operator==(Range a, Range b) {
  return (a.empty() && b.empty()) || (a.begin == b.begin && a.end == b.end);
}

TEST(Span, WithoutEndsEveryQuerySeesEveryKey) {
  const Span all{nullptr, nullptr, 5, 9};
  EXPECT_TRUE(visible_keys(all, {1, 3}) == (Range{0, 9}));
  EXPECT_TRUE(unmasked_keys(all, {1, 3}) == (Range{0, 9}));
  EXPECT_TRUE(visible_queries(all, {2, 4}) == (Range{0, 5}));
  EXPECT_TRUE(unmasked_queries(all, {2, 4}) == (Range{0, 5}));
  EXPECT_TRUE(sees_any(all, {0, 1}, {8, 9}));
}

TEST(Span, OfNoRowsOrNoKeysIsEmpty) {
  const Ends ends{{0, 0}, {1, 2}, 2};
  EXPECT_TRUE(visible_keys(ends.span(), {1, 1}).empty());
  EXPECT_TRUE(unmasked_keys(ends.span(), {1, 1}).empty());
  EXPECT_TRUE(visible_queries(ends.span(), {1, 1}).empty());
  EXPECT_TRUE(unmasked_queries(ends.span(), {1, 1}).empty());
  EXPECT_FALSE(sees_any(ends.span(), {0, 2}, {1, 1}));
}

TEST(Span, CausalByHand) {
  const Ends causal{{0, 0, 0, 0}, {1, 2, 3, 4}, 4};
  EXPECT_TRUE(visible_keys(causal.span(), {1, 3}) == (Range{0, 3}));
  EXPECT_TRUE(unmasked_keys(causal.span(), {1, 3}) == (Range{0, 2}));
  EXPECT_TRUE(visible_queries(causal.span(), {1, 3}) == (Range{1, 4}));
  EXPECT_TRUE(unmasked_queries(causal.span(), {1, 3}) == (Range{2, 4}));
}

// Every answer against the definition, on random monotone spans.
TEST(Span, RandomAgainstDefinition) {
  std::mt19937 random(7);
  for (int trial = 0; trial < 400; ++trial) {
    const int64_t num_queries = 1 + static_cast<int64_t>(random() % 23);
    const int64_t num_keys = 1 + static_cast<int64_t>(random() % 31);
    const Ends ends = random_ends(random, num_queries, num_keys);
    const Span span = ends.span();
    const int64_t i0 = static_cast<int64_t>(random() % num_queries);
    const int64_t j0 = static_cast<int64_t>(random() % num_keys);
    const Range rows{i0, i0 + 1 + static_cast<int64_t>(random() % (num_queries - i0))};
    const Range keys{j0, j0 + 1 + static_cast<int64_t>(random() % (num_keys - j0))};

    bool any_in_tile = false;
    for (int64_t i = 0; i < num_queries; ++i) {
      bool any = false, all = true;
      for (int64_t j = keys.begin; j < keys.end; ++j) {
        any |= ends.sees(i, j);
        all &= ends.sees(i, j);
      }
      const Range row{i, i + 1};
      EXPECT_TRUE(!any || visible_queries(span, keys).contains(row));
      EXPECT_EQ(unmasked_queries(span, keys).contains(row), all);
      if (any && rows.contains(row)) any_in_tile = true;
    }
    EXPECT_EQ(sees_any(span, rows, keys), any_in_tile);
    for (int64_t j = 0; j < num_keys; ++j) {
      bool any = false, all = true;
      for (int64_t i = rows.begin; i < rows.end; ++i) {
        any |= ends.sees(i, j);
        all &= ends.sees(i, j);
      }
      EXPECT_TRUE(!any || visible_keys(span, rows).contains({j, j + 1}));
      EXPECT_EQ(unmasked_keys(span, rows).contains({j, j + 1}), all);
    }
  }
}

}  // namespace
}  // namespace usp
