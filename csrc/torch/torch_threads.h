#pragma once

// torch's own thread pool, as kernels that know nothing of torch take it.

#include <torch/csrc/stable/ops.h>

#include "cpu/parallel.h"

namespace usp {

inline cpu::ParallelFor torch_threads() {
  return {torch::stable::get_num_threads(), [](int64_t workers, const auto& body) {
            torch::stable::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
              for (int64_t worker = begin; worker < end; ++worker) body(worker);
            });
          }};
}

}  // namespace usp
