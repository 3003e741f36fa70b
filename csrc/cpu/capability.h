#pragma once

// Which instruction sets the CPU kernels were built for, and which this machine has.
// USP_CPU_CAPABILITY=default|avx2|avx512|avx512_bf16|amx forces one; what the machine lacks falls
// to the highest that it has. amx_emulated computes amx's products in plain C++: for tests, slow.

#include <cstdlib>
#include <stdexcept>
#include <string>
#include <vector>

#if (defined(__x86_64__) || defined(_M_X64)) && defined(__GNUC__)
#define USP_CPU_X86 1
#else
#define USP_CPU_X86 0
#endif

#if USP_CPU_X86 && __has_include(<amxbf16intrin.h>)
#define USP_CPU_AMX 1
#else
#define USP_CPU_AMX 0
#endif

namespace usp::cpu {

// In the order in which they need more of a machine.
enum class Capability { kDefault, kAvx2, kAvx512, kAvx512Bf16, kAmxEmulated, kAmx };

inline const char* name(Capability capability) {
  switch (capability) {
    case Capability::kAmx:
      return "amx";
    case Capability::kAmxEmulated:
      return "amx_emulated";
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
#if USP_CPU_AMX
  return {Capability::kDefault,    Capability::kAvx2,        Capability::kAvx512,
          Capability::kAvx512Bf16, Capability::kAmxEmulated, Capability::kAmx};
#elif USP_CPU_X86
  return {Capability::kDefault, Capability::kAvx2, Capability::kAvx512, Capability::kAvx512Bf16};
#else
  return {Capability::kDefault};
#endif
}

// The highest one. Where that is AMX, the process has leave to use its tiles from now on.
Capability capability_of_machine();

// Whether this machine can run it.
inline bool has(Capability capability) {
  const Capability machine = capability_of_machine();
  if (capability == Capability::kAmxEmulated) return machine >= Capability::kAvx512Bf16;
  return capability <= machine;
}

// What USP_CPU_CAPABILITY says, as far as the machine goes; else the highest one.
inline Capability capability_in_use() {
  const char* wanted = std::getenv("USP_CPU_CAPABILITY");
  if (wanted == nullptr || *wanted == '\0') return capability_of_machine();
  for (const Capability capability :
       {Capability::kDefault, Capability::kAvx2, Capability::kAvx512, Capability::kAvx512Bf16,
        Capability::kAmxEmulated, Capability::kAmx}) {
    if (name(capability) != std::string(wanted)) continue;
    return has(capability) ? capability : capability_of_machine();
  }
  throw std::runtime_error("USP_CPU_CAPABILITY is '" + std::string(wanted) +
                           "'; expected default, avx2, avx512, avx512_bf16, amx or amx_emulated");
}

}  // namespace usp::cpu
