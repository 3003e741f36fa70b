#pragma once

// Vectors of USP_VECTOR_BYTES through the compiler's vector extension, and exp and tanh on them.
// Included once by each instruction set's object; internal linkage keeps the copies apart.

#include <cstdint>
#include <iterator>
#include <limits>
#include <utility>

#include "cpu/capability.h"

#if USP_CPU_X86
#include <immintrin.h>
#endif

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
  static constexpr float kLowest = -87.7f;         // n is -127 there: its bits are 0
  static constexpr float kLn2High = 0x1.62e4p-1f;  // few bits: n * kLn2High is exact
  static constexpr float kLn2Low = 0x1.7f7d1c00p-20f;
  static constexpr int32_t kHalfRoot = 0x3F3504F3;  // the bits of sqrt(1 / 2)
  static constexpr int kLogTerms = 4;               // the next is below 2^-28 of the whole
  // exp(r) for |r| <= ln(2) / 2, minimax of the relative error: 2^-29.
  static constexpr float kExp[] = {1.0f,         1.00000003f,    0.499999942f,  0.166664313f,
                                   0.041668002f, 0.00837415531f, 0.00138436536f};
  // The same to 2^-17 (2^-18.4 before rounding), for results that are rounded to fewer bits anyway.
  static constexpr float kCoarseExp[] = {1.0f, 0.999966837f, 0.500030136f, 0.167874733f,
                                         0.0415138476f};
};

