#include "cpu/capability.h"

#if USP_CPU_AMX
#include <cpuid.h>
#endif
#if USP_CPU_AMX && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#if USP_CPU_NEON_BF16 && defined(__linux__)
#include <sys/auxv.h>
#elif USP_CPU_NEON_BF16 && defined(__APPLE__)
#include <sys/sysctl.h>
#endif

namespace usp::cpu {
namespace {

// Whether tiles of bf16 are there, the system saves them, and lets this process have them: their
// state is large, and Linux wants to be asked once for a process and what it forks.
[[maybe_unused]] bool may_use_amx() {
#if USP_CPU_AMX && defined(__linux__)
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  constexpr unsigned kAmxBf16 = 1u << 22, kAmxTile = 1u << 24;
  if ((d & kAmxBf16) == 0 || (d & kAmxTile) == 0) return false;
  if (!__get_cpuid(1, &a, &b, &c, &d) || (c & bit_OSXSAVE) == 0) return false;
  unsigned low, high;
  __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  constexpr unsigned kTileConfig = 1u << 17, kTileData = 1u << 18;
  if ((low & kTileConfig) == 0 || (low & kTileData) == 0) return false;
  constexpr long kRequestPermission = 0x1023, kTileDataFeature = 18;  // ARCH_REQ_XCOMP_PERM
  return syscall(SYS_arch_prctl, kRequestPermission, kTileDataFeature) == 0;
#else
  return false;
#endif
}

// Whether FEAT_BF16 is there.
[[maybe_unused]] bool has_neon_bf16() {
#if USP_CPU_NEON_BF16 && defined(__linux__)
  constexpr unsigned long kBf16 = 1ul << 14;  // HWCAP2_BF16, which old headers lack
  return (getauxval(AT_HWCAP2) & kBf16) != 0;
#elif USP_CPU_NEON_BF16 && defined(__APPLE__)
  int there = 0;
  size_t size = sizeof(there);
  return sysctlbyname("hw.optional.arm.FEAT_BF16", &there, &size, nullptr, 0) == 0 && there != 0;
#else
  return false;
#endif
}

Capability highest() {
#if USP_CPU_X86
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) {
    return Capability::kDefault;
  }
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (!avx512) return Capability::kAvx2;
  if (!__builtin_cpu_supports("avx512bf16")) return Capability::kAvx512;
  return may_use_amx() ? Capability::kAmx : Capability::kAvx512Bf16;
#else
  return has_neon_bf16() ? Capability::kNeonBf16 : Capability::kDefault;
#endif
}

}  // namespace

Capability capability_of_machine() {
  static const Capability machine = highest();
  return machine;
}

}  // namespace usp::cpu
