// AVX-512 with BF16: the products of bf16 inputs, two at a time. Everything else is AVX-512's.

#include "cpu/kernels.h"

#if USP_CPU_X86

#include <immintrin.h>

// The target is set in the source, after every header that other objects share, so that no build
// system has to know it and no shared inline function is compiled for it.
#if defined(__clang__)
#pragma clang attribute push(                                                          \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma"))), \
    apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma")
#endif

#define USP_VECTOR_BYTES 64
#define USP_GEMM_ROWS 6
#define USP_GEMM_VECTORS 4
#include "cpu/pairs.h"

namespace usp::cpu {

const Kernels<float>& avx512_bf16_kernels() {
  static constexpr Kernels<float> table = make_bf16_kernels();
  return table;
}

}  // namespace usp::cpu

#if defined(__clang__)
#pragma clang attribute pop
#endif

#endif  // USP_CPU_X86
