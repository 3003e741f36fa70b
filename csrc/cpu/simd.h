#pragma once

// Vectors of USP_VECTOR_BYTES through the compiler's vector extension, and exp and tanh on them.
// Included once by each instruction set's object; internal linkage keeps the copies apart.

#include <cstdint>

#define USP_SIMD_MEMBER inline __attribute__((always_inline))
#define USP_SIMD static USP_SIMD_MEMBER

namespace usp::cpu {
namespace {

template <typename T>
struct VectorTraits;

template <>
struct VectorTraits<float> {
  typedef float Vector __attribute__((vector_size(USP_VECTOR_BYTES)));
  typedef int32_t Mask __attribute__((vector_size(USP_VECTOR_BYTES)));
  static constexpr int kMantissaBits = 23;
  static constexpr int32_t kExponentBias = 127;
  static constexpr float kRoundMagic = 0x1.8p23f;
  static constexpr float kUnderflow = -87.33654f;  // exp of it is the smallest normal number
  static constexpr float kOverflow = 88.0f;
  static constexpr float kLn2High = 0x1.63p-1f;  // few bits: n * kLn2High is exact
  static constexpr float kLn2Low = -0x1.bd0106p-13f;
  static constexpr int kExpDegree = 7;  // remainder below 2^-27
};

template <>
struct VectorTraits<double> {
  typedef double Vector __attribute__((vector_size(USP_VECTOR_BYTES)));
  typedef int64_t Mask __attribute__((vector_size(USP_VECTOR_BYTES)));
  static constexpr int kMantissaBits = 52;
  static constexpr int64_t kExponentBias = 1023;
  static constexpr double kRoundMagic = 0x1.8p52;
  static constexpr double kUnderflow = -708.3964185322641;
  static constexpr double kOverflow = 709.0;
  static constexpr double kLn2High = 0x1.62e42p-1;
  static constexpr double kLn2Low = 0x1.fdf473de6af28p-22;
  static constexpr int kExpDegree = 13;  // remainder below 2^-57
};

template <typename T>
using Vec = typename VectorTraits<T>::Vector;
template <typename T>
using Mask = typename VectorTraits<T>::Mask;

template <typename T>
inline constexpr int64_t kLanes = USP_VECTOR_BYTES / static_cast<int64_t>(sizeof(T));

template <typename T>
USP_SIMD Vec<T> load(const T* p) {
  Vec<T> v;
  __builtin_memcpy(&v, p, sizeof(v));
  return v;
}

template <typename T>
USP_SIMD void store(T* p, Vec<T> v) {
  __builtin_memcpy(p, &v, sizeof(v));
}

template <typename T>
USP_SIMD Vec<T> broadcast(T x) {
  return x - Vec<T>{};
}

constexpr double reciprocal_factorial(int k) {
  return k <= 1 ? 1.0 : reciprocal_factorial(k - 1) / k;
}

// exp for x <= kOverflow: 0 below the normal range (and at -inf), NaN stays NaN. Error below 1 ulp
// or so: x = n ln 2 + r with |r| <= ln(2) / 2, Taylor in r, 2^n by its bits.
template <typename T>
USP_SIMD Vec<T> exp(Vec<T> x) {
  using Traits = VectorTraits<T>;
  const Vec<T> low = broadcast<T>(Traits::kUnderflow), high = broadcast<T>(Traits::kOverflow);
  const Mask<T> underflow = x < low;
  x = underflow ? low : x;
  x = x > high ? high : x;
  const Vec<T> magic = broadcast<T>(Traits::kRoundMagic);
  const Vec<T> shifted = x * T(1.4426950408889634) + magic;
  const Vec<T> n = shifted - magic;
  const Vec<T> r = (x - n * Traits::kLn2High) - n * Traits::kLn2Low;
  Vec<T> poly = broadcast<T>(T(reciprocal_factorial(Traits::kExpDegree)));
#pragma GCC unroll 16
  for (int k = Traits::kExpDegree - 1; k >= 0; --k) {
    poly = poly * r + T(reciprocal_factorial(k));
  }
  const Mask<T> exponent = (Mask<T>)shifted - (Mask<T>)magic + Traits::kExponentBias;
  const Vec<T> power = (Vec<T>)(exponent << Traits::kMantissaBits);
  return underflow ? Vec<T>{} : poly * power;
}

// tanh: a Pade approximant near 0, where 1 - 2 / (exp(2|x|) + 1) would cancel.
template <typename T>
USP_SIMD Vec<T> tanh(Vec<T> x) {
  const Vec<T> magnitude = x < Vec<T>{} ? -x : x;
  const Vec<T> limit = broadcast<T>(T(22));  // tanh rounds to 1 beyond
  const Vec<T> large =
      T(1) - T(2) / (exp<T>(T(2) * (magnitude > limit ? limit : magnitude)) + T(1));
  const Vec<T> x2 = x * x;
  const Vec<T> small = x * (T(135135) + x2 * (T(17325) + x2 * (T(378) + x2))) /
                       (T(135135) + x2 * (T(62370) + x2 * (T(3150) + x2 * T(28))));
  const Vec<T> signed_large = x < Vec<T>{} ? -large : large;
  return magnitude < broadcast<T>(T(0.5)) ? small : signed_large;
}

}  // namespace
}  // namespace usp::cpu
