// The tile kernels of every instruction set that this machine has, against plain loops.

#include "cpu/kernels.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <optional>
#include <random>
#include <vector>

#include "cpu/fastest.h"
#include "cpu/tiles.h"

namespace usp::cpu {
namespace {

template <typename T>
class TileKernels : public testing::Test {
 protected:
  template <typename Body>
  void on_each_capability(Body&& body) {
    for (const Capability capability : capabilities_built()) {
      if (!has(capability)) continue;
      SCOPED_TRACE(name(capability));
      body(kernels_of<T>(capability, DType::kFloat32));
    }
  }

  std::vector<T> randoms(int64_t count, double low = -1, double high = 1) {
    std::uniform_real_distribution<double> value(low, high);
    std::vector<T> result(static_cast<size_t>(count));
    for (T& x : result) x = static_cast<T>(value(random_));
    return result;
  }

  static constexpr T kEpsilon = std::numeric_limits<T>::epsilon();
  std::mt19937 random_{11};
};

using Arithmetic = testing::Types<float, double>;
TYPED_TEST_SUITE(TileKernels, Arithmetic);

TYPED_TEST(TileKernels, Gemm) {
  using T = TypeParam;
  this->on_each_capability([&](const Kernels<T>& table) {
    for (int64_t m = 1; m <= 20; ++m) {
      for (const int64_t n : {16, 32, 48, 64, 80, 144}) {
        for (const int64_t k : {0, 1, 7, 33}) {
          for (const bool transposed : {false, true}) {
            const int64_t lda = (transposed ? m : k) + 3, ldb = n + 5, ldc = n + 1;
            const auto a = this->randoms((transposed ? k : m) * lda), b = this->randoms(k * ldb);
            const auto before = this->randoms(m * ldc), factor = this->randoms(m);
            const std::vector<T> ones(factor.size(), T(1)), none(factor.size(), T(0));
            for (const auto& kept : {none, ones, factor}) {
              auto c = before;
              table.gemm({m,
                          n,
                          k,
                          {a.data(), lda, transposed},
                          {b.data(), ldb},
                          {c.data(), ldc},
                          {T(0.5), kept != none, kept == factor ? factor.data() : nullptr}});
              for (int64_t i = 0; i < m; ++i) {
                for (int64_t j = 0; j < ldc; ++j) {
                  T expected = before[i * ldc + j] * (j < n ? kept[i] : T(1));
                  for (int64_t p = 0; p < k && j < n; ++p) {
                    expected +=
                        T(0.5) * (transposed ? a[p * lda + i] : a[i * lda + p]) * b[p * ldb + j];
                  }
                  ASSERT_NEAR(c[i * ldc + j], expected, 50 * this->kEpsilon);
                }
              }
            }
          }
        }
      }
    }
  });
}

// Vectors here end where their elements end: the sanitizers see what is read past a row.
TYPED_TEST(TileKernels, RightTranspose) {
  using T = TypeParam;
  this->on_each_capability([&](const Kernels<T>& table) {
    for (const int64_t rows : {1, 2, 15, 16, 17, 40, 64}) {
      for (const int64_t cols : {1, 3, 8, 15, 16, 17, 31, 40, 64, 70}) {
        const int64_t ld = (rows + kPad - 1) / kPad * kPad, stride = cols + 2;
        const auto x = this->randoms((rows - 1) * stride + cols);
        std::vector<T> transposed(static_cast<size_t>(cols * ld), T(7));
        table.right_transpose({x.data(), stride}, rows, cols, {transposed.data(), ld});
        for (int64_t d = 0; d < cols; ++d) {
          for (int64_t i = 0; i < ld; ++i) {
            ASSERT_EQ(transposed[d * ld + i], i < rows ? x[i * stride + d] : T(0));
          }
        }
      }
    }
  });
}

TYPED_TEST(TileKernels, ProductsWithFew) {
  using T = TypeParam;
  this->on_each_capability([&](const Kernels<T>& table) {
    for (int64_t few = 1; few <= kFew; ++few) {
      for (const int64_t k : {0, 1, 7, 16, 33, 64, 71}) {
        const int64_t m = 5, lda = k + 1, ldb = k + 3, ldc = kPad + 1;
        const auto a = this->randoms((m - 1) * lda + k), b = this->randoms((few - 1) * ldb + k);
        std::vector<T> c(static_cast<size_t>(m * ldc), T(7));
        Lookahead ahead;
        table.products_with_few(m, few, k, {a.data(), lda}, {b.data(), ldb}, {c.data(), ldc},
                                T(0.5), ahead);
        for (int64_t j = 0; j < m; ++j) {
          for (int64_t i = 0; i < ldc; ++i) {
            T expected = i < kPad ? T(0) : T(7);
            for (int64_t p = 0; p < k && i < few; ++p) {
              expected += T(0.5) * a[j * lda + p] * b[i * ldb + p];
            }
            ASSERT_NEAR(c[j * ldc + i], expected, 50 * this->kEpsilon);
          }
        }
      }
    }
  });
}

// Ends that move up, where rows see nothing, few keys, or all; tails of every width.
TYPED_TEST(TileKernels, Mask) {
  using T = TypeParam;
  std::mt19937 random(3);
  const auto up_to = [&](int64_t most) {
    return std::uniform_int_distribution<int64_t>(0, most)(random);
  };
  this->on_each_capability([&](const Kernels<T>& table) {
    for (int round = 0; round < 300; ++round) {
      const int64_t rows = 1 + up_to(19), keys = 1 + up_to(39), first_key = up_to(9);
      const int64_t columns = (rows + kPad - 1) / kPad * kPad, step = up_to(4);
      std::vector<int32_t> first(rows), stop(rows);
      for (int64_t i = 0, low = up_to(30), high = low; i < rows; ++i) {
        first[i] = static_cast<int32_t>(low += up_to(step));
        stop[i] = static_cast<int32_t>(high = std::max(low, high + up_to(2 * step)));
      }
      const auto before = this->randoms(keys * columns);
      auto s = before;
      table.mask({s.data(), keys, columns}, {first.data(), stop.data(), rows, first_key});
      for (int64_t j = 0; j < keys; ++j) {
        for (int64_t i = 0; i < rows; ++i) {
          const bool seen = first[i] <= first_key + j && first_key + j < stop[i];
          const T hidden = -std::numeric_limits<T>::infinity();
          ASSERT_EQ(s[j * columns + i], seen ? before[j * columns + i] : hidden);
        }
      }
    }
  });
}

// exp(x - lse) by way of a score's gradient where that of its weight is 1. Columns of 16 rows.
template <typename T>
std::vector<T> exps(const Kernels<T>& table, std::vector<T> x, std::vector<T> lse) {
  const auto keys = static_cast<int64_t>(x.size()) / 16;
  std::vector<T> dp(x.size(), T(1)), result(x.size()), rooms[3];
  for (auto& room : rooms) room.resize(x.size() + kKeyTile * kQueryTile);
  const std::vector<T> delta(16, T(0));
  table.gradients({{x.data(), keys, 16},
                   {dp.data(), keys, 16},
                   lse.data(),
                   delta.data(),
                   nullptr,
                   nullptr,
                   result.data(),
                   {rooms[0].data(), rooms[1].data(), rooms[2].data()}});
  return result;
}

TYPED_TEST(TileKernels, ExpIsAccurateToTwoUlp) {
  using T = TypeParam;
  const double lowest = sizeof(T) == 8 ? -708 : -87;
  this->on_each_capability([&](const Kernels<T>& table) {
    for (const double low : {lowest, -5.0}) {
      const auto x = this->randoms(1 << 16, low, 0.5);
      const auto result = exps(table, x, std::vector<T>(16, T(0)));
      for (size_t i = 0; i < x.size(); ++i) {
        const long double expected = std::exp(static_cast<long double>(x[i]));
        const T rounded = static_cast<T>(expected);
        const T ulp = std::nextafter(rounded, std::numeric_limits<T>::infinity()) - rounded;
        ASSERT_LE(std::abs(result[i] - expected), 2 * ulp) << "exp(" << x[i] << ")";
      }
    }
  });
}

TYPED_TEST(TileKernels, ExpAtTheEnds) {
  using T = TypeParam;
  const auto check = [](const Kernels<T>& table) {
    constexpr T inf = std::numeric_limits<T>::infinity();
    std::vector<T> x(16, T(0)), lse(16, T(0));
    x[0] = -inf;
    x[1] = T(-1e30);
    x[2] = std::numeric_limits<T>::quiet_NaN();
    lse[4] = inf;
    const auto result = exps(table, x, lse);
    EXPECT_EQ(result[0], T(0));
    EXPECT_EQ(result[1], T(0));
    EXPECT_TRUE(std::isnan(result[2]));
    EXPECT_EQ(result[3], T(1));
    EXPECT_EQ(result[4], T(0));
  };
  this->on_each_capability(check);
  if constexpr (sizeof(T) == sizeof(float)) {
    for (const Capability pairs :
         {Capability::kAvx512Bf16, Capability::kAmxEmulated, Capability::kNeonBf16}) {
      if (has(pairs)) check(kernels_of<float>(pairs, DType::kBFloat16));
    }
  }
}

// Of columns of kPad rows: the lse of a row, with its factor.
template <typename T>
std::vector<T> lses(const Kernels<T>& table, std::vector<T> max, std::vector<T> sum) {
  std::vector<T> factor(sum.size(), T(7)), lse(sum.size(), T(7));
  const auto rows = static_cast<int64_t>(sum.size());
  table.finish_rows({max.data(), sum.data(), factor.data()}, rows, lse.data());
  for (size_t i = 0; i < sum.size(); ++i) {
    const T expected = RunningSoftmax<T>{max[i], sum[i]}.normaliser();
    EXPECT_TRUE(factor[i] == expected || (std::isnan(expected) && std::isnan(factor[i])));
  }
  return lse;
}

TYPED_TEST(TileKernels, LogIsAccurateToTwoUlp) {
  using T = TypeParam;
  this->on_each_capability([&](const Kernels<T>& table) {
    for (const double width : {0.01, 1.0, 80.0}) {
      auto sum = this->randoms(1 << 12, -width, width);
      for (T& x : sum) x = std::exp(x);
      const auto lse = lses(table, std::vector<T>(sum.size(), T(0)), sum);
      for (size_t i = 0; i < sum.size(); ++i) {
        const long double expected = std::log(static_cast<long double>(sum[i]));
        const T rounded = std::abs(static_cast<T>(expected));
        const T ulp = std::nextafter(rounded, std::numeric_limits<T>::infinity()) - rounded;
        ASSERT_LE(std::abs(lse[i] - expected), 2 * ulp) << "log(" << sum[i] << ")";
      }
    }
  });
}

TYPED_TEST(TileKernels, RowsAtTheEnds) {
  using T = TypeParam;
  this->on_each_capability([](const Kernels<T>& table) {
    constexpr T inf = std::numeric_limits<T>::infinity(), nan = std::numeric_limits<T>::quiet_NaN();
    constexpr T least = std::numeric_limits<T>::min(), most = std::numeric_limits<T>::max();
    const T max[] = {-inf, T(3), T(3), nan, T(3), inf, T(0), T(0)};
    const T sum[] = {T(0), T(1), nan, T(1), inf, nan, least, most};
    std::vector<T> maxes(kPad, T(0)), sums(kPad, T(1));
    std::copy(std::begin(max), std::end(max), maxes.begin());
    std::copy(std::begin(sum), std::end(sum), sums.begin());
    const auto lse = lses(table, maxes, sums);
    for (size_t i = 0; i < sums.size(); ++i) {
      const T expected = RunningSoftmax<T>{maxes[i], sums[i]}.lse();
      if (std::isfinite(expected)) {
        EXPECT_NEAR(lse[i], expected, 2 * std::numeric_limits<T>::epsilon() * std::abs(expected));
      } else {
        EXPECT_TRUE(lse[i] == expected || (std::isnan(expected) && std::isnan(lse[i]))) << i;
      }
    }
  });
}

TYPED_TEST(TileKernels, SoftcapIsAccurateNearAndFarFromZero) {
  using T = TypeParam;
  this->on_each_capability([&](const Kernels<T>& table) {
    for (const double width : {1e-6, 0.4, 3.0, 200.0}) {
      auto x = this->randoms(512, -width, width);
      const auto inputs = x;
      std::vector<T> derivative(512);
      table.softcap({x.data(), 32, 16}, T(1), derivative.data());
      for (size_t i = 0; i < x.size(); ++i) {
        const T expected = std::tanh(inputs[i]);
        ASSERT_NEAR(x[i], expected, 4 * this->kEpsilon * std::abs(expected)) << inputs[i];
        ASSERT_NEAR(derivative[i], 1 - expected * expected, 8 * this->kEpsilon);
      }
    }
  });
}

// (rows, dim) of small integers: exact in bf16, and so are sums of their products in fp32.
struct Bf16Rows {
  Bf16Rows(std::mt19937& random, int64_t rows, int64_t dim) : dim(dim) {
    std::uniform_int_distribution<int> small(-8, 8);
    for (int64_t i = 0; i < rows * dim; ++i) {
      values.push_back(static_cast<float>(small(random)));
      uint32_t bits;
      std::memcpy(&bits, &values.back(), sizeof(bits));
      halves.push_back(static_cast<uint16_t>(bits >> 16));
    }
  }
  float at(int64_t i, int64_t d) const { return d < dim ? values[i * dim + d] : 0.0f; }