template <>
struct VectorTraits<double> {
  typedef double Vector __attribute__((vector_size(USP_VECTOR_BYTES)));
  typedef int64_t Mask __attribute__((vector_size(USP_VECTOR_BYTES)));
  static constexpr int kMantissaBits = 52;
  static constexpr int64_t kExponentBias = 1023;
  static constexpr double kRoundMagic = 0x1.8p52;
  static constexpr double kLowest = -709.4;
  static constexpr double kLn2High = 0x1.62e42p-1;
  static constexpr double kLn2Low = 0x1.fdf473de6af28p-22;
  static constexpr int64_t kHalfRoot = 0x3FE6A09E667F3BCD;
  static constexpr int kLogTerms = 10;  // 2^-59
  // 1 / k!: the remainder is below 2^-57.
  static constexpr double kExp[] = {
      1.0,
      1.0,
      1.0 / 2,
      1.0 / 6,
      1.0 / 24,
      1.0 / 120,
      1.0 / 720,
      1.0 / 5040,
      1.0 / 40320,
      1.0 / 362880,
      1.0 / 3628800,
      1.0 / 39916800,
      1.0 / 479001600,
      1.0 / 6227020800,
  };
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

// The larger one lane by lane; `x` where it is NaN. The compiler makes two instructions of a
// comparison and a choice; gcc 12 warns of _mm512_max_ps itself.
template <typename T>
USP_SIMD Vec<T> max_or_nan(Vec<T> bound, Vec<T> x) {
#if USP_CPU_X86 && USP_VECTOR_BYTES == 64
  if constexpr (sizeof(T) == sizeof(float)) {
    return (Vec<T>)_mm512_maskz_max_ps(0xFFFF, (__m512)bound, (__m512)x);
  } else {
    return (Vec<T>)_mm512_maskz_max_pd(0xFF, (__m512d)bound, (__m512d)x);
  }
#elif USP_CPU_X86 && USP_VECTOR_BYTES == 32
  if constexpr (sizeof(T) == sizeof(float)) {
    return (Vec<T>)_mm256_max_ps((__m256)bound, (__m256)x);
  } else {
    return (Vec<T>)_mm256_max_pd((__m256d)bound, (__m256d)x);
  }
#else
  return x < bound ? bound : x;
#endif
}

// Of each group of 2 kStep lanes the lower half of `a`, then that of `b`; or the upper halves.
template <int kStep, bool kUpper, typename T>
USP_SIMD Vec<T> half_groups(Vec<T> a, Vec<T> b) {
  constexpr int kUpperStep = kUpper ? kStep : 0;
  const auto shuffled = [&]<int... lane>(std::integer_sequence<int, lane...>) {
#if defined(__clang__)
    return __builtin_shufflevector(
        a, b, (lane + kUpperStep + (lane & kStep ? int{kLanes<T>} - kStep : 0))...);
#else
    return __builtin_shuffle(
        a, b, Mask<T>{(lane + kUpperStep + (lane & kStep ? int{kLanes<T>} - kStep : 0))...});
#endif
  };
  return shuffled(std::make_integer_sequence<int, kLanes<T>>{});
}

// Transposes the matrix of kLanes vectors: swaps the off-diagonal blocks of kStep, then of half.
template <typename T, int kStep = kLanes<T> / 2>
USP_SIMD void transpose(Vec<T>* rows) {
  if constexpr (kStep > 0) {
#pragma GCC unroll 16
    for (int i = 0; i < kLanes<T>; ++i) {
      if (i & kStep) continue;
      const Vec<T> a = rows[i], b = rows[i + kStep];
      rows[i] = half_groups<kStep, false, T>(a, b);
      rows[i + kStep] = half_groups<kStep, true, T>(a, b);
    }
    transpose<T, kStep / 2>(rows);
  }
}

// Each of the first kFirst lanes is the sum of those that lie a multiple of kFirst from it.
template <typename T, int kFirst = 1, int kStep = kLanes<T> / 2>
USP_SIMD Vec<T> sum_of_lanes(Vec<T> v) {
  if constexpr (kStep < kFirst) {
    return v;
  } else {
    const Vec<T> upper = half_groups<kStep, true, T>(v, v);
    return sum_of_lanes<T, kFirst, kStep / 2>(v + upper);
  }
}

// Lane i is the sum over the lanes of v[i], of at most as many as there are lanes; those behind the
// last of them hold anything.
template <typename T, int kCount, int kStep = 1>
USP_SIMD Vec<T> sums_of_lanes(const Vec<T> (&v)[kCount]) {
  if constexpr (kCount == 1) {
    return sum_of_lanes<T, kStep>(v[0]);
  } else {
    Vec<T> pairs[(kCount + 1) / 2];
#pragma GCC unroll 4
    for (int i = 0; i < kCount; i += 2) {
      const Vec<T> a = v[i], b = i + 1 < kCount ? v[i + 1] : Vec<T>{};
      pairs[i / 2] = half_groups<kStep, false, T>(a, b) + half_groups<kStep, true, T>(a, b);
    }
    return sums_of_lanes<T, (kCount + 1) / 2, 2 * kStep>(pairs);
  }
}

// The first kCount lanes, and zeros.
template <typename T, int kCount>
USP_SIMD Vec<T> first_lanes(Vec<T> v) {
  Mask<T> kept{};
#pragma GCC unroll 4
  for (int i = 0; i < kCount; ++i) kept[i] = -1;
  return kept ? v : Vec<T>{};
}

// `count` elements, less than there are lanes, and zeros.
template <typename T>
USP_SIMD Vec<T> load_some(const T* p, int64_t count) {
  T lanes[kLanes<T>] = {};
  for (int64_t i = 0; i < count; ++i) lanes[i] = p[i];
  return load(lanes);
}

template <typename T, bool kCoarse>
struct Exponential {
  static constexpr auto& kCoefficients = VectorTraits<T>::kExp;
};

template <>
struct Exponential<float, true> {
  static constexpr auto& kCoefficients = VectorTraits<float>::kCoarseExp;
};

// exp(x) for x up to the exponent range: 0 below the normal range (and at -inf), NaN stays NaN.
// Error below 2 ulp, or 2^-17 where kCoarse: x = n ln 2 + r with |r| <= ln(2) / 2, a polynomial in
// r, 2^n by its bits.
template <typename T, bool kCoarse = false>
USP_SIMD Vec<T> exp(Vec<T> x) {
  using Traits = VectorTraits<T>;
  constexpr auto& kCoefficients = Exponential<T, kCoarse>::kCoefficients;
  constexpr int kDegree = std::size(kCoefficients) - 1;
  x = max_or_nan<T>(broadcast<T>(Traits::kLowest), x);
  // The low bits of the sum are n + bias: the exponent of 2^n.
  const Vec<T> magic = broadcast<T>(Traits::kRoundMagic + T(Traits::kExponentBias));
  const Vec<T> shifted = x * T(1.4426950408889634) + magic;
  const Vec<T> n = shifted - magic;
  Vec<T> r;
  if constexpr (kCoarse) {
    r = x - n * T(0.6931471805599453);
  } else {
    r = (x - n * Traits::kLn2High) - n * Traits::kLn2Low;
  }
  Vec<T> poly = broadcast<T>(kCoefficients[kDegree]);
#pragma GCC unroll 16
  for (int k = kDegree - 1; k >= 0; --k) poly = poly * r + kCoefficients[k];
  return poly * (Vec<T>)((Mask<T>)shifted << Traits::kMantissaBits);
}

// log(x) for normal x > 0; x where it is infinite or NaN. Error below 2 ulp: x = 2^n m with m from
// sqrt(1/2) on, log(m) = 2 artanh(s) with s = (m - 1) / (m + 1) and its series in s^2 <= 0.0295.
template <typename T>
USP_SIMD Vec<T> log(Vec<T> x) {
  using Traits = VectorTraits<T>;
  const Mask<T> bits = (Mask<T>)x - Traits::kHalfRoot;
  const Mask<T> exponent = bits >> Traits::kMantissaBits;
  const Vec<T> m = (Vec<T>)((bits ^ exponent << Traits::kMantissaBits) + Traits::kHalfRoot);
  const Vec<T> n = __builtin_convertvector(exponent, Vec<T>);
  const Vec<T> s = (m - T(1)) / (m + T(1)), s2 = s * s;
  Vec<T> series = broadcast<T>(T(1) / T(2 * Traits::kLogTerms + 1));
#pragma GCC unroll 16
  for (int k = Traits::kLogTerms - 1; k > 0; --k) series = series * s2 + T(1) / T(2 * k + 1);
  const Vec<T> rest = T(2) * s * s2 * series + n * Traits::kLn2Low;
  const Vec<T> result = n * Traits::kLn2High + (T(2) * s + rest);
  return x < broadcast<T>(std::numeric_limits<T>::infinity()) ? result : x;
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
