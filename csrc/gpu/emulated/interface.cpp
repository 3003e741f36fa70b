// The emulated GPU's kernels and layouts by a C interface, for tests.

#include <cstring>

#include "gpu/attention.h"
#include "gpu/blocks.h"
#include "gpu/emulated/simt.h"
#include "gpu/gpu.h"
#include "gpu/layouts.h"

namespace usp::gpu {
namespace {

// Element strides; the last dim is contiguous.
struct Tensor {
  const void* data;
  int64_t batch_stride, row_stride, head_stride;
};

struct Bias {
  float* data;
  int64_t strides[4];
};

struct Inputs {
  int64_t B, Lq, Lk, H, G, D, Dv, is_bfloat16;
  Tensor q, k, v;
  const int32_t *first, *stop;
  Bias bias;
  const float* alibi_slopes;
  int64_t alibi_strides[2];
  const int32_t *q_pos, *k_pos;
  int64_t head_offset, num_heads, group_size;
  double softmax_scale, softcap, dropout_p;
  int64_t dropout_seed;
};

struct Gradients {
  Tensor dout;
  const float *delta, *lse;
  void *dq, *dk, *dv;
  Bias dbias;
  int64_t overwrite, dq_is_float, kv_is_float;  // else of q's dtype
};

TensorView view(const Tensor& x, const Inputs& in) {
  const DType dtype = in.is_bfloat16 ? DType::kBFloat16 : DType::kFloat16;
  return {x.data, dtype, x.batch_stride, x.row_stride, x.head_stride};
}

template <typename Pointer>
BiasView<Pointer> view(const Bias& x) {
  return {x.data, x.strides[0], x.strides[1], x.strides[2], x.strides[3]};
}

Attention<float> attention(const Inputs& in) {
  Attention<float> a;
  a.B = in.B, a.Lq = in.Lq, a.Lk = in.Lk, a.H = in.H, a.G = in.G, a.D = in.D, a.Dv = in.Dv;
  a.q = view(in.q, in), a.k = view(in.k, in), a.v = view(in.v, in);
  a.span = {in.first, in.stop, in.Lq, in.Lk};
  a.bias = view<const float*>(in.bias);
  a.alibi_slopes = in.alibi_slopes;
  a.alibi_batch_stride = in.alibi_strides[0];
  a.alibi_head_stride = in.alibi_strides[1];
  a.q_pos = in.q_pos, a.k_pos = in.k_pos;
  a.head_offset = in.head_offset, a.num_heads = in.num_heads, a.group_size = in.group_size;
  a.softmax_scale = in.softmax_scale, a.softcap = in.softcap, a.dropout_p = in.dropout_p;
  a.dropout_seed = static_cast<uint64_t>(in.dropout_seed);
  return a;
}

AttentionGradients<float> gradients(const Gradients& g, const Inputs& in) {
  AttentionGradients<float> made{};
  made.dout = view(g.dout, in);
  made.delta = g.delta, made.lse = g.lse;
  made.dbias = view<float*>(g.dbias);
  const auto dtype = [&](int64_t is_float) { return is_float ? DType::kFloat32 : made.dout.dtype; };
  if (g.overwrite) {
    made.results = {g.dq, g.dk, g.dv, dtype(g.dq_is_float), dtype(g.kv_is_float)};
  } else {
    made.dq = static_cast<float*>(g.dq);
    made.dk = static_cast<float*>(g.dk);
    made.dv = static_cast<float*>(g.dv);
  }
  return made;
}

struct NamedLayout {
  const char* name;
  Position (*at)(int lane, int element);
};

constexpr NamedLayout kLayouts[] = {
    {"m16n8k16.a", m16n8k16::a},         {"m16n8k16.b", m16n8k16::b},
    {"m16n8k16.c", m16n8k16::c},         {"mfma16x16x16.a", mfma16x16x16::a},
    {"mfma16x16x16.b", mfma16x16x16::b}, {"mfma16x16x16.c", mfma16x16x16::c},
    {"mfma32x32x8.a", mfma32x32x8::a},   {"mfma32x32x8.b", mfma32x32x8::b},
    {"mfma32x32x8.c", mfma32x32x8::c},
};

}  // namespace
}  // namespace usp::gpu

extern "C" {

int usp_gpu_wave_size() { return usp::gpu::kWaveSize; }

void usp_gpu_descending_waves(int descending) {
  using usp::gpu::emulated::WaveOrder;
  usp::gpu::emulated::set_wave_order(descending ? WaveOrder::kDescending : WaveOrder::kAscending);
}

void usp_gpu_block_limit(uint32_t most) { usp::gpu::emulated::set_block_limit(most); }

// Returns 0 for a name that is not known.
int usp_gpu_layout(const char* name, int lane, int element, int* row, int* column) {
  for (const auto& layout : usp::gpu::kLayouts) {
    if (std::strcmp(layout.name, name) != 0) continue;
    const usp::gpu::Position at = layout.at(lane, element);
    *row = at.row;
    *column = at.column;
    return 1;
  }
  return 0;
}

// Of a block of a launch, see blocks.h.
void usp_gpu_place(const usp::gpu::BlockOrder* order, uint32_t index, int* b, int* h, int* tile) {
  const usp::gpu::BlockPlace place = usp::gpu::place_of_block(*order, index);
  *b = place.b, *h = place.h, *tile = place.tile;
}

// `result` has the dtype of q.
void usp_gpu_attention_forward(const usp::gpu::Inputs* in, float* out, float* lse, void* result) {
  const auto inputs = attention(*in);
  usp::gpu::attention_forward(inputs, {out, lse, result, inputs.q.dtype}, {});
}

void usp_gpu_attention_backward(const usp::gpu::Inputs* in, const usp::gpu::Gradients* g) {
  usp::gpu::attention_backward(attention(*in), gradients(*g, *in), {});
}
}
