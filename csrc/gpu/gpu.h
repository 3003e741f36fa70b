#pragma once

// The one file that knows CUDA from HIP, and the CPU that stands in for both.
//
// Exactly one of USP_GPU_CUDA, USP_GPU_HIP and USP_GPU_EMULATED is defined. The HIP part needs none
// of HIP's headers. The emulated GPU runs the threads of a block as fibres (emulated/simt.h); the
// macro USP_GPU_EMULATED_WAVE says whether they form NVIDIA's warps of 32 or AMD's waves of 64.
//
// Blocks and grids are one-dimensional. A wave is CUDA's warp, HIP's wavefront.

#include <cstddef>
#include <cstdint>

#include "common/macros.h"
#include "gpu/stream.h"

#if defined(__HIP__)
#define USP_GPU_HIP 1
#define USP_KERNEL __attribute__((global))
#define USP_DEVICE __attribute__((device)) inline __attribute__((always_inline))
#define USP_LAUNCH_BOUNDS(threads, blocks)                          \
  __attribute__((amdgpu_flat_work_group_size((threads), (threads)), \
                 amdgpu_waves_per_eu(((threads) * (blocks) + 255) / 256)))
#define USP_UNROLL _Pragma("unroll")
#elif defined(__CUDACC__)
#define USP_GPU_CUDA 1
#include <cuda_runtime.h>
#define USP_KERNEL __global__
#define USP_DEVICE __device__ __forceinline__
#define USP_LAUNCH_BOUNDS(threads, blocks) __launch_bounds__(threads, blocks)
#define USP_UNROLL _Pragma("unroll")
#else
#define USP_GPU_EMULATED 1
#ifndef USP_GPU_EMULATED_WAVE
#define USP_GPU_EMULATED_WAVE 32
#endif
#include <cmath>
#include <cstring>

#include "gpu/emulated/simt.h"
#define USP_KERNEL static
#define USP_DEVICE inline
#define USP_LAUNCH_BOUNDS(threads, blocks)
#define USP_UNROLL
#endif

#ifdef USP_GPU_HIP
// What the kernels need of libamdhip64, by its C interface.
struct dim3 {
  uint32_t x, y, z;
};
extern "C" {
int hipLaunchKernel(const void* function, dim3 grid, dim3 block, void** arguments, size_t shared,
                    struct ihipStream_t* stream);
int hipGetLastError();
const char* hipGetErrorString(int error);
}
#endif

namespace usp::gpu {

#if defined(USP_GPU_CUDA)
inline constexpr int kWaveSize = 32;
#elif defined(USP_GPU_HIP)
inline constexpr int kWaveSize = 64;
#else
inline constexpr int kWaveSize = USP_GPU_EMULATED_WAVE;
#endif

// Of one launch, with up to 256 threads each: HIP counts threads in 32 bits. In tests a few, so
// that there are problems that take several launches.
#if defined(USP_GPU_EMULATED)
inline constexpr int64_t kMostBlocks = 61;
#else
inline constexpr int64_t kMostBlocks = (int64_t{1} << 24) - 1;
#endif

// --- Host: launching -----------------------------------------------------------------------------

// The first error since the last call, as text; null when all went well.
inline const char* last_error() {
#if defined(USP_GPU_CUDA)
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
#elif defined(USP_GPU_HIP)
  const int error = hipGetLastError();
  return error == 0 ? nullptr : hipGetErrorString(error);
#else
  return nullptr;
#endif
}

// Starts `blocks` of `kernel` on `stream` with `shared_bytes` of dynamic shared memory. Errors:
// last_error().
template <typename... Parameters>
void launch(void (*kernel)(Parameters...), uint32_t blocks, int threads, size_t shared_bytes,
            Stream stream, Parameters... arguments) {
#if defined(USP_GPU_EMULATED)
  (void)stream;
  const emulated::Argument given[] = {{&arguments, sizeof(arguments)}...};
  const emulated::Launch told{reinterpret_cast<const void*>(kernel),
                              given,
                              sizeof...(arguments),
                              {blocks, 1, 1},
                              threads,
                              shared_bytes};
  if (emulated::redirected(told)) return;
  emulated::run_grid(blocks, threads, kWaveSize, shared_bytes, [&] { kernel(arguments...); });
#else
  void* pointers[] = {static_cast<void*>(&arguments)...};
  const void* function = reinterpret_cast<const void*>(kernel);
  const dim3 grid{blocks, 1, 1}, block{static_cast<uint32_t>(threads), 1, 1};
#if defined(USP_GPU_CUDA)
  constexpr size_t kWithoutAsking = 48 * 1024;
  if (shared_bytes > kWithoutAsking) {
    cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize,
                         static_cast<int>(shared_bytes));
  }
  cudaLaunchKernel(function, grid, block, pointers, shared_bytes,
                   static_cast<cudaStream_t>(stream.handle));
#else
  (void)hipLaunchKernel(function, grid, block, pointers, shared_bytes,
                        static_cast<ihipStream_t*>(stream.handle));
#endif
#endif
}

