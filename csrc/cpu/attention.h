#pragma once

// The CPU kernels of one block of attention. Free of torch; see docs/contract.md.
// T is float or double.

#include "common/attention.h"
#include "cpu/parallel.h"

namespace usp::cpu {

// Lets the block's keys into the running softmax `state`, in place.
template <typename T>
void attention_forward(const Attention<T>& inputs, const AttentionState<T>& state,
                       const ParallelFor& parallel);

template <typename T>
void attention_delta(const AttentionDelta<T>& inputs, const ParallelFor& parallel);

// Adds the block's share to dq, dk, dv and dbias, or writes it to the results.
template <typename T>
void attention_backward(const Attention<T>& inputs, const AttentionGradients<T>& gradients,
                        const ParallelFor& parallel);

}  // namespace usp::cpu
