#pragma once

// The two 16-bit number formats, and the way between them and fp32. Rounds to nearest even.

#include "gpu/gpu.h"

namespace usp::gpu {

struct BFloat16 {
  uint16_t bits;
};

struct Float16 {
  uint16_t bits;
};

template <typename T>
inline constexpr bool kIsBFloat16 = false;
template <>
inline constexpr bool kIsBFloat16<BFloat16> = true;

USP_DEVICE float to_float(BFloat16 x) {
  return bits_as<float>(static_cast<uint32_t>(x.bits) << 16);
}

USP_DEVICE float to_float(Float16 x) {
#if defined(USP_GPU_CUDA)
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
#else
  return static_cast<float>(bits_as<_Float16>(x.bits));
#endif
}

// Of two registers with two numbers each, both first numbers, or both second ones.
USP_DEVICE uint32_t low_halves(uint32_t first, uint32_t second) {
#if defined(USP_GPU_HIP)
  return __builtin_amdgcn_perm(second, first, 0x05040100);
#else
  return second << 16 | (first & 0xFFFFu);
#endif
}

USP_DEVICE uint32_t high_halves(uint32_t first, uint32_t second) {
#if defined(USP_GPU_HIP)
  return __builtin_amdgcn_perm(second, first, 0x07060302);
#else
  return (second & 0xFFFF0000u) | first >> 16;
#endif
}

// Two numbers in one register, the first in the low half.
template <typename T>
USP_DEVICE uint32_t pack(float low, float high);

#if !defined(USP_GPU_CUDA)
// Rounded to bf16 in the high half, if it is a number. A NaN stays one unless its fraction is all
// ones above the lowest 15 bits: then the sum carries over into the sign.
USP_DEVICE uint32_t rounded_number(float x) {
  const uint32_t bits = bits_as<uint32_t>(x);
  return bits + 0x7FFFu + (bits >> 16 & 1u);
}

USP_DEVICE uint32_t rounded_bf16(float x) {
  const uint32_t rounded = rounded_number(x);  // a choice between two values takes no branch
  return (x == x ? rounded : bits_as<uint32_t>(x) | 0x400000u) >> 16;
}
#endif

template <>
USP_DEVICE uint32_t pack<BFloat16>(float low, float high) {
#if defined(USP_GPU_CUDA)
  uint32_t packed;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
#else
  return rounded_bf16(high) << 16 | rounded_bf16(low);
#endif
}

template <>
USP_DEVICE uint32_t pack<Float16>(float low, float high) {
#if defined(USP_GPU_CUDA)
  uint32_t packed;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
#else
  const uint32_t l = bits_as<uint16_t>(static_cast<_Float16>(low));
  const uint32_t h = bits_as<uint16_t>(static_cast<_Float16>(high));
  return h << 16 | l;
#endif
}

// The same of weights of a softmax, which need no care for NaN: one makes the sum of its row, kept
// in fp32, a NaN, and with it the whole row.
template <typename T>
USP_DEVICE uint32_t pack_weights(float low, float high) {
#if !defined(USP_GPU_CUDA)
  if constexpr (kIsBFloat16<T>) return high_halves(rounded_number(low), rounded_number(high));
#endif
  return pack<T>(low, high);
}

template <typename T>
USP_DEVICE T rounded(float x) {
  return {static_cast<uint16_t>(pack<T>(x, 0.0f))};
}

template <>
USP_DEVICE float rounded<float>(float x) {
  return x;
}

}  // namespace usp::gpu
