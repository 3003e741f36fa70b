#include "cpu/kernels.h"

#include "cpu/fastest.h"

namespace usp::cpu {

template <typename T>
const Kernels<T>& kernels_of(Capability capability, DType inputs) {
#if USP_CPU_X86
  if constexpr (sizeof(T) == sizeof(float)) {
    if (capability >= Capability::kAvx512Bf16 && inputs == DType::kBFloat16) {
#if USP_CPU_AMX
      if (capability == Capability::kAmx) return amx_kernels();
      if (capability == Capability::kAmxEmulated) return amx_emulated_kernels();
#endif
      return avx512_bf16_kernels();
    }
  }
  if (capability >= Capability::kAvx512) return avx512_kernels<T>();
  if (capability == Capability::kAvx2) return avx2_kernels<T>();
#elif USP_CPU_NEON_BF16
  if constexpr (sizeof(T) == sizeof(float)) {
    const bool takes = capability == Capability::kNeonBf16 && inputs == DType::kBFloat16;
    if (takes) return neon_bf16_kernels();
  }
#endif
  (void)capability;
  (void)inputs;
  return default_kernels<T>();
}

template <typename T>
const Kernels<T>& kernels(DType inputs) {
  return kernels_of<T>(capability_for(inputs), inputs);
}

template const Kernels<float>& kernels_of<float>(Capability, DType);
template const Kernels<double>& kernels_of<double>(Capability, DType);
template const Kernels<float>& kernels<float>(DType);
template const Kernels<double>& kernels<double>(DType);

}  // namespace usp::cpu
