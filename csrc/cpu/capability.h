#pragma once

// Which instruction sets the CPU kernels were built for, and which this machine has.
// USP_CPU_CAPABILITY=default|avx2|avx512|avx512_bf16|amx|neon_bf16 forces one; what the machine
// lacks falls to the highest that it has. amx_emulated computes amx's products in plain C++: for
// tests, slow.

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

#if USP_CPU_X86 && __has_include(<amxbf16intrin.h>)
#define USP_CPU_AMX 1
#else
#define USP_CPU_AMX 0
#endif

#if defined(__aarch64__) && defined(__GNUC__)
#define USP_CPU_ARM 1
#else
#define USP_CPU_ARM 0
#endif

// Before version 16 clang hides the intrinsics from a function that has a target of its own.
#if USP_CPU_ARM && __has_include(<arm_bf16.h>) && (!defined(__clang__) || __clang_major__ >= 16)
#define USP_CPU_NEON_BF16 1
#else
#define USP_CPU_NEON_BF16 0
#endif

namespace usp::cpu {

// In the order in which they need more of a machine, of one kind and then of the other.
enum class Capability { kDefault, kAvx2, kAvx512, kAvx512Bf16, kAmxEmulated, kAmx, kNeonBf16 };

inline const char* name(Capability capability) {
  switch (capability) {
    case Capability::kNeonBf16:
      return "neon_bf16";
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
#elif USP_CPU_NEON_BF16
  return {Capability::kDefault, Capability::kNeonBf16};
#else
  return {Capability::kDefault};
#endif
}

// The highest one. Where that is AMX, the process has leave to use its tiles from now on.
Capability capability_of_machine();

// Whether it was built, and this machine can run it.
inline bool has(Capability capability) {
  const auto built = capabilities_built();
  if (std::find(built.begin(), built.end(), capability) == built.end()) return false;
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
        Capability::kAmxEmulated, Capability::kAmx, Capability::kNeonBf16}) {
    if (name(capability) != std::string(wanted)) continue;
    return has(capability) ? capability : capability_of_machine();
  }
  throw std::runtime_error("USP_CPU_CAPABILITY is '" + std::string(wanted) +
                           "'; expected default, avx2, avx512, avx512_bf16, amx, amx_emulated or "
                           "neon_bf16");
}

}  // namespace usp::cpu
