#pragma once

// From torch's tensors to raw pointers and sizes, checked: what the bindings of every device share.
// Built against torch's stable ABI.

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>

#include "common/attention.h"
#include "common/check.h"

namespace usp {
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

template <typename T>
constexpr ScalarType kScalarType = sizeof(T) == 8 ? ScalarType::Double : ScalarType::Float;

inline DType dtype_of(const char* name, const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return DType::kFloat32;
    case ScalarType::Double:
      return DType::kFloat64;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    case ScalarType::Half:
      return DType::kFloat16;
    default:
      check(false, name, " is ", torch::headeronly::toString(x.scalar_type()),
            "; expected float32, bfloat16, float16 or float64");
  }
  return DType::kFloat32;
}

// Every option that comes as a plain number, in the schema's order.
struct Scalars {
  int64_t head_offset, num_heads, group_size;
  double softmax_scale, softcap, dropout_p;
  int64_t dropout_seed;
};

// The optional tensors, in the schema's order.
struct OptionalTensors {
  const MaybeTensor &first, &stop, &bias, &alibi_slopes, &q_pos, &k_pos;
};

class ArgumentReader {
 public:
  explicit ArgumentReader(const Tensor& like) : device_(like.device()) {}

  void shape(const char* name, const Tensor& x, DimNames dims) {
    shapes_.check_shape(name, x.sizes().data(), x.dim(), dims);
    check(x.device() == device_, name, " is on another device than the other tensors");
  }

  void dtype(const char* name, const Tensor& x, ScalarType expected) const {
    check(x.scalar_type() == expected, name, " is ", torch::headeronly::toString(x.scalar_type()),
          ", expected ", torch::headeronly::toString(expected));
  }

  TensorView view(const char* name, const Tensor& x, ScalarType expected, DimNames dims) {
    shape(name, x, dims);
    dtype(name, x, expected);
    check(x.size(3) <= 1 || x.stride(3) == 1, name, " has stride ", x.stride(3),
          " in its last dim, expected 1: call .contiguous()");
    return {x.const_data_ptr(), dtype_of(name, x), x.stride(0), x.stride(1), x.stride(2)};
  }

  // Of any dtype.
  void* dense(const char* name, const Tensor& x, DimNames dims) {
    shape(name, x, dims);
    check(x.is_contiguous(), name, " is not contiguous");
    return x.data_ptr();
  }

  template <typename T>
  T* contiguous(const char* name, const Tensor& x, DimNames dims) {
    dtype(name, x, kScalarType<T>);
    return static_cast<T*>(dense(name, x, dims));
  }

  const int32_t* indices(const char* name, const Tensor& x, DimNames dims) {
    shape(name, x, dims);
    dtype(name, x, ScalarType::Int);
    check(x.is_contiguous(), name, " is not contiguous");
    return static_cast<const int32_t*>(x.const_data_ptr());
  }

  int64_t operator[](const char* dim) const { return shapes_[dim]; }

 private:
  const torch::stable::Device device_;
  ShapeChecker shapes_;
};

inline int64_t broadcast_stride(const Tensor& x, int64_t dim) {
  return x.size(dim) == 1 ? 0 : x.stride(dim);
}

template <typename Pointer>
BiasView<Pointer> bias_view(Pointer data, const Tensor& x) {
  return {data, broadcast_stride(x, 0), broadcast_stride(x, 1), broadcast_stride(x, 2),
          x.stride(3)};
}

inline void check_ends(const Span& span) {
  check(span.first[0] >= 0, "first[0] is ", span.first[0], ", expected at least 0");
  const int32_t last = span.stop[span.num_queries - 1];
  check(last <= span.num_keys, "stop[-1] is ", last, ", but k has Lk = ", span.num_keys);
}

