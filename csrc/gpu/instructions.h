#pragma once

// The matrix instructions themselves. layouts.h says what each register holds.

#include "gpu/half.h"
#include "gpu/layouts.h"

#if defined(USP_GPU_EMULATED)
#include "gpu/emulated/instructions.h"
#endif

namespace usp::gpu {

// mma.sync.aligned.m16n8k16: d += a b.
template <typename T>
USP_DEVICE void mma_m16n8k16([[maybe_unused]] float* d, [[maybe_unused]] const uint32_t* a,
                             [[maybe_unused]] const uint32_t* b) {
#if defined(USP_GPU_CUDA)
  if constexpr (kIsBFloat16<T>) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
#elif defined(USP_GPU_EMULATED)
  emulated::mma_m16n8k16<T>(d, a, b);
#endif
}

// ldmatrix.x4: `row` is this lane's address in shared memory, aligned to 16 bytes.
template <bool kTransposed>
USP_DEVICE void load_m8n8x4([[maybe_unused]] uint32_t* d, [[maybe_unused]] const void* row) {
#if defined(USP_GPU_CUDA)
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  if constexpr (kTransposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
                 : "r"(address)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
                 : "r"(address)
                 : "memory");
  }
#elif defined(USP_GPU_EMULATED)
  emulated::load_m8n8x4(d, row, kTransposed);
#endif
}

#if defined(USP_GPU_HIP)
// Four bf16 or fp16 in two registers, as the builtins want them.
template <typename T>
USP_DEVICE auto four_numbers(const uint32_t* packed) {
  using Short4 = short __attribute__((ext_vector_type(4)));
  using Half4 = _Float16 __attribute__((ext_vector_type(4)));
  struct Pair {
    uint32_t low, high;
  } pair{packed[0], packed[1]};
  if constexpr (kIsBFloat16<T>) {
    return bits_as<Short4>(pair);
  } else {
    return bits_as<Half4>(pair);
  }
}
#endif

// v_mfma_f32_16x16x16: d += a b.
template <typename T>
USP_DEVICE void mfma_16x16x16([[maybe_unused]] float* d, [[maybe_unused]] const uint32_t* a,
                              [[maybe_unused]] const uint32_t* b) {
#if defined(USP_GPU_HIP)
  using Float4 = float __attribute__((ext_vector_type(4)));
  const auto left = four_numbers<T>(a), right = four_numbers<T>(b);
  Float4 sum;
  for (int i = 0; i < 4; ++i) sum[i] = d[i];
  if constexpr (kIsBFloat16<T>) {
    sum = __builtin_amdgcn_mfma_f32_16x16x16bf16_1k(left, right, sum, 0, 0, 0);
  } else {
    sum = __builtin_amdgcn_mfma_f32_16x16x16f16(left, right, sum, 0, 0, 0);
  }
  for (int i = 0; i < 4; ++i) d[i] = sum[i];
#elif defined(USP_GPU_EMULATED)
  emulated::mfma_16x16x16<T>(d, a, b);
#endif
}

// v_mfma_f32_32x32x8: d += a b.
template <typename T>
USP_DEVICE void mfma_32x32x8([[maybe_unused]] float* d, [[maybe_unused]] const uint32_t* a,
                             [[maybe_unused]] const uint32_t* b) {
#if defined(USP_GPU_HIP)
  using Float16s = float __attribute__((ext_vector_type(16)));
  const auto left = four_numbers<T>(a), right = four_numbers<T>(b);
  Float16s sum;
  for (int i = 0; i < 16; ++i) sum[i] = d[i];
  if constexpr (kIsBFloat16<T>) {
    sum = __builtin_amdgcn_mfma_f32_32x32x8bf16_1k(left, right, sum, 0, 0, 0);
  } else {
    sum = __builtin_amdgcn_mfma_f32_32x32x8f16(left, right, sum, 0, 0, 0);
  }
  for (int i = 0; i < 16; ++i) d[i] = sum[i];
#elif defined(USP_GPU_EMULATED)
  emulated::mfma_32x32x8<T>(d, a, b);
#endif
}

}  // namespace usp::gpu
