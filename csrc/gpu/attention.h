#pragma once

// The GPU kernels of one block of attention. Free of torch; see docs/contract.md.
// Every pointer is a device pointer. They return null, or what went wrong.
//
// q, k, v (and dout) are all bf16 or all fp16; D and Dv at most 256, Lq and Lk below 2^31.

#include "common/attention.h"
#include "gpu/stream.h"

namespace usp::gpu {

// Lets the block's keys into the running softmax `state`, in place. A result is of q's dtype.
// Without `out`, lse is written and not read.
const char* attention_forward(const Attention<float>& inputs, const AttentionState<float>& state,
                              Stream stream);

// dout and out are both bf16 or both fp16, of any Dv.
const char* attention_delta(const AttentionDelta<float>& inputs, Stream stream);

// Adds the block's share to dq, dk, dv and dbias; results are written over, in fp32 or q's dtype.
const char* attention_backward(const Attention<float>& inputs,
                               const AttentionGradients<float>& gradients, Stream stream);

}  // namespace usp::gpu
