#pragma once

// The CPU kernels of one block of attention. Free of torch; see docs/contract.md.
// T is float or double.

#include "../attention.h"
#include "parallel.h"

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

// Whether results can hold dq in this dtype: it is summed over runs of keys, in its own memory.
template <typename T>
bool can_sum_dq_in(DType dtype, int64_t num_keys);

}  // namespace usp::cpu
