// Whatever the compiler's baseline has: SSE2, NEON, or plain scalars.

#include "cpu/kernels.h"

#define USP_VECTOR_BYTES 16
#if USP_CPU_ARM  // 32 registers
#define USP_GEMM_ROWS 5
#define USP_GEMM_VECTORS 4
#else
#define USP_GEMM_ROWS 6
#define USP_GEMM_VECTORS 2
#endif
#include "cpu/tile_kernels.h"

namespace usp::cpu {

template <>
const Kernels<float>& default_kernels<float>() {
  static constexpr Kernels<float> table = make_kernels<float>();
  return table;
}

template <>
const Kernels<double>& default_kernels<double>() {
  static constexpr Kernels<double> table = make_kernels<double>();
  return table;
}

}  // namespace usp::cpu
