#pragma once

// Shared headers are compiled by the host compiler for several instruction sets and by device
// compilers, for HIP also without HIP's own headers. Forced inlining keeps the linker from merging
// a copy built for one instruction set into code that must run without it.
#if defined(__HIP__)
#define USP_HOST_DEVICE \
  __attribute__((host)) __attribute__((device)) inline __attribute__((always_inline))
#elif defined(__CUDACC__)
#define USP_HOST_DEVICE __host__ __device__ __forceinline__
#elif defined(_MSC_VER)
#define USP_HOST_DEVICE __forceinline
#else
#define USP_HOST_DEVICE inline __attribute__((always_inline))
#endif