  int64_t dim;
  std::vector<float> values;
  std::vector<uint16_t> halves;
};

int64_t up_to_pad(int64_t count) { return (count + kPad - 1) / kPad * kPad; }

// Memory that holds NaN wherever nothing was written.
std::vector<float> room(int64_t count) { return std::vector<float>(count, NAN); }

class Bf16Products : public testing::TestWithParam<Capability> {
 protected:
  void SetUp() override {
    if (!has(GetParam())) GTEST_SKIP() << "this machine has no " << name(GetParam());
    products_.emplace(table());
  }

  // `bytes` is how far the rows lie from the alignment of a word.
  Matrix<const float> left(const Bf16Rows& x, int64_t rows, std::vector<float>& memory,
                           int64_t bytes = 0) {
    const int64_t ld = up_to_pad(x.dim);
    memory = room(2 * rows * (ld + 1));
    char* copy = reinterpret_cast<char*>(memory.data() + rows * (ld + 1)) + bytes;
    std::memcpy(copy, x.halves.data(), static_cast<size_t>(rows * x.dim) * sizeof(uint16_t));
    return table().left_rows(DType::kBFloat16, copy, x.dim, rows, x.dim, {memory.data(), ld});
  }

  Matrix<const float> right(const Bf16Rows& x, int64_t rows, std::vector<float>& memory) {
    const int64_t ld = up_to_pad(x.dim);
    memory = room((rows + 1) / 2 * ld);
    const Matrix<float> words{memory.data(), ld};
    table().right_rows(DType::kBFloat16, x.halves.data(), x.dim, rows, x.dim, words);
    return {words.data, ld};
  }

