// The torch ops: schemas, and their CPU side. Built against torch's stable
// ABI, so that one library serves torch 2.10 and everything newer.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "arguments.h"
#include "cpu/attention.h"
#include "cpu/head_exchange.h"
#include "cpu/state_merge.h"
#include "cpu/torch_threads.h"
#include "move_arguments.h"

namespace usp {
namespace {

template <typename T>
void forward(const Tensor& q, const Tensor& k, const Tensor& v, const Masks& masks,
             const Scalars& scalars, const MaybeTensor& out, const Tensor& lse,
             const MaybeTensor& result) {
  Arguments args(q);
  const auto inputs = read_inputs<T>(args, q, k, v, masks, scalars);
  cpu::attention_forward<T>(inputs, read_state<T>(args, q, out, lse, result), cpu::torch_threads());
}

template <typename T>
void backward(const Tensor& q, const Tensor& k, const Tensor& v, const Masks& masks,
              const Scalars& scalars, const GradientTensors& g) {
  Arguments args(q);
  const auto inputs = read_inputs<T>(args, q, k, v, masks, scalars);
  auto gradients = read_gradients<T>(args, q, masks.bias, g);
  auto& results = gradients.results;
  if (!g.overwrite || cpu::can_sum_dq_in<T>(results.dq_dtype, inputs.Lk)) {
    return cpu::attention_backward<T>(inputs, gradients, cpu::torch_threads());
  }
  const Tensor dq = torch::stable::new_empty(g.dq, g.dq.sizes(), kScalarType<T>);
  results.dq = dq.data_ptr();
  results.dq_dtype = dtype_of("dq", dq);
  cpu::attention_backward<T>(inputs, gradients, cpu::torch_threads());
  Tensor rounded = g.dq;
  torch::stable::copy_(rounded, dq);
}

void attention_forward(const Tensor& q, const Tensor& k, const Tensor& v, const MaybeTensor& first,
                       const MaybeTensor& stop, const MaybeTensor& bias,
                       const MaybeTensor& alibi_slopes, const MaybeTensor& q_pos,
                       const MaybeTensor& k_pos, int64_t head_offset, int64_t num_heads,
                       int64_t group_size, double softmax_scale, double softcap, double dropout_p,
                       int64_t dropout_seed, const MaybeTensor& out, const Tensor& lse,
                       const MaybeTensor& result) {
  const Masks masks{first, stop, bias, alibi_slopes, q_pos, k_pos};
  const Scalars scalars{head_offset, num_heads, group_size,  softmax_scale,
                        softcap,     dropout_p, dropout_seed};
  const bool is_double = dtype_of("q", q) == DType::kFloat64;
  (is_double ? forward<double> : forward<float>)(q, k, v, masks, scalars, out, lse, result);
}

void attention_backward(const Tensor& dout, const Tensor& q, const Tensor& k, const Tensor& v,
                        const Tensor& delta, const Tensor& lse, const MaybeTensor& first,
                        const MaybeTensor& stop, const MaybeTensor& bias,
                        const MaybeTensor& alibi_slopes, const MaybeTensor& q_pos,
                        const MaybeTensor& k_pos, int64_t head_offset, int64_t num_heads,
                        int64_t group_size, double softmax_scale, double softcap, double dropout_p,
                        int64_t dropout_seed, const Tensor& dq, const Tensor& dk, const Tensor& dv,
                        const MaybeTensor& dbias, bool overwrite) {
  const Masks masks{first, stop, bias, alibi_slopes, q_pos, k_pos};
  const Scalars scalars{head_offset, num_heads, group_size,  softmax_scale,
                        softcap,     dropout_p, dropout_seed};
  const GradientTensors gradients{dout, delta, lse, dq, dk, dv, dbias, overwrite};
  const bool is_double = dtype_of("q", q) == DType::kFloat64;
  (is_double ? backward<double> : backward<float>)(q, k, v, masks, scalars, gradients);
}

void attention_delta(const Tensor& dout, const Tensor& out, const Tensor& delta) {
  const cpu::ParallelFor threads = cpu::torch_threads();
  if (dtype_of("dout", dout) == DType::kFloat64) {
    return cpu::attention_delta(read_delta<double>(dout, out, delta), threads);
  }
  cpu::attention_delta(read_delta<float>(dout, out, delta), threads);
}

void state_merge(const Tensor& out, const Tensor& lse, const Tensor& more_out,
                 const Tensor& more_lse) {
  const cpu::ParallelFor threads = cpu::torch_threads();
  if (dtype_of("out", out) == DType::kFloat64) {
    return cpu::state_merge(read_merge<double>(out, lse, more_out, more_lse), threads);
  }
  cpu::state_merge(read_merge<float>(out, lse, more_out, more_lse), threads);
}

template <Direction kDirection>
void head_exchange(const std::vector<Tensor>& tensors, const Tensor& message) {
  const auto pieces = read_pieces(tensors, message);
  cpu::head_exchange(kDirection, pieces, static_cast<char*>(message.data_ptr()),
                     cpu::torch_threads());
}

void unpack(const Tensor& message, const std::vector<Tensor>& tensors) {
  head_exchange<Direction::kUnpack>(tensors, message);
}

}  // namespace
}  // namespace usp

STABLE_TORCH_LIBRARY(usp, m) {
  m.def(
      "attention_forward(Tensor q, Tensor k, Tensor v, Tensor? first, Tensor? stop, Tensor? bias, "
      "Tensor? alibi_slopes, Tensor? q_pos, Tensor? k_pos, int head_offset, int num_heads, "
      "int group_size, float softmax_scale, float softcap, float dropout_p, int dropout_seed, "
      "Tensor(a!)? out, Tensor(b!) lse, Tensor(c!)? result=None) -> ()");
  m.def(
      "attention_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor delta, Tensor lse, "
      "Tensor? first, Tensor? stop, Tensor? bias, Tensor? alibi_slopes, Tensor? q_pos, "
      "Tensor? k_pos, int head_offset, int num_heads, int group_size, float softmax_scale, "
      "float softcap, float dropout_p, int dropout_seed, Tensor(a!) dq, Tensor(b!) dk, "
      "Tensor(c!) dv, Tensor(d!)? dbias, bool overwrite=False) -> ()");
  m.def("attention_delta(Tensor dout, Tensor out, Tensor(a!) delta) -> ()");
  m.def("state_merge(Tensor(a!) out, Tensor(b!) lse, Tensor more_out, Tensor more_lse) -> ()");
  m.def("pack(Tensor[] tensors, Tensor(a!) message) -> ()");
  m.def("unpack(Tensor message, Tensor(a!)[] tensors) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(usp, CPU, m) {
  m.impl("attention_forward", TORCH_BOX(&usp::attention_forward));
  m.impl("attention_backward", TORCH_BOX(&usp::attention_backward));
  m.impl("attention_delta", TORCH_BOX(&usp::attention_delta));
  m.impl("state_merge", TORCH_BOX(&usp::state_merge));
  m.impl("pack", TORCH_BOX(&usp::head_exchange<usp::Direction::kPack>));
  m.impl("unpack", TORCH_BOX(&usp::unpack));
}
