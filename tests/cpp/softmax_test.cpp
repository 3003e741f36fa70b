#include "common/softmax.h"

#include <gtest/gtest.h>

#include <vector>

namespace usp {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

struct Row {
  double lse, out;
};

// Scores s and scalar values v, in one go and in plain arithmetic.
Row dense(const std::vector<double>& s, const std::vector<double>& v) {
  double max = -kInfinity, sum = 0, out = 0;
  for (double x : s) max = std::max(max, x);
  if (max == -kInfinity) return {-kInfinity, 0};
  for (size_t j = 0; j < s.size(); ++j) {
    sum += std::exp(s[j] - max);
    out += std::exp(s[j] - max) * v[j];
  }
  return {max + std::log(sum), out / sum};
}

Row continued(Row state, const std::vector<double>& s, const std::vector<double>& v) {
  auto running = RunningSoftmax<double>::from_lse(state.lse);
  double accumulator = state.out;
  for (size_t j = 0; j < s.size(); ++j) {
    accumulator *= running.raise(s[j]);
    accumulator += running.add(s[j]) * v[j];
  }
  return {running.lse(), accumulator * running.normaliser()};
}

constexpr Row kEmpty{-kInfinity, 0};
const std::vector<double> kScores{0.3, -kInfinity, 2.5, -700.0, 700.0, 699.5};
const std::vector<double> kValues{1.0, 5.0, -2.0, 3.0, 0.25, -1.5};

TEST(RunningSoftmax, EqualsDense) {
  const Row expected = dense(kScores, kValues), row = continued(kEmpty, kScores, kValues);
  EXPECT_NEAR(row.lse, expected.lse, 1e-12);
  EXPECT_NEAR(row.out, expected.out, 1e-12);
}

TEST(RunningSoftmax, ContinuesFromAFinishedState) {
  for (size_t cut = 0; cut <= kScores.size(); ++cut) {
    const auto middle = static_cast<std::ptrdiff_t>(cut);
    const Row first = continued(kEmpty, {kScores.begin(), kScores.begin() + middle},
                                {kValues.begin(), kValues.begin() + middle});
    const Row row = continued(first, {kScores.begin() + middle, kScores.end()},
                              {kValues.begin() + middle, kValues.end()});
    const Row expected = dense(kScores, kValues);
    EXPECT_NEAR(row.lse, expected.lse, 1e-12);
    EXPECT_NEAR(row.out, expected.out, 1e-12);
  }
}

// A maximum below lse: the largest new weight is exp(0) although the row has seen more before.
TEST(RunningSoftmax, ContinuesWithHeadroom) {
  const double lse = 3.5, score = 1.25, headroom = 16;
  auto running = RunningSoftmax<double>::from_lse(lse, headroom, std::exp(headroom));
  EXPECT_NEAR(running.lse(), lse, 1e-14);
  running.raise(score);
  EXPECT_EQ(running.add(score), 1.0);
  EXPECT_NEAR(running.lse(), std::log(std::exp(lse) + std::exp(score)), 1e-14);
  EXPECT_EQ(RunningSoftmax<double>::from_lse(-kInfinity, headroom, 2.0).lse(), -kInfinity);
}

TEST(RunningSoftmax, OfNothingStaysEmpty) {
  const Row row = continued(kEmpty, {-kInfinity, -kInfinity}, {1.0, 2.0});
  EXPECT_EQ(row.lse, -kInfinity);
  EXPECT_EQ(row.out, 0.0);
}

TEST(RunningSoftmax, ThatSeesNothingMoreKeepsItsBits) {
  const Row before{1.2345678901234567, 0.1};
  const Row row = continued(before, {-kInfinity}, {9.0});
  EXPECT_EQ(row.lse, before.lse);
  EXPECT_EQ(row.out, before.out);
}

TEST(RunningSoftmax, NaNStaysVisible) {
  auto running = RunningSoftmax<double>::from_lse(-kInfinity);
  running.raise(std::nan(""));
  running.add(std::nan(""));
  EXPECT_TRUE(std::isnan(running.lse()));
}

TEST(BackwardLse, MakesProbabilitiesOfEmptyRowsZero) {
  EXPECT_EQ(std::exp(3.0f - backward_lse(minus_infinity<float>())), 0.0f);
  EXPECT_EQ(std::exp(minus_infinity<float>() - backward_lse(minus_infinity<float>())), 0.0f);
  EXPECT_EQ(backward_lse(1.5f), 1.5f);
}

}  // namespace
}  // namespace usp
