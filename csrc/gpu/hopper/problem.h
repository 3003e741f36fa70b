#pragma once

// Which problems the kernels of this folder take: the one place that says so.

#include "../scores.h"
#include "device.h"
#include "tensor_map.h"

namespace usp::gpu::hopper {

// Head dims without padding, no option that looks at single scores, and tensors that the TMA takes.
inline bool is_taken(const Attention<float>& a) {
  return (a.D == 64 || a.D == 128) && a.D == a.Dv && is_plain(a) && a.B > 0 && a.H > 0 &&
         a.Lq > 0 && a.Lk > 0 && can_map(a.q, a.B, a.Lq, a.H) && can_map(a.k, a.B, a.Lk, a.G) &&
         can_map(a.v, a.B, a.Lk, a.G);
}

// Whether pairs of numbers of `size` bytes can be read and written there. Null is fine.
inline bool has_aligned_pairs(const void* data, int size) {
  return reinterpret_cast<uintptr_t>(data) % (2 * size) == 0;
}

// Calls run(integral constant) with the head dim.
template <typename Run>
auto with_exact_head_dim(const Attention<float>& a, Run&& run) {
  if (a.D == 64) return run(std::integral_constant<int, 64>{});
  return run(std::integral_constant<int, 128>{});
}

}  // namespace usp::gpu::hopper
