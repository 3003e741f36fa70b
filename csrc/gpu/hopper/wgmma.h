#pragma once

// Products by wgmma: D (64 x N) += A (64 x 16) B (16 x N) for a warpgroup. layouts.h says what lies
// where.
//
// They run on while the warps do other things. Between begin_products() and products_done() nobody
// touches the registers that they read and write.

#include "barrier.h"
#include "registers.h"

namespace usp::gpu::hopper {

// The compiler thinks that asm has written its registers when it ends: it must not move their use.
template <int kColumns>
USP_DEVICE void keep_here(Product<kColumns>& product) {
#if defined(USP_GPU_CUDA)
  USP_UNROLL
  for (int i = 0; i < kColumns / 2; ++i) asm volatile("" : "+f"(product.x[i])::"memory");
#endif
}

template <typename T, int kColumns>
USP_DEVICE void keep_here(LeftOperand<T, kColumns>& left) {
#if defined(USP_GPU_CUDA)
  USP_UNROLL
  for (int k = 0; k < left.kSteps; ++k) {
    USP_UNROLL
    for (int i = 0; i < 4; ++i) asm volatile("" : "+r"(left.packed[k][i])::"memory");
  }
#endif
}

// These registers are ready for products.
template <typename... Registers>
USP_DEVICE void begin_products(Registers&... registers) {
  (keep_here(registers), ...);
#if defined(USP_GPU_CUDA)
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#else
  host::begin_products();
#endif
}

// Closes a group of products.
USP_DEVICE void end_products() {
#if defined(USP_GPU_CUDA)
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#else
  host::end_products();
#endif
}

// All groups but the latest kRunning have ended, so that these `registers` are free again.
template <int kRunning, typename... Registers>
USP_DEVICE void products_done(Registers&... registers) {
#if defined(USP_GPU_CUDA)
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kRunning) : "memory");
#else
  host::products_done(kRunning);
#endif
  (keep_here(registers), ...);
}

#if defined(USP_GPU_CUDA)

#define USP_SUMS(i)                                                                     \
  "+f"(d.x[i]), "+f"(d.x[i + 1]), "+f"(d.x[i + 2]), "+f"(d.x[i + 3]), "+f"(d.x[i + 4]), \
      "+f"(d.x[i + 5]), "+f"(d.x[i + 6]), "+f"(d.x[i + 7])
#define USP_SUMS_64 USP_SUMS(0), USP_SUMS(8), USP_SUMS(16), USP_SUMS(24)
#define USP_SUMS_128 USP_SUMS_64, USP_SUMS(32), USP_SUMS(40), USP_SUMS(48), USP_SUMS(56)

#define USP_NAMES_64                                             \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, " \
  "%14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, " \
  "%26, %27, %28, %29, %30, %31"
#define USP_NAMES_128                                            \
  USP_NAMES_64                                                   \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, "    \
  "%43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, " \
  "%55, %56, %57, %58, %59, %60, %61, %62, %63"

// Two kinds: A and B from shared memory, both K major; A from registers, B MN major.
#define USP_PRODUCT(columns, dtype)                                                                \
  "wgmma.mma_async.sync.aligned.m64n" #columns "k16.f32." dtype "." dtype " {" USP_NAMES_##columns \
      "}"
#define USP_PRODUCT_SHARED(columns, dtype, left, right, add)                                     \
  asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, " add                                       \
               ", 0;\n" USP_PRODUCT(columns, dtype) ", " left ", " right ", add, 1, 1, 0, 0;\n}" \
               : USP_SUMS_##columns                                                              \
               : "l"(a), "l"(b), "n"(kAdd))
#define USP_PRODUCT_REGISTERS(columns, dtype, left, right)                        \
  asm volatile(USP_PRODUCT(columns, dtype) ", {" left "}, " right ", 1, 1, 1, 1;" \
               : USP_SUMS_##columns                                               \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b))

#endif

// d (+)= a b^T, a and b K major.
template <typename T, bool kAdd, int kColumns>
USP_DEVICE void multiply_16(Product<kColumns>& d, uint64_t a, uint64_t b) {
  static_assert(kColumns == 64 || kColumns == 128);
#if defined(USP_GPU_CUDA)
  if constexpr (kColumns == 64 && kIsBFloat16<T>) {
    USP_PRODUCT_SHARED(64, "bf16", "%32", "%33", "%34");
  } else if constexpr (kColumns == 64) {
    USP_PRODUCT_SHARED(64, "f16", "%32", "%33", "%34");
  } else if constexpr (kIsBFloat16<T>) {
    USP_PRODUCT_SHARED(128, "bf16", "%64", "%65", "%66");
  } else {
    USP_PRODUCT_SHARED(128, "f16", "%64", "%65", "%66");
  }
#else
  host::wgmma<T, kColumns>({d.x, nullptr, a, b, kAdd});
#endif
}

// d += a b, b MN major.
template <typename T, int kColumns>
USP_DEVICE void multiply_16(Product<kColumns>& d, const uint32_t (&a)[4], uint64_t b) {
  static_assert(kColumns == 64 || kColumns == 128);
#if defined(USP_GPU_CUDA)
  if constexpr (kColumns == 64 && kIsBFloat16<T>) {
    USP_PRODUCT_REGISTERS(64, "bf16", "%32, %33, %34, %35", "%36");
  } else if constexpr (kColumns == 64) {
    USP_PRODUCT_REGISTERS(64, "f16", "%32, %33, %34, %35", "%36");
  } else if constexpr (kIsBFloat16<T>) {
    USP_PRODUCT_REGISTERS(128, "bf16", "%64, %65, %66, %67", "%68");
  } else {
    USP_PRODUCT_REGISTERS(128, "f16", "%64, %65, %66, %67", "%68");
  }
#else
  host::wgmma<T, kColumns>({d.x, a, 0, b, true});
#endif
}

}  // namespace usp::gpu::hopper
