#pragma once

// Which devices run the kernels of this folder.

#include "barrier.h"

namespace usp::gpu::hopper {

// Whether the current device is of compute capability 9.0, and `kernel` was compiled for sm_90a:
// a build for other devices alone has it without a body.
template <typename... Parameters>
bool runs_here(void (*kernel)(Parameters...)) {
#if defined(USP_GPU_CUDA)
  int device = 0, major = 0, minor = 0;
  cudaFuncAttributes attributes{};
  const bool runs =
      cudaGetDevice(&device) == cudaSuccess &&
      cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess &&
      cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device) == cudaSuccess &&
      major == 9 && minor == 0 &&
      cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(kernel)) == cudaSuccess &&
      attributes.ptxVersion >= 90;
  if (!runs) (void)cudaGetLastError();  // not an error of what runs instead
  return runs;
#else
  (void)kernel;
  return host::compute_capability() == 90;
#endif
}

}  // namespace usp::gpu::hopper
