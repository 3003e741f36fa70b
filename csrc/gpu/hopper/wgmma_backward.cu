// Gradients of one block of keys, from the final lse and delta, on sm_90a.
//
// As in ../attention_backward.cu: one kernel owns keys and walks over queries for dK and dV, one
// owns queries and walks over keys for dQ. A thread block owns 128 rows; one warpgroup brings what
// it walks over, two have 64 rows each. Scores are computed with the own rows as rows, so that they
// and their gradients are the left operands of the next products where they lie, in registers.

#include "attention.h"

#if defined(USP_WGMMA)

#include "key_gradients.h"
#include "problem.h"
#include "query_gradients.h"

namespace usp::gpu::hopper {
namespace {

// Fills the four maps; returns null, or what went wrong.
template <int kDim>
const char* make_maps(GradientArguments& arguments, int query_rows, int key_rows) {
  const Attention<float>& a = arguments.inputs;
  const MapSizes queries{a.B, a.Lq, a.H, kDim, query_rows}, keys{a.B, a.Lk, a.G, kDim, key_rows};
  const char* error = make_map(arguments.q, a.q, queries);
  if (error == nullptr) error = make_map(arguments.dout, arguments.gradients.dout, queries);
  if (error == nullptr) error = make_map(arguments.k, a.k, keys);
  if (error == nullptr) error = make_map(arguments.v, a.v, keys);
  return error;
}

template <typename T, int kDim>
const char* launch_backward(const Attention<float>& a, const AttentionGradients<float>& gradients,
                            Stream stream) {
  constexpr int kBytes = shared_bytes(GradientShared<T, kDim>::kBytes);
  static_assert(kBytes <= kSharedLimit);
  GradientArguments arguments{a, gradients, {}, {}, {}, {}, {}};
  if (const char* error = make_maps<kDim>(arguments, kColumns, kOwnRows)) return error;
  launch_blocks(wgmma_key_value_kernel<T, kDim>, arguments, tiles_of(a.Lk, kOwnRows), a.G, a.B,
                kThreads, kBytes, stream);
  if (const char* error = make_maps<kDim>(arguments, kOwnRows, kColumns)) return error;
  launch_blocks(wgmma_query_kernel<T, kDim>, arguments, tiles_of(a.Lq, kOwnRows), a.H, a.B,
                kThreads, kBytes, stream);
  return last_error();
}

}  // namespace

bool takes_backward(const Attention<float>& inputs, const AttentionGradients<float>& gradients) {
  const auto takes = [](const float* sum, const void* result) {
    return has_aligned_pairs(sum, 4) && has_aligned_pairs(result, 4);
  };
  const GradientResults& results = gradients.results;
  return is_taken(inputs) && can_map(gradients.dout, inputs.B, inputs.Lq, inputs.H) &&
         takes(gradients.dq, results.dq) && takes(gradients.dk, results.dk) &&
         takes(gradients.dv, results.dv) && runs_here(wgmma_query_kernel<BFloat16, 64>);
}

const char* attention_backward(const Attention<float>& inputs,
                               const AttentionGradients<float>& gradients, Stream stream) {
  return with_exact_head_dim(inputs, [&](auto dim) {
    constexpr int kDim = decltype(dim)::value;
    return inputs.q.dtype == DType::kBFloat16
               ? launch_backward<BFloat16, kDim>(inputs, gradients, stream)
               : launch_backward<Float16, kDim>(inputs, gradients, stream);
  });
}

}  // namespace usp::gpu::hopper

#endif
