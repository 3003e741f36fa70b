#pragma once

// Which instruction set the CPU kernels use. USP_CPU_CAPABILITY=
// default|avx2|avx512|avx512_bf16 forces a lower one than the machine has; a higher one than it has
// falls to what it has.

#include <algorithm>
#include <cstdlib>
#include <stdexcept>
#include <string>
#include <vector>

#if (defined(__x86_64__) || defined(_M_X64)) && defined(__GNUC__)
#define USP_CPU_X86 1
#else
#define USP_CPU_X86 0
#endif

namespace usp::cpu {

enum class Capability { kDefault, kAvx2, kAvx512, kAvx512Bf16 };

inline const char* name(Capability capability) {
  switch (capability) {
    case Capability::kAvx512Bf16:
      return "avx512_bf16";
    case Capability::kAvx512:
      return "avx512";
    case Capability::kAvx2:
      return "avx2";
    default:
      return "default";
  }
}

inline std::vector<Capability> capabilities_built() {
#if USP_CPU_X86
  return {Capability::kDefault, Capability::kAvx2, Capability::kAvx512, Capability::kAvx512Bf16};
#else
  return {Capability::kDefault};
#endif
}

inline Capability capability_of_machine() {
#if USP_CPU_X86
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) {
    return Capability::kDefault;
  }
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (!avx512) return Capability::kAvx2;
  return __builtin_cpu_supports("avx512bf16") ? Capability::kAvx512Bf16 : Capability::kAvx512;
#else
  return Capability::kDefault;
#endif
}

inline Capability capability_in_use() {
  static const Capability machine = capability_of_machine();
  const char* wanted = std::getenv("USP_CPU_CAPABILITY");
  if (wanted == nullptr || *wanted == '\0') return machine;
  for (Capability c :
       {Capability::kDefault, Capability::kAvx2, Capability::kAvx512, Capability::kAvx512Bf16}) {
    if (std::string(name(c)) == wanted) return std::min(c, machine);
  }
  throw std::runtime_error("USP_CPU_CAPABILITY is '" + std::string(wanted) +
                           "'; expected default, avx2, avx512 or avx512_bf16");
}

}  // namespace usp::cpu
