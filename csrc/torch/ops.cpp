// The torch ops: schemas, and their CPU side. Built against torch's stable
// ABI, so that one library serves torch 2.10 and everything newer.

#include <torch/csrc/stable/library.h>

#include "cpu/attention.h"
#include "cpu/fastest.h"
#include "cpu/pack.h"
#include "cpu/state_merge.h"
#include "torch/attention_ops.h"
#include "torch/linear_ops.h"
#include "torch/move_arguments.h"
#include "torch/once_ops.h"
#include "torch/torch_threads.h"

namespace usp {
namespace {

template <typename T>
void forward_of(const ForwardCall& call) {
  ArgumentReader args(call.q);
  const auto inputs = read_inputs<T>(args, call.q, call.k, call.v, call.optional, call.scalars);
  cpu::attention_forward<T>(inputs, read_state<T>(args, call.q, call.out, call.lse, call.result),
                            torch_threads());
}

template <typename T>
void backward_of(const BackwardCall& call) {
  ArgumentReader args(call.q);
  const auto inputs = read_inputs<T>(args, call.q, call.k, call.v, call.optional, call.scalars);
  const auto gradients = read_gradients<T>(args, call.q, call.optional.bias, call.gradients);
  cpu::attention_backward<T>(inputs, gradients, torch_threads());
}

void forward(const ForwardCall& call) {
  const bool is_double = dtype_of("q", call.q) == DType::kFloat64;
  (is_double ? forward_of<double> : forward_of<float>)(call);
}

void backward(const BackwardCall& call) {
  const bool is_double = dtype_of("q", call.q) == DType::kFloat64;
  (is_double ? backward_of<double> : backward_of<float>)(call);
}

void attention_delta(const Tensor& dout, const Tensor& out, const Tensor& delta) {
  const cpu::ParallelFor threads = torch_threads();
  if (dtype_of("dout", dout) == DType::kFloat64) {
    return cpu::attention_delta(read_delta<double>(dout, out, delta), threads);
  }
  cpu::attention_delta(read_delta<float>(dout, out, delta), threads);
}

void state_merge(const Tensor& out, const Tensor& lse, const Tensor& more_out,
                 const Tensor& more_lse) {
  const cpu::ParallelFor threads = torch_threads();
  if (dtype_of("out", out) == DType::kFloat64) {
    return cpu::state_merge(read_merge<double>(out, lse, more_out, more_lse), threads);
  }
  cpu::state_merge(read_merge<float>(out, lse, more_out, more_lse), threads);
}

void copy_pieces(Direction direction, const std::vector<Tensor>& tensors, const Tensor& message) {
  const auto pieces = read_pieces(tensors, message);
  cpu::copy_pieces(direction, pieces, static_cast<char*>(message.data_ptr()), torch_threads());
}

void pack(const std::vector<Tensor>& tensors, const Tensor& message) {
  copy_pieces(Direction::kPack, tensors, message);
}

void unpack(const Tensor& message, const std::vector<Tensor>& tensors) {
  copy_pieces(Direction::kUnpack, tensors, message);
}

// The level of the CPU kernels for inputs of that dtype, as its place among all there are.
int64_t cpu_level(const Tensor& like) {
  return static_cast<int64_t>(cpu::capability_for(dtype_of("like", like)));
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
  m.def(
      "attention_once(Tensor q, Tensor k, Tensor v, Tensor? first, Tensor? stop, int head_offset, "
      "int group_size, float softmax_scale, float softcap) -> (Tensor out, Tensor lse)");
  m.def(
      "attention_once_backward(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, "
      "Tensor out, Tensor lse, Tensor? first, Tensor? stop, int head_offset, int group_size, "
      "float softmax_scale, float softcap) -> (Tensor dq, Tensor dk, Tensor dv)");
  m.def("state_merge(Tensor(a!) out, Tensor(b!) lse, Tensor more_out, Tensor more_lse) -> ()");
  m.def("pack(Tensor[] tensors, Tensor(a!) message) -> ()");
  m.def("unpack(Tensor message, Tensor(a!)[] tensors) -> ()");
  m.def(
      "linear_forward(Tensor? q, Tensor? k, Tensor? v, Tensor? g, int segment, Tensor(a!) states, "
      "Tensor(b!)? kept, Tensor(c!)? out) -> ()");
  m.def(
      "linear_backward(Tensor dout, Tensor? q, Tensor? k, Tensor? v, Tensor? g, int segment, "
      "Tensor? kept, Tensor(a!) states, Tensor(b!)? dq, Tensor(c!)? dk, Tensor(d!)? dv, "
      "Tensor(e!)? dg) -> ()");
  m.def("cpu_level(Tensor like) -> int");
}

STABLE_TORCH_LIBRARY_IMPL(usp, CPU, m) {
  m.impl("attention_forward", TORCH_BOX(&usp::attention_forward<usp::forward>));
  m.impl("attention_backward", TORCH_BOX(&usp::attention_backward<usp::backward>));
  m.impl("attention_delta", TORCH_BOX(&usp::attention_delta));
  m.impl("attention_once", TORCH_BOX(&usp::attention_once<usp::forward>));
  m.impl("attention_once_backward",
         TORCH_BOX((&usp::attention_once_backward<usp::attention_delta, usp::backward>)));
  m.impl("state_merge", TORCH_BOX(&usp::state_merge));
  m.impl("pack", TORCH_BOX(&usp::pack));
  m.impl("unpack", TORCH_BOX(&usp::unpack));
  m.impl("linear_forward", TORCH_BOX(&usp::linear_forward));
  m.impl("linear_backward", TORCH_BOX(&usp::linear_backward));
  m.impl("cpu_level", TORCH_BOX(&usp::cpu_level));
}