// first and stop: (Lq,), and on a CPU (bands, Lq) too.
template <typename T>
void read_bands(ArgumentReader& args, const OptionalTensors& optional, Attention<T>& a) {
  check(optional.first.has_value() == optional.stop.has_value(),
        "first and stop come together: first is ", optional.first ? "given" : "None", ", stop is ",
        optional.stop ? "given" : "None");
  a.span = {nullptr, nullptr, a.Lq, a.Lk};
  if (!optional.first || a.Lq == 0) return;
  const bool on_cpu = optional.first->is_cpu();  // else the host cannot look into it
  const bool many = on_cpu && optional.first->dim() == 2;
  const auto ends = [&](const char* name, const Tensor& x) {
    return many ? args.indices(name, x, {"bands", "Lq"}) : args.indices(name, x, {"Lq"});
  };
  a.span.first = ends("first", *optional.first);
  a.span.stop = ends("stop", *optional.stop);
  if (many) a.num_bands = args["bands"];
  if (!on_cpu) return;
  for (int64_t band = 0; band < a.num_bands; ++band) check_ends(a.band(band));
}

template <typename T>
void read_optional(ArgumentReader& args, const OptionalTensors& optional, double dropout_p,
                   Attention<T>& a) {
  read_bands(args, optional, a);
  if (optional.bias) {
    args.shape("bias", *optional.bias, {"B|1", "H|1", "Lq|1", "Lk"});
    args.dtype("bias", *optional.bias, kScalarType<T>);
    a.bias = bias_view(static_cast<const T*>(optional.bias->const_data_ptr()), *optional.bias);
  }
  if (optional.alibi_slopes) {
    const Tensor& slopes = *optional.alibi_slopes;
    args.shape("alibi_slopes", slopes, {"B|1", "H"});
    args.dtype("alibi_slopes", slopes, kScalarType<T>);
    a.alibi_slopes = static_cast<const T*>(slopes.const_data_ptr());
    a.alibi_batch_stride = broadcast_stride(slopes, 0);
    a.alibi_head_stride = slopes.stride(1);
  }
  if (!optional.alibi_slopes && dropout_p == 0) return;
  check(optional.q_pos && optional.k_pos,
        "q_pos and k_pos are needed with alibi_slopes or dropout");
  a.q_pos = args.indices("q_pos", *optional.q_pos, {"Lq"});
  a.k_pos = args.indices("k_pos", *optional.k_pos, {"Lk"});
}

template <typename T>
void read_scalars(const Scalars& s, Attention<T>& a) {
  check(s.group_size >= 1, "group_size is ", s.group_size, ", expected at least 1");
  // Beyond num_heads lie the heads of samples further on: see docs/contract.md on dropout.
  check(s.head_offset >= 0, "head_offset is ", s.head_offset, ", expected at least 0");
  check(a.H <= s.num_heads, "H ", a.H, " exceeds num_heads ", s.num_heads);
  check(s.softcap >= 0, "softcap is ", s.softcap, ", expected at least 0 (0 is off)");
  check(s.dropout_p >= 0 && s.dropout_p < 1, "dropout_p is ", s.dropout_p, ", expected [0, 1)");
  a.head_offset = s.head_offset;
  a.num_heads = s.num_heads;
  a.group_size = s.group_size;
  a.softmax_scale = s.softmax_scale;
  a.softcap = s.softcap;
  a.dropout_p = s.dropout_p;
  a.dropout_seed = static_cast<uint64_t>(s.dropout_seed);
  const int64_t touched = a.H == 0 ? a.G : a.key_head(a.H - 1) + 1;
  check(touched == a.G, "query heads ", s.head_offset, " to ", s.head_offset + a.H,
        " in groups of ", s.group_size, " touch ", touched, " key heads, but k has G = ", a.G);
}

template <typename T>
Attention<T> read_inputs(ArgumentReader& args, const Tensor& q, const Tensor& k, const Tensor& v,
                         const OptionalTensors& optional, const Scalars& scalars) {
  Attention<T> a;
  const ScalarType dtype = q.scalar_type();
  a.q = args.view("q", q, dtype, {"B", "Lq", "H", "D"});
  a.k = args.view("k", k, dtype, {"B", "Lk", "G", "D"});
  a.v = args.view("v", v, dtype, {"B", "Lk", "G", "Dv"});
  a.B = args["B"];
  a.Lq = args["Lq"];
  a.Lk = args["Lk"];
  a.H = args["H"];
  a.G = args["G"];
  a.D = args["D"];
  a.Dv = args["Dv"];
  read_scalars(scalars, a);
  read_optional(args, optional, scalars.dropout_p, a);
  return a;
}

