// AVX2 and FMA.

#include "cpu/kernels.h"

#if USP_CPU_X86

// The target is set in the source, after every header that other objects share, so that no build
// system has to know it and no shared inline function is compiled for it.
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif

#define USP_VECTOR_BYTES 32
#define USP_GEMM_ROWS 6
#define USP_GEMM_VECTORS 2
#include "cpu/tile_kernels.h"

namespace usp::cpu {

template <>
const Kernels<float>& avx2_kernels<float>() {
  static constexpr Kernels<float> table = make_kernels<float>();
  return table;
}

template <>
const Kernels<double>& avx2_kernels<double>() {
  static constexpr Kernels<double> table = make_kernels<double>();
  return table;
}

}  // namespace usp::cpu

#if defined(__clang__)
#pragma clang attribute pop
#endif

#endif  // USP_CPU_X86
