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
  if (cudaGetDevice(&device) != cudaSuccess) return false;
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  if (major != 9 || minor != 0) return false;
  cudaFuncAttributes attributes{};
  const void* function = reinterpret_cast<const void*>(kernel);
  if (cudaFuncGetAttributes(&attributes, function) == cudaSuccess)
    return attributes.ptxVersion >= 90;
  (void)cudaGetLastError();  // not an error of what runs instead
  return false;
#else
  (void)kernel;
  return host::compute_capability() == 90;
#endif
}

}  // namespace usp::gpu::hopper