struct GradientTensors {
  const Tensor &dout, &delta, &lse, &dq, &dk, &dv;
  const MaybeTensor& dbias;
  bool overwrite;
};

template <typename T>
AttentionState<T> read_state(ArgumentReader& args, const Tensor& q, const MaybeTensor& out,
                             const Tensor& lse, const MaybeTensor& result) {
  AttentionState<T> state{nullptr, args.contiguous<T>("lse", lse, {"B", "H", "Lq"})};
  check(out || result, "out and result are both None: the block's output has no place to go");
  if (out) state.out = args.contiguous<T>("out", *out, {"B", "Lq", "H", "Dv"});
  if (result) {
    args.dtype("result", *result, q.scalar_type());
    state.result = args.dense("result", *result, {"B", "Lq", "H", "Dv"});
    state.result_dtype = dtype_of("result", *result);
  }
  return state;
}

// Sums to add to, in T, or results to write over, in T or the dtype of q.
template <typename T>
void read_targets(ArgumentReader& args, const Tensor& q, const GradientTensors& g,
                  AttentionGradients<T>& gradients) {
  const auto target = [&](const char* name, const Tensor& x, DimNames dims) {
    if (g.overwrite && x.scalar_type() == q.scalar_type()) return args.dense(name, x, dims);
    return static_cast<void*>(args.contiguous<T>(name, x, dims));
  };
  void* dq = target("dq", g.dq, {"B", "Lq", "H", "D"});
  void* dk = target("dk", g.dk, {"B", "Lk", "G", "D"});
  void* dv = target("dv", g.dv, {"B", "Lk", "G", "Dv"});
  if (g.overwrite) {
    args.dtype("dv", g.dv, g.dk.scalar_type());
    gradients.results = {dq, dk, dv, dtype_of("dq", g.dq), dtype_of("dk", g.dk)};
  } else {
    gradients.dq = static_cast<T*>(dq);
    gradients.dk = static_cast<T*>(dk);
    gradients.dv = static_cast<T*>(dv);
  }
}

template <typename T>
AttentionDelta<T> read_delta(const Tensor& dout, const Tensor& out, const Tensor& delta) {
  ArgumentReader args(dout);
  AttentionDelta<T> a{};
  a.dout = args.view("dout", dout, dout.scalar_type(), {"B", "Lq", "H", "Dv"});
  a.out = args.view("out", out, dout.scalar_type(), {"B", "Lq", "H", "Dv"});
  a.delta = args.contiguous<T>("delta", delta, {"B", "H", "Lq"});
  a.B = args["B"];
  a.Lq = args["Lq"];
  a.H = args["H"];
  a.Dv = args["Dv"];
  return a;
}

template <typename T>
AttentionGradients<T> read_gradients(ArgumentReader& args, const Tensor& q, const MaybeTensor& bias,
                                     const GradientTensors& g) {
  AttentionGradients<T> gradients{
      .dout = args.view("dout", g.dout, q.scalar_type(), {"B", "Lq", "H", "Dv"}),
      .delta = args.contiguous<T>("delta", g.delta, {"B", "H", "Lq"}),
      .lse = args.contiguous<T>("lse", g.lse, {"B", "H", "Lq"}),
      .dq = nullptr,
      .dk = nullptr,
      .dv = nullptr,
      .dbias = {},
      .results = {},
  };
  read_targets(args, q, g, gradients);
  if (!g.dbias) return gradients;
  check(bias.has_value(), "dbias is given but bias is None");
  T* data = args.contiguous<T>("dbias", *g.dbias, {"B|1", "H|1", "Lq|1", "Lk"});
  for (int64_t d = 0; d < 4; ++d) {
    check(g.dbias->size(d) == bias->size(d), "dbias: dim ", d, " is ", g.dbias->size(d),
          ", but bias has ", bias->size(d));
  }
  gradients.dbias = bias_view(data, *g.dbias);
  return gradients;
}

}  // namespace usp
