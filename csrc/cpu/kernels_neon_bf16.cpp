// NEON with BF16: the products of bf16 inputs, two at a time. Everything else is plain NEON's.

#include "cpu/kernels.h"

#if USP_CPU_NEON_BF16

#include <arm_neon.h>

// The target is set in the source, after every header that other objects share, so that no build
// system has to know it and no shared inline function is compiled for it.
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("bf16"))), apply_to = function)
#else
#pragma GCC target("arch=armv8.2-a+bf16")
#endif

#define USP_VECTOR_BYTES 16
#define USP_GEMM_ROWS 6
#define USP_GEMM_VECTORS 4
#include "cpu/pairs.h"

namespace usp::cpu {

const Kernels<float>& neon_bf16_kernels() {
  static constexpr Kernels<float> table = make_bf16_kernels();
  return table;
}

}  // namespace usp::cpu

#if defined(__clang__)
#pragma clang attribute pop
#endif

#endif  // USP_CPU_NEON_BF16
