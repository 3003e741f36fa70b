#pragma once

// The tensors of linear attention, checked.

#include "cpu/linear.h"
#include "torch/arguments.h"

namespace usp {

inline cpu::HeadsView heads_view(ArgumentReader& args, const char* name, const Tensor& x,
                                 ScalarType dtype, DimNames dims, int64_t of) {
  cpu::HeadsView found{args.view(name, x, dtype, dims), x.size(2)};
  check(found.heads > 0 && of % found.heads == 0, name, " has ", found.heads,
        " heads, no divisor of ", of);
  return found;
}

template <typename T>
cpu::LogDecays<T> read_decays(ArgumentReader& args, const MaybeTensor& g) {
  if (!g) return {};
  const bool has_channels = g->dim() == 4;
  if (has_channels) {
    args.shape("g", *g, {"B|1", "L", "H|1", "D"});
    check(g->size(3) == 1 || g->stride(3) == 1, "g has stride ", g->stride(3),
          " in its last dim, expected 1: call .contiguous()");
  } else {
    args.shape("g", *g, {"B|1", "L", "H|1"});
  }
  args.dtype("g", *g, kScalarType<T>);
  return {static_cast<const T*>(g->const_data_ptr()), broadcast_stride(*g, 0), g->stride(1),
          broadcast_stride(*g, 2), has_channels};
}

struct LinearTensors {
  const MaybeTensor &q, &k, &v, &g;
  int64_t segment;
  const Tensor& states;
};

// Inputs and states, which say H, D and Dv.
template <typename T>
cpu::LinearAttention<T> read_linear(ArgumentReader& args, ScalarType dtype,
                                    const LinearTensors& given) {
  cpu::LinearAttention<T> a;
  args.template contiguous<T>("states", given.states, {"parts", "B", "H", "D", "Dv"});
  a.parts = args["parts"];
  a.B = args["B"];
  a.H = args["H"];
  a.D = args["D"];
  a.Dv = args["Dv"];
  check(a.parts > 0, "states has 0 parts, expected at least 1");
  if (given.q) a.q = heads_view(args, "q", *given.q, dtype, {"B", "L", "Hq", "D"}, a.H);
  if (given.k) a.k = heads_view(args, "k", *given.k, dtype, {"B", "L", "Hk", "D"}, a.H);
  if (given.v) a.v = heads_view(args, "v", *given.v, dtype, {"B", "L", "Hv", "Dv"}, a.H);
  a.L = args["L"];
  a.g = read_decays<T>(args, given.g);
  a.segment = given.segment;
  check(a.segment > 0 && a.segment % cpu::kChunk == 0, "segment is ", a.segment,
        ", expected a multiple of ", cpu::kChunk);
  return a;
}

// The state before each segment; null where not given.
template <typename T>
T* read_kept(ArgumentReader& args, const cpu::LinearAttention<T>& a, const MaybeTensor& kept) {
  if (!kept) return nullptr;
  T* found = args.template contiguous<T>("kept", *kept, {"segments", "B", "H", "D", "Dv"});
  check(args["segments"] == a.segments(), "kept has ", args["segments"], " segments, expected ",
        a.segments());
  return found;
}

// (B, L, H, `dim`) in the dtype of states or of q.
template <typename T>
cpu::LinearResult read_result(ArgumentReader& args, const char* name, const MaybeTensor& x,
                              ScalarType dtype, const char* dim) {
  if (!x) return {};
  if (x->scalar_type() != dtype) args.dtype(name, *x, kScalarType<T>);
  return {args.dense(name, *x, {"B", "L", "H", dim}), dtype_of(name, *x)};
}

}  // namespace usp