// --- Device: who am I ----------------------------------------------------------------------------

USP_DEVICE uint32_t thread_index() {
#if defined(USP_GPU_CUDA)
  return threadIdx.x;
#elif defined(USP_GPU_HIP)
  return __builtin_amdgcn_workitem_id_x();
#else
  return emulated::thread_index();
#endif
}

// Asked again, it is read again: what follows from it need not wait in a register.
USP_DEVICE uint32_t block_index() {
#if defined(USP_GPU_CUDA)
  uint32_t index;
  asm volatile("mov.u32 %0, %%ctaid.x;" : "=r"(index));
  return index;
#elif defined(USP_GPU_HIP)
  return __builtin_amdgcn_workgroup_id_x();
#else
  return emulated::block_index();
#endif
}

// Within the wave.
USP_DEVICE int lane() { return static_cast<int>(thread_index()) % kWaveSize; }

// Which wave of the block, the same for all its lanes as the compiler can tell. Every lane of the
// wave comes here.
USP_DEVICE int wave() {
  const int index = static_cast<int>(thread_index()) / kWaveSize;
#if defined(USP_GPU_CUDA)
  return __shfl_sync(0xFFFFFFFFu, index, 0);
#elif defined(USP_GPU_HIP)
  return __builtin_amdgcn_readfirstlane(index);
#else
  emulated::meet_wave([](void* const*, int) {}, nullptr);
  return index;
#endif
}

// --- Device: threads together --------------------------------------------------------------------

// Every thread of the block comes here; shared memory written before is seen after.
USP_DEVICE void barrier() {
#if defined(USP_GPU_CUDA)
  __syncthreads();
#elif defined(USP_GPU_HIP)
  __builtin_amdgcn_fence(__ATOMIC_RELEASE, "workgroup");
  __builtin_amdgcn_s_barrier();
  __builtin_amdgcn_fence(__ATOMIC_ACQUIRE, "workgroup");
#else
  emulated::barrier();
#endif
}

// The value of the lane whose number differs by `mask`. Every lane of the wave comes here.
USP_DEVICE float shuffle_xor(float value, int mask) {
#if defined(USP_GPU_CUDA)
  return __shfl_xor_sync(0xFFFFFFFFu, value, mask);
#elif defined(USP_GPU_HIP)
  const int from = (lane() ^ mask) * 4;
  return __builtin_bit_cast(float,
                            __builtin_amdgcn_ds_bpermute(from, __builtin_bit_cast(int, value)));
#else
  return emulated::shuffle_xor(value, mask);
#endif
}

// Whether it is true in any lane. Every lane of the wave comes here.
USP_DEVICE bool any_lane(bool here) {
  float found = here ? 1.0f : 0.0f;
  for (int step = 1; step < kWaveSize; step *= 2) found += shuffle_xor(found, step);
  return found > 0.0f;
}

// The block's dynamic shared memory, aligned to 16 bytes.
USP_DEVICE char* shared_memory() {
#if defined(USP_GPU_CUDA)
  extern __shared__ __align__(16) char usp_shared_memory[];
  return usp_shared_memory;
#elif defined(USP_GPU_HIP)
  extern __attribute__((shared)) __attribute__((aligned(16))) char usp_shared_memory[];
  return usp_shared_memory;
#else
  return emulated::shared_memory();
#endif
}

// --- Device: memory -----------------------------------------------------------------------------

