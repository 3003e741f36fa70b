#pragma once

// The attention ops as torch calls them: their long lists of arguments, taken apart once for every
// device.

#include "torch/arguments.h"

namespace usp {

struct ForwardCall {
  const Tensor &q, &k, &v;
  OptionalTensors optional;
  Scalars scalars;
  const MaybeTensor& out;
  const Tensor& lse;
  const MaybeTensor& result;
};

struct BackwardCall {
  const Tensor &q, &k, &v;
  OptionalTensors optional;
  Scalars scalars;
  GradientTensors gradients;
};

template <void (*kRun)(const ForwardCall&)>
void attention_forward(const Tensor& q, const Tensor& k, const Tensor& v, const MaybeTensor& first,
                       const MaybeTensor& stop, const MaybeTensor& bias,
                       const MaybeTensor& alibi_slopes, const MaybeTensor& q_pos,
                       const MaybeTensor& k_pos, int64_t head_offset, int64_t num_heads,
                       int64_t group_size, double softmax_scale, double softcap, double dropout_p,
                       int64_t dropout_seed, const MaybeTensor& out, const Tensor& lse,
                       const MaybeTensor& result) {
  const Scalars scalars{head_offset, num_heads, group_size,  softmax_scale,
                        softcap,     dropout_p, dropout_seed};
  kRun({q, k, v, {first, stop, bias, alibi_slopes, q_pos, k_pos}, scalars, out, lse, result});
}

template <void (*kRun)(const BackwardCall&)>
void attention_backward(const Tensor& dout, const Tensor& q, const Tensor& k, const Tensor& v,
                        const Tensor& delta, const Tensor& lse, const MaybeTensor& first,
                        const MaybeTensor& stop, const MaybeTensor& bias,
                        const MaybeTensor& alibi_slopes, const MaybeTensor& q_pos,
                        const MaybeTensor& k_pos, int64_t head_offset, int64_t num_heads,
                        int64_t group_size, double softmax_scale, double softcap, double dropout_p,
                        int64_t dropout_seed, const Tensor& dq, const Tensor& dk, const Tensor& dv,
                        const MaybeTensor& dbias, bool overwrite) {
  const Scalars scalars{head_offset, num_heads, group_size,  softmax_scale,
                        softcap,     dropout_p, dropout_seed};
  const GradientTensors gradients{dout, delta, lse, dq, dk, dv, dbias, overwrite};
  kRun({q, k, v, {first, stop, bias, alibi_slopes, q_pos, k_pos}, scalars, gradients});
}

}  // namespace usp