  // The product of a tile by query with rows of x.
  std::vector<float> weighted(const Bf16Rows& x, int64_t rows, int64_t m,
                              Matrix<const float> tile) {
    const int64_t ld = up_to_pad(x.dim), words = up_to_pad((rows + 1) / 2);
    auto memory = room(words * ld), sums = room(up_to_pad(m) * ld);
    const auto right = by_query_sums(table(), memory.data(), words, ld);
    const auto sum = by_query_sums(table(), sums.data(), up_to_pad(m), ld);
    table().weighted_rows(DType::kBFloat16, x.halves.data(), x.dim, rows, x.dim, right);
    table().gemm({m, ld, rows, tile, {right.data, right.ld, right.transposed}, sum, {1.0f, false}});
    if (!sum.transposed) return sums;
    auto result = room(m * ld);
    for (int64_t i = 0; i < m * ld; ++i) result[i] = sums[i % ld * sum.ld + i / ld];
    return result;
  }

  // What is added to sums may wait until then.
  void end_products() {
    products_.reset();
    products_.emplace(table());
  }

  const Kernels<float>& table() { return kernels_of<float>(GetParam(), DType::kBFloat16); }

  std::mt19937 random_{5};

 private:
  std::optional<Products<float>> products_;
};

TEST_P(Bf16Products, OfRowsWithRows) {
  std::vector<float> q_memory, k_memory;
  for (const int64_t keys : {1, 7, 33, 64}) {
    for (const int64_t queries : {1, 3, 16, 31, 64}) {
      for (const int64_t dim : {1, 5, 16, 37, 40, 64}) {
        for (const int64_t bytes : {0, 2}) {
          const Bf16Rows q(random_, queries, dim), k(random_, keys, dim);
          const int64_t columns = up_to_pad(queries);
          auto q_t = room(up_to_pad(dim) * columns), s = room(keys * columns);
          table().right_transpose(left(q, queries, q_memory, bytes), queries, dim,
                                  {q_t.data(), columns});
          table().gemm({keys,
                        columns,
                        dim,
                        left(k, keys, k_memory, bytes),
                        {q_t.data(), columns},
                        {s.data(), columns},
                        {0.25f, false}});
          for (int64_t j = 0; j < keys; ++j) {
            for (int64_t i = 0; i < columns; ++i) {
              float expected = 0;
              for (int64_t d = 0; d < dim && i < queries; ++d) expected += k.at(j, d) * q.at(i, d);
              ASSERT_EQ(s[j * columns + i], 0.25f * expected);
            }
          }
        }
      }
    }
  }
}

TEST_P(Bf16Products, OfRowsWithFewRows) {
  std::vector<float> q_memory, k_memory;
  for (int64_t queries = 1; queries <= kFew; ++queries) {
    for (const int64_t dim : {1, 5, 32, 37, 80}) {
      for (const int64_t bytes : {0, 2}) {
        const int64_t keys = 7;
        const Bf16Rows q(random_, queries, dim), k(random_, keys, dim);
        auto s = room(keys * kPad);
        Lookahead ahead;
        table().products_with_few(keys, queries, dim, left(k, keys, k_memory, bytes),
                                  left(q, queries, q_memory, bytes), {s.data(), kPad}, 0.25f,
                                  ahead);
        for (int64_t j = 0; j < keys; ++j) {
          for (int64_t i = 0; i < kPad; ++i) {
            float expected = 0;
            for (int64_t d = 0; d < dim && i < queries; ++d) expected += k.at(j, d) * q.at(i, d);
            ASSERT_EQ(s[j * kPad + i], 0.25f * expected);
          }
        }
      }
    }
  }
}

// Of weights exp(0) and gradients p * (dp - delta) = dp, small integers.
TEST_P(Bf16Products, OfTilesWithRows) {
  std::vector<float> right_memory;
  for (const int64_t keys : {1, 2, 7, 33}) {
    for (const int64_t queries : {1, 3, 16, 31}) {
      for (const int64_t dim : {1, 16, 37}) {
        const int64_t ld = up_to_pad(dim), columns = up_to_pad(queries);
        const Bf16Rows q(random_, queries, dim), k(random_, keys, dim);
        Bf16Rows dp(random_, keys, columns);
        for (int64_t j = 0; j < keys; ++j) {
          for (int64_t i = queries; i < columns; ++i) dp.values[j * columns + i] = 0;  // padding
        }
        std::vector<float> s(keys * columns, 0.0f), zero(columns, 0.0f), rooms[3];
        for (auto& memory : rooms) memory = room(kKeyTile * kQueryTile);
        const Tile<float> scores{s.data(), keys, columns},
            gradients{dp.values.data(), keys, columns};
        const auto operands =
            table().gradients({scores,
                               gradients,
                               zero.data(),
                               zero.data(),
                               nullptr,
                               nullptr,
                               nullptr,
                               {rooms[0].data(), rooms[1].data(), rooms[2].data()}});
        const auto product = [&](const Bf16Rows& x, int64_t rows, int64_t m,
                                 Matrix<const float> tile) {
          std::vector<float> sum(m * ld);
          table().gemm(
              {m, ld, rows, tile, right(x, rows, right_memory), {sum.data(), ld}, {1.0f, true}});
          end_products();
          return sum;
        };
        const auto by_query = weighted(k, keys, queries, operands.scores_by_query);
        const auto by_key = product(q, queries, keys, operands.scores_by_key);
        const auto weighted = product(q, queries, keys, operands.weights_by_key);
        for (int64_t d = 0; d < ld; ++d) {
          for (int64_t i = 0; i < queries; ++i) {
            float expected = 0;
            for (int64_t j = 0; j < keys; ++j) expected += dp.at(j, i) * k.at(j, d);
            ASSERT_EQ(by_query[i * ld + d], expected);
          }
          for (int64_t j = 0; j < keys; ++j) {
            float expected = 0, sum = 0;
            for (int64_t i = 0; i < queries; ++i) {
              expected += dp.at(j, i) * q.at(i, d);
              sum += q.at(i, d);
            }
            ASSERT_EQ(by_key[j * ld + d], expected);
            ASSERT_EQ(weighted[j * ld + d], sum);
          }
        }
      }
    }
  }
}

// Scores 0 and -inf: the weights of the softmax are 1 and 0, times the multiplier.
TEST_P(Bf16Products, OfSoftmaxWeights) {
  for (const int64_t keys : {1, 2, 7, 33}) {
    for (const int64_t columns : {16, 64, 80}) {
      const Bf16Rows v(random_, keys, 5), multiplier(random_, keys, columns);
      for (const bool dropped : {false, true}) {
        std::vector<float> s(keys * columns, 0.0f), max(columns, -INFINITY), sum(columns, 0.0f),
            factor(columns), memory = room(kKeyTile * kQueryTile);
        for (int64_t j = 1; j < keys; j += 3) {
          for (int64_t i = 0; i < columns; ++i) s[j * columns + i] = -INFINITY;
        }
        const auto weights = table().softmax_update(
            {s.data(), keys, columns}, {max.data(), sum.data(), factor.data()},
            dropped ? multiplier.values.data() : nullptr, memory.data());
        const auto out = weighted(v, keys, columns, weights);
        for (int64_t i = 0; i < columns; ++i) {
          float expected[5] = {}, count = 0;
          for (int64_t j = 0; j < keys; ++j) {
            if (j % 3 == 1) continue;
            ++count;
            for (int64_t d = 0; d < 5; ++d) {
              expected[d] += (dropped ? multiplier.at(j, i) : 1.0f) * v.at(j, d);
            }
          }
          ASSERT_EQ(sum[i], count);
          ASSERT_EQ(max[i], 0.0f);
          for (int64_t d = 0; d < 5; ++d) ASSERT_EQ(out[i * 16 + d], expected[d]);
        }
      }
    }
  }
}

// Sums that are written, added to, and shrunk before: whole tiles and ragged ones, with columns of
// the transpose where the level sums it.
TEST_P(Bf16Products, AddToWhatIsThere) {
  std::uniform_int_distribution<int> small(-8, 8);
  for (const int64_t m : {1, 16, 23, 32, 50}) {
    for (const int64_t k : {3, 32, 74}) {
      const Bf16Rows a(random_, m, k), b(random_, k, 80);
      std::vector<float> a_memory, b_memory, before(m * 80), factor(up_to_pad(m), 1);
      for (float& x : before) x = static_cast<float>(small(random_));
      for (int64_t i = 0; i < m; i += 3) factor[i] = 0.5f;
      for (const float alpha : {1.0f, 0.25f}) {
        for (const bool adds : {false, true}) {
          auto c = before;
          table().gemm({m,
                        80,
                        k,
                        left(a, m, a_memory),
                        right(b, k, b_memory),
                        {c.data(), 80},
                        {alpha, adds, adds ? factor.data() : nullptr}});
          end_products();
          for (int64_t i = 0; i < m; ++i) {
            for (int64_t j = 0; j < 80; ++j) {
              float expected = 0;
              for (int64_t p = 0; p < k; ++p) expected += alpha * a.at(i, p) * b.at(p, j);
              if (adds) expected += factor[i] * before[i * 80 + j];
              ASSERT_EQ(c[i * 80 + j], expected);
            }
          }
        }
      }
    }
  }
}

// Three tiles of keys into one softmax, with maxima that rise, and its product.
TEST_P(Bf16Products, OfARunningSoftmax) {
  const int64_t columns = 48, keys = 45, tiles = 3, dim = 24, ld = up_to_pad(dim);
  const float scale = 0.3f, late = table().scales_late ? scale : 1.0f;
  const Bf16Rows v(random_, tiles * keys, dim);
  std::uniform_real_distribution<float> score(-20, 20);
  std::vector<float> s(tiles * keys * columns), max(columns, -INFINITY), sum(columns, 0.0f),
      factor(columns), memory = room(kKeyTile * kQueryTile), v_memory = room(ld * 32),
                       out = room(columns * ld);
  for (float& x : s) x = score(random_);
  const auto right = by_query_sums(table(), v_memory.data(), 32, ld);
  const auto sums = by_query_sums(table(), out.data(), columns, ld);
  for (int64_t t = 0; t < tiles; ++t) {
    std::vector<float> part(s.begin() + t * keys * columns, s.begin() + (t + 1) * keys * columns);
    for (float& x : part) x *= scale / late;
    const auto weights =
        table().softmax_update({part.data(), keys, columns, late},
                               {max.data(), sum.data(), factor.data()}, nullptr, memory.data());
    table().weighted_rows(DType::kBFloat16, v.halves.data() + t * keys * dim, dim, keys, dim,
                          right);
    table().gemm({columns,
                  ld,
                  keys,
                  weights,
                  {right.data, right.ld, right.transposed},
                  sums,
                  {1.0f, t > 0, factor.data()}});
  }
  end_products();
  for (int64_t i = 0; i < columns; ++i) {
    std::vector<double> expected(dim, 0.0);
    double total = 0;
    for (int64_t j = 0; j < tiles * keys; ++j) {
      const double weight = std::exp(scale * static_cast<double>(s[j * columns + i]));
      total += weight;
      for (int64_t d = 0; d < dim; ++d) expected[d] += weight * v.at(j, d);
    }
    ASSERT_NEAR(max[i] + std::log(sum[i]), std::log(total), 2e-5);
    for (int64_t d = 0; d < dim; ++d) {
      const float found = sums.transposed ? out[d * sums.ld + i] : out[i * ld + d];
      ASSERT_NEAR(found / sum[i], expected[d] / total, 0.02);
    }
  }
}

TEST_P(Bf16Products, RoundedWeightsAreAccurateToSeventeenBits) {
  std::uniform_real_distribution<float> below(-20, 0);
  std::vector<float> x(1 << 14);
  for (float& score : x) score = below(random_);
  const auto result = exps(table(), x, std::vector<float>(16, 0.0f));
  for (size_t i = 0; i < x.size(); ++i) {
    const double expected = std::exp(static_cast<double>(x[i]));
    ASSERT_NEAR(result[i], expected, std::ldexp(expected, -17)) << "exp(" << x[i] << ")";
  }
}

INSTANTIATE_TEST_SUITE_P(Levels, Bf16Products,
                         testing::Values(Capability::kAvx512Bf16, Capability::kAmxEmulated,
                                         Capability::kAmx, Capability::kNeonBf16),
                         [](const auto& info) { return std::string(name(info.param)); });

TEST(Levels, TheFastestThatIsRightIsChosen) {
  using Level = Capability;
  const Trial trusted{Level::kAvx512, 3e-6, 0}, slow{Level::kAvx512Bf16, 4e-6, 0.001};
  EXPECT_EQ(choose({trusted, slow}), Level::kAvx512);
  EXPECT_EQ(choose({trusted, slow, {Level::kAmx, 1e-6, 0.001}}), Level::kAmx);
  testing::internal::CaptureStderr();
  EXPECT_EQ(choose({trusted, slow, {Level::kAmx, 1e-6, NAN}}), Level::kAvx512);
  EXPECT_EQ(choose({trusted, {Level::kAvx512Bf16, 1e-6, 0.03}}), Level::kAvx512);
  const std::string said = testing::internal::GetCapturedStderr();
  EXPECT_NE(said.find("CPU level amx is off by nan"), std::string::npos) << said;
  EXPECT_NE(said.find("CPU level avx512_bf16 is off by 0.03"), std::string::npos) << said;
}

// A CPU has levels of its own kind alone, and what it lacks falls to what it has.
TEST(Levels, AreThoseOfThisCpu) {
  constexpr bool kOfArm = USP_CPU_ARM;
  EXPECT_TRUE(has(Capability::kDefault));
  EXPECT_EQ(has(Capability::kNeonBf16), kOfArm && capability_of_machine() != Capability::kDefault);
  if (kOfArm) {
    EXPECT_FALSE(has(Capability::kAvx2) || has(Capability::kAmxEmulated) || has(Capability::kAmx));
  }
  for (const Capability level : {Capability::kAvx2, Capability::kAmx, Capability::kNeonBf16}) {
    setenv("USP_CPU_CAPABILITY", name(level), 1);
    EXPECT_EQ(capability_in_use(), has(level) ? level : capability_of_machine());
    unsetenv("USP_CPU_CAPABILITY");
  }
}

// Where it is said what this machine should have, as by who emulates it.
TEST(Levels, TheMachinesIsTheExpectedOne) {
  const char* expected = std::getenv("USP_EXPECTED_CAPABILITY");
  if (expected == nullptr) GTEST_SKIP() << "USP_EXPECTED_CAPABILITY says none";
  EXPECT_STREQ(name(capability_of_machine()), expected);
}

TEST(Levels, TrialsAgreeWithPlainLoops) {
  std::vector<Capability> levels;
  for (const Capability level : capabilities_built()) {
    if (has(level)) levels.push_back(level);
  }
  const auto trials = try_levels(levels);
  ASSERT_EQ(trials.size(), levels.size());
  for (const Trial& trial : trials) {
    EXPECT_LE(trial.error, 0.01) << name(trial.capability);
    EXPECT_GT(trial.seconds, 0) << name(trial.capability);
  }
}

// Every 16-bit pattern, against the definition of the formats.
TEST(LoadRows, ConvertsEveryHalf) {
  std::vector<uint16_t> halves(1 << 16);
  for (size_t i = 0; i < halves.size(); ++i) halves[i] = static_cast<uint16_t>(i);
  for (const Capability capability : capabilities_built()) {
    if (!has(capability)) continue;
    for (const bool brain : {false, true}) {
      const int mantissa_bits = brain ? 7 : 10, bias = brain ? 127 : 15;
      const int special = brain ? 255 : 31;
      std::vector<float> x(1 << 16);
      kernels_of<float>(capability, DType::kFloat32)
          .right_rows(brain ? DType::kBFloat16 : DType::kFloat16, halves.data(), 256, 256, 256,
                      {x.data(), 256});
      for (int bits = 0; bits < 1 << 16; ++bits) {
        const int exponent = (bits & 0x7FFF) >> mantissa_bits;
        const int mantissa = bits & ((1 << mantissa_bits) - 1);
        const float sign = bits >> 15 ? -1.0f : 1.0f;
        if (exponent == special && mantissa != 0) {
          ASSERT_TRUE(std::isnan(x[bits]));
          continue;
        }
        const int whole = exponent == 0 ? mantissa : mantissa + (1 << mantissa_bits);
        const int power = (exponent == 0 ? 1 : exponent) - bias - mantissa_bits;
        const float finite = std::ldexp(static_cast<float>(whole), power);
        const float magnitude = exponent == special ? INFINITY : finite;
        ASSERT_EQ(x[bits], sign * magnitude) << bits;
        ASSERT_EQ(std::signbit(x[bits]), bits >> 15 != 0) << bits;
      }
    }
  }
}

}  // namespace
}  // namespace usp::cpu