// The same pointer, known to point to global memory: AMD has instructions for just that.
template <typename T>
USP_DEVICE T* in_global_memory(T* pointer) {
#if defined(USP_GPU_HIP)
  return (T*)(__attribute__((address_space(1))) T*)pointer;
#else
  return pointer;
#endif
}

// Sixteen bytes.
#if defined(USP_GPU_CUDA)
using Vector16 = uint4;
#else
using Vector16 = uint32_t __attribute__((vector_size(16)));
#endif

// --- Device: copies to shared memory -------------------------------------------------------------

// Whether copies to shared memory run by themselves. AMD has none such: there a value passes
// through a register, and what is read early must wait in one.
#if defined(USP_GPU_CUDA)
inline constexpr bool kAsyncCopies = true;
#elif defined(USP_GPU_HIP)
inline constexpr bool kAsyncCopies = false;
#else
inline constexpr bool kAsyncCopies = kWaveSize == 32;
#endif

// Sixteen bytes, global to shared, both aligned to 16; zeros where not `valid`, and then `from` is
// not read. Arrives by copies_arrived().
USP_DEVICE void copy16([[maybe_unused]] void* to, [[maybe_unused]] const void* from,
                       [[maybe_unused]] bool valid) {
#if defined(USP_GPU_CUDA)
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(to));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(from),
               "r"(valid ? 16 : 0));
#elif defined(USP_GPU_EMULATED)
  emulated::copy_later(to, from, sizeof(Vector16), valid);
#endif
}

// One float likewise.
USP_DEVICE void copy4([[maybe_unused]] float* to, [[maybe_unused]] const float* from,
                      [[maybe_unused]] bool valid) {
#if defined(USP_GPU_CUDA)
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(to));
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(address), "l"(from),
               "r"(valid ? 4 : 0));
#elif defined(USP_GPU_EMULATED)
  emulated::copy_later(to, from, sizeof(float), valid);
#endif
}

// This thread's copies so far have arrived; a barrier() makes them the block's.
USP_DEVICE void copies_arrived() {
#if defined(USP_GPU_CUDA)
  asm volatile("cp.async.wait_all;" ::: "memory");
#elif defined(USP_GPU_EMULATED)
  emulated::copies_arrived();
#endif
}

// --- Device: arithmetic --------------------------------------------------------------------------

inline constexpr float kInfinity = __builtin_huge_valf();
inline constexpr float kLog2e = 1.44269504088896340736f;
inline constexpr float kLn2 = 0.69314718055994530942f;

USP_DEVICE float fast_exp2(float x) {
#if defined(USP_GPU_CUDA)
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#elif defined(USP_GPU_HIP)
  return __builtin_amdgcn_exp2f(x);
#else
  return std::exp2(x);
#endif
}

USP_DEVICE float fast_log2(float x) {
#if defined(USP_GPU_CUDA)
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#elif defined(USP_GPU_HIP)
  return __builtin_amdgcn_logf(x);
#else
  return std::log2(x);
#endif
}

USP_DEVICE float fast_reciprocal(float x) {
#if defined(USP_GPU_CUDA)
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#elif defined(USP_GPU_HIP)
  return __builtin_amdgcn_rcpf(x);
#else
  return 1.0f / x;
#endif
}

// A series near 0, where 1 - 2 / (exp(2x) + 1) would cancel.
USP_DEVICE float fast_tanh(float x) {
  const float x2 = x * x;
  const float series = 1.0f + x2 * (-1.0f / 3 + x2 * (2.0f / 15 + x2 * (-17.0f / 315)));
  const float far = 1.0f - 2.0f * fast_reciprocal(fast_exp2(2.0f * kLog2e * x) + 1.0f);
  constexpr float kNear = 0.04f;  // the next term is below 2^-24 of 1
  return x2 < kNear ? x * series : far;
}

USP_DEVICE float larger(float a, float b) {
#if defined(USP_GPU_EMULATED)
  return std::fmax(a, b);
#else
  return __builtin_fmaxf(a, b);
#endif
}

USP_DEVICE float fma(float a, float b, float c) { return __builtin_fmaf(a, b, c); }

template <typename To, typename From>
USP_DEVICE To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  __builtin_memcpy(&to, &from, sizeof(to));
  return to;
}

}  // namespace usp::gpu
