#pragma once

// A call that is one visit of a kernel, without bias, ALiBi and dropout, as an op that makes its
// results: a short sequence waits longer for the tensors that Python makes, and for each argument
// that it passes, than for its attention.

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <limits>
#include <tuple>

#include "torch/attention_ops.h"

namespace usp {

struct OnceScalars {
  int64_t head_offset, group_size;
  double softmax_scale, softcap;

  Scalars of(const Tensor& q) const {
    return {head_offset, head_offset + q.size(2), group_size, softmax_scale, softcap, 0.0, 0};
  }
};

// As torch's C interface numbers them.
inline int32_t dtype_number(const Tensor& x) {
  int32_t dtype = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(x.get(), &dtype));
  return dtype;
}

inline int32_t state_dtype_number(const Tensor& q) {
  const bool is_double = q.scalar_type() == ScalarType::Double;
  return is_double ? aoti_torch_dtype_float64() : aoti_torch_dtype_float32();
}

// Contiguous, on the device of `like`, and not yet written.
template <size_t kDims>
Tensor new_tensor(const Tensor& like, int32_t dtype, const int64_t (&sizes)[kDims]) {
  int64_t strides[kDims];
  strides[kDims - 1] = 1;
  for (size_t d = kDims - 1; d > 0; --d) strides[d - 1] = strides[d] * sizes[d];
  int32_t device = 0;
  AtenTensorHandle made = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device));
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(kDims, sizes, strides, dtype, device,
                                                  like.get_device_index(), &made));
  return Tensor(made);
}

inline Tensor new_like(const Tensor& x) {
  return new_tensor(x, dtype_number(x), {x.size(0), x.size(1), x.size(2), x.size(3)});
}

// The lse of rows that have seen nothing.
inline Tensor new_lse(const Tensor& q) {
  Tensor lse = new_tensor(q, state_dtype_number(q), {q.size(0), q.size(2), q.size(1)});
  if (!lse.is_cpu()) return torch::stable::fill_(lse, -std::numeric_limits<double>::infinity());
  const auto fill = [&](auto value) {
    std::fill_n(static_cast<decltype(value)*>(lse.data_ptr()), lse.numel(), -value);
  };
  lse.scalar_type() == ScalarType::Double ? fill(std::numeric_limits<double>::infinity())
                                          : fill(std::numeric_limits<float>::infinity());
  return lse;
}

// As kernels take it.
inline Tensor last_dim_contiguous(const Tensor& x) {
  return x.size(3) <= 1 || x.stride(3) == 1 ? x : torch::stable::contiguous(x);
}

template <void (*kForward)(const ForwardCall&)>
std::tuple<Tensor, Tensor> attention_once(const Tensor& given_q, const Tensor& given_k,
                                          const Tensor& given_v, const MaybeTensor& first,
                                          const MaybeTensor& stop, int64_t head_offset,
                                          int64_t group_size, double softmax_scale,
                                          double softcap) {
  const Tensor q = last_dim_contiguous(given_q), k = last_dim_contiguous(given_k),
               v = last_dim_contiguous(given_v);
  const OnceScalars scalars{head_offset, group_size, softmax_scale, softcap};
  const MaybeTensor none,
      out = new_tensor(q, dtype_number(q), {q.size(0), q.size(1), q.size(2), v.size(3)});
  const Tensor lse = new_lse(q);
  kForward({q, k, v, {first, stop, none, none, none, none}, scalars.of(q), none, lse, out});
  return {*out, lse};
}

template <void (*kDelta)(const Tensor& dout, const Tensor& out, const Tensor& delta),
          void (*kBackward)(const BackwardCall&)>
std::tuple<Tensor, Tensor, Tensor> attention_once_backward(
    const Tensor& given_dout, const MaybeTensor& dlse, const Tensor& given_q, const Tensor& given_k,
    const Tensor& given_v, const Tensor& out, const Tensor& lse, const MaybeTensor& first,
    const MaybeTensor& stop, int64_t head_offset, int64_t group_size, double softmax_scale,
    double softcap) {
  const Tensor dout = last_dim_contiguous(given_dout), q = last_dim_contiguous(given_q),
               k = last_dim_contiguous(given_k), v = last_dim_contiguous(given_v);
  const OnceScalars scalars{head_offset, group_size, softmax_scale, softcap};
  const MaybeTensor none;
  Tensor delta = new_tensor(q, state_dtype_number(q), {q.size(0), q.size(2), q.size(1)});
  kDelta(dout, out, delta);
  if (dlse) delta = torch::stable::contiguous(torch::stable::subtract(delta, *dlse));
  std::tuple<Tensor, Tensor, Tensor> made{new_like(q), new_like(k), new_like(v)};
  const auto& [dq, dk, dv] = made;
  const GradientTensors gradients{dout, delta, lse, dq, dk, dv, none, true};
  kBackward({q, k, v, {first, stop, none, none, none, none}, scalars.of(q), gradients});
  return made;
}

}  // namespace usp
