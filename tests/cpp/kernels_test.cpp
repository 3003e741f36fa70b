// The tile kernels of every instruction set that this machine has, against plain loops.

#include "cpu/kernels.h"

#include <gtest/gtest.h>

#include <cmath>
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
