#pragma once

#include "common/state_merge.h"
#include "gpu/stream.h"

namespace usp::gpu {

// Joins a library's partial softmax into the running one, in one pass over memory. more_out is
// fp32, bf16 or fp16. Returns null, or what went wrong.
const char* state_merge(const StateMerge<float>& merge, Stream stream);

}  // namespace usp::gpu
