// The tile kernels of every instruction set that this machine has, against plain loops.

#include "cpu/kernels.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

namespace usp::cpu {
namespace {

template <typename T>
class TileKernels : public testing::Test {
 protected:
  template <typename Body>
  void on_each_capability(Body&& body) {
    for (const Capability capability : capabilities_built()) {
      if (capability > capability_of_machine()) continue;
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
            const auto before = this->randoms(m * ldc);
            for (const bool accumulate : {false, true}) {
              auto c = before;
              table.gemm(m, n, k, {a.data(), lda, transposed}, {b.data(), ldb}, {c.data(), ldc},
                         T(0.5), accumulate);
              for (int64_t i = 0; i < m; ++i) {
                for (int64_t j = 0; j < ldc; ++j) {
                  T expected = accumulate || j >= n ? before[i * ldc + j] : T(0);
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

TYPED_TEST(TileKernels, ExpIsAccurateToAFewUlp) {
  using T = TypeParam;
  const double lowest = sizeof(T) == 8 ? -708 : -87;
  this->on_each_capability([&](const Kernels<T>& table) {
    auto x = this->randoms(1 << 16, lowest, 0.5);
    const auto inputs = x;
    const std::vector<T> zero(16, T(0));
    table.probabilities({x.data(), (1 << 16) / 16, 16}, zero.data());
    for (size_t i = 0; i < x.size(); ++i) {
      const T expected = std::exp(inputs[i]);
      ASSERT_NEAR(x[i], expected, 2 * this->kEpsilon * expected) << "exp(" << inputs[i] << ")";
    }
  });
}

TYPED_TEST(TileKernels, ExpAtTheEnds) {
  using T = TypeParam;
  this->on_each_capability([&](const Kernels<T>& table) {
    constexpr T inf = std::numeric_limits<T>::infinity();
    std::vector<T> x(16, T(0)), lse(16, T(0));
    x[0] = -inf;
    x[1] = T(-1e30);
    x[2] = std::numeric_limits<T>::quiet_NaN();
    lse[4] = inf;
    table.probabilities({x.data(), 1, 16}, lse.data());
    EXPECT_EQ(x[0], T(0));
    EXPECT_EQ(x[1], T(0));
    EXPECT_TRUE(std::isnan(x[2]));
    EXPECT_EQ(x[3], T(1));
    EXPECT_EQ(x[4], T(0));
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

class Bf16Products : public testing::Test {
 protected:
  void SetUp() override {
    if (capability_of_machine() < Capability::kAvx512Bf16) GTEST_SKIP() << "no BF16 instructions";
  }

  std::vector<float> loaded(const Bf16Rows& x, int64_t rows) {
    auto result = room(rows * up_to_pad(x.dim));
    table().load_rows(DType::kBFloat16, x.halves.data(), x.dim, rows, x.dim,
                      {result.data(), up_to_pad(x.dim)});
    return result;
  }

  const Kernels<float>& table() {
    return kernels_of<float>(Capability::kAvx512Bf16, DType::kBFloat16);
  }

  std::mt19937 random_{5};
};

TEST_F(Bf16Products, OfRowsWithRows) {
  for (const int64_t keys : {1, 7, 33}) {
    for (const int64_t queries : {1, 3, 16, 31}) {
      for (const int64_t dim : {1, 5, 16, 37}) {
        const Bf16Rows q(random_, queries, dim), k(random_, keys, dim);
        const int64_t ld = up_to_pad(dim), columns = up_to_pad(queries);
        const auto q_rows = loaded(q, queries), k_rows = loaded(k, keys);
        auto q_t = room(ld * columns), s = room(keys * columns);
        table().transpose({q_rows.data(), ld}, queries, dim, {q_t.data(), columns});
        table().gemm(keys, columns, dim, {k_rows.data(), ld}, {q_t.data(), columns},
                     {s.data(), columns}, 0.25f, false);
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

TEST_F(Bf16Products, OfTilesWithRows) {
  for (const int64_t keys : {1, 2, 7, 33}) {
    for (const int64_t queries : {1, 3, 16, 31}) {
      for (const int64_t dim : {1, 16, 37}) {
        const int64_t ld = up_to_pad(dim), columns = up_to_pad(queries);
        const Bf16Rows q(random_, queries, dim), k(random_, keys, dim);
        Bf16Rows s(random_, keys, columns);
        for (int64_t j = 0; j < keys; ++j) {
          for (int64_t i = queries; i < columns; ++i) s.values[j * columns + i] = 0;  // padding
        }
        const Tile<float> tile{s.values.data(), keys, columns};
        const auto product = [&](const Bf16Rows& x, int64_t rows, bool by_key) {
          const int64_t m = by_key ? keys : queries;
          const auto rows_of_x = loaded(x, rows);
          auto left = room((keys + 1) * columns), words = room(rows * ld);
          std::vector<float> sum(m * ld);
          table().gemm(m, ld, rows,
                       by_key ? table().tile_by_key(tile, left.data())
                              : table().tile_by_query(tile, left.data()),
                       table().by_row_words({rows_of_x.data(), ld}, rows, dim, {words.data(), ld}),
                       {sum.data(), ld}, 1.0f, true);
          return sum;
        };
        const auto by_query = product(k, keys, false), by_key = product(q, queries, true);
        for (int64_t d = 0; d < ld; ++d) {
          for (int64_t i = 0; i < queries; ++i) {
            float expected = 0;
            for (int64_t j = 0; j < keys; ++j) expected += s.at(j, i) * k.at(j, d);
            ASSERT_EQ(by_query[i * ld + d], expected);
          }
          for (int64_t j = 0; j < keys; ++j) {
            float expected = 0;
            for (int64_t i = 0; i < queries; ++i) expected += s.at(j, i) * q.at(i, d);
            ASSERT_EQ(by_key[j * ld + d], expected);
          }
        }
      }
    }
  }
}

// Every 16-bit pattern, against the definition of the formats.
TEST(LoadRows, ConvertsEveryHalf) {
  std::vector<uint16_t> halves(1 << 16);
  for (size_t i = 0; i < halves.size(); ++i) halves[i] = static_cast<uint16_t>(i);
  for (const Capability capability : capabilities_built()) {
    if (capability > capability_of_machine()) continue;
    for (const bool brain : {false, true}) {
      const int mantissa_bits = brain ? 7 : 10, bias = brain ? 127 : 15;
      const int special = brain ? 255 : 31;
      std::vector<float> x(1 << 16);
      kernels_of<float>(capability, DType::kFloat32)
          .load_rows(brain ? DType::kBFloat16 : DType::kFloat16, halves.data(), 256, 256, 256,
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
