#pragma once

#include "common/state_merge.h"
#include "cpu/parallel.h"

namespace usp::cpu {

// T is float or double; more_out holds T, or bf16 or fp16 with T = float.
template <typename T>
void state_merge(const StateMerge<T>& merge, const ParallelFor& parallel);

}  // namespace usp::cpu
