#pragma once

// The ops of linear attention on the CPU.

#include "torch/linear_arguments.h"
#include "torch/torch_threads.h"

namespace usp {

template <typename T>
void linear_forward_of(const LinearTensors& given, const MaybeTensor& kept,
                       const MaybeTensor& out) {
  check(given.k.has_value() && given.v.has_value(), "k and v are needed");
  check(given.q.has_value() == out.has_value(), "q and out come together");
  ArgumentReader args(given.states);
  const ScalarType dtype = given.k->scalar_type();
  const auto a = read_linear<T>(args, dtype, given);
  T* states = static_cast<T*>(given.states.data_ptr());
  cpu::linear_forward<T>(a, states, read_kept(args, a, kept),
                         read_result<T>(args, "out", out, dtype, "Dv"), torch_threads());
}

inline void linear_forward(const MaybeTensor& q, const MaybeTensor& k, const MaybeTensor& v,
                           const MaybeTensor& g, int64_t segment, const Tensor& states,
                           const MaybeTensor& kept, const MaybeTensor& out) {
  const LinearTensors given{q, k, v, g, segment, states};
  const bool is_double = dtype_of("states", states) == DType::kFloat64;
  (is_double ? linear_forward_of<double> : linear_forward_of<float>)(given, kept, out);
}

struct LinearGradientTensors {
  const Tensor& dout;
  const MaybeTensor &kept, &dq, &dk, &dv, &dg;
};

template <typename T>
void linear_backward_of(const LinearTensors& given, const LinearGradientTensors& tensors) {
  check(given.q.has_value(), "q is needed");
  const bool all = tensors.dq.has_value();
  for (const MaybeTensor* x : {&given.k, &given.v, &tensors.kept, &tensors.dk, &tensors.dv}) {
    check(x->has_value() == all, "k, v, kept, dq, dk and dv come together");
  }
  ArgumentReader args(given.states);
  const ScalarType dtype = given.q->scalar_type();
  const auto a = read_linear<T>(args, dtype, given);
  cpu::LinearGradients<T> gradients;
  gradients.dout = args.view("dout", tensors.dout, dtype, {"B", "L", "H", "Dv"});
  gradients.kept = read_kept(args, a, tensors.kept);
  gradients.states = static_cast<T*>(given.states.data_ptr());
  gradients.dq = read_result<T>(args, "dq", tensors.dq, dtype, "D");
  gradients.dk = read_result<T>(args, "dk", tensors.dk, dtype, "D");
  gradients.dv = read_result<T>(args, "dv", tensors.dv, dtype, "Dv");
  if (tensors.dg) {
    check(all && given.g.has_value(), "dg is given, but g or dq is None");
    gradients.dg = a.g.has_channels
                       ? args.template contiguous<T>("dg", *tensors.dg, {"B", "L", "H", "D"})
                       : args.template contiguous<T>("dg", *tensors.dg, {"B", "L", "H"});
  }
  cpu::linear_backward<T>(a, gradients, torch_threads());
}

inline void linear_backward(const Tensor& dout, const MaybeTensor& q, const MaybeTensor& k,
                            const MaybeTensor& v, const MaybeTensor& g, int64_t segment,
                            const MaybeTensor& kept, const Tensor& states, const MaybeTensor& dq,
                            const MaybeTensor& dk, const MaybeTensor& dv, const MaybeTensor& dg) {
  const LinearTensors given{q, k, v, g, segment, states};
  const LinearGradientTensors gradients{dout, kept, dq, dk, dv, dg};
  const bool is_double = dtype_of("states", states) == DType::kFloat64;
  (is_double ? linear_backward_of<double> : linear_backward_of<float>)(given, gradients);
}

}  // namespace usp
