#include "kernels.h"

namespace usp::cpu {

template <typename T>
const Kernels<T>& kernels_of(Capability capability) {
#if USP_CPU_X86
  if (capability == Capability::kAvx512) return avx512_kernels<T>();
  if (capability == Capability::kAvx2) return avx2_kernels<T>();
#endif
  (void)capability;
  return default_kernels<T>();
}

template <typename T>
const Kernels<T>& kernels() {
  return kernels_of<T>(capability_in_use());
}

template const Kernels<float>& kernels_of<float>(Capability);
template const Kernels<double>& kernels_of<double>(Capability);
template const Kernels<float>& kernels<float>();
template const Kernels<double>& kernels<double>();

}  // namespace usp::cpu
