#pragma once

// The kernels of attention for sm_90a: wgmma fed by the TMA, a producer and two consumers.

#include "../../attention.h"
#include "../gpu.h"

// Other targets compile none of this.
#if defined(USP_GPU_CUDA) || (defined(USP_GPU_HOST) && USP_GPU_HOST_WAVE == 32)
#define USP_WGMMA 1
#endif

namespace usp::gpu::hopper {

#if defined(USP_WGMMA)

// Whether these kernels take a problem on the current device. What they do not take, those of the
// folder above do.
bool takes_forward(const Attention<float>& inputs, const AttentionState<float>& state);
bool takes_backward(const Attention<float>& inputs, const AttentionGradients<float>& gradients);

// As in ../attention.h; the problem is one they take.
const char* attention_forward(const Attention<float>& inputs, const AttentionState<float>& state,
                              Stream stream);
const char* attention_backward(const Attention<float>& inputs,
                               const AttentionGradients<float>& gradients, Stream stream);

#endif

}  // namespace usp::gpu::hopper
