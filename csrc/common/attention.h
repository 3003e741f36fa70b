#pragma once

// The inputs of one block of attention as raw pointers, sizes and strides: what every device's
// kernels take. Free of torch.
//
// B batch, Lq / Lk rows of queries / keys in this block, H query heads and G key/value heads held
// here, D head dim of q and k, Dv head dim of v. T is the dtype of the arithmetic.

#include <cstdint>

#include "common/macros.h"
#include "common/span.h"

namespace usp {

enum class DType { kFloat32, kFloat64, kBFloat16, kFloat16 };

// (batch, row, head, head_dim), contiguous in the last dim; strides in elements.
struct TensorView {
  const void* data = nullptr;
  DType dtype = DType::kFloat32;
  int64_t batch_stride = 0;
  int64_t row_stride = 0;
  int64_t head_stride = 0;

  template <typename Number>
  USP_HOST_DEVICE const Number* row(int64_t b, int64_t l, int64_t h) const {
    return static_cast<const Number*>(data) + b * batch_stride + l * row_stride + h * head_stride;
  }
};

// (B|1, H|1, Lq|1, Lk) with stride 0 where broadcast. `Pointer` is const T* or T*.
template <typename Pointer>
struct BiasView {
  Pointer data = nullptr;
  int64_t batch_stride = 0;
  int64_t head_stride = 0;
  int64_t query_stride = 0;
  int64_t key_stride = 0;

  USP_HOST_DEVICE Pointer at(int64_t b, int64_t h, int64_t i, int64_t j) const {
    return data + b * batch_stride + h * head_stride + i * query_stride + j * key_stride;
  }
};

template <typename T>
struct Attention {
  int64_t B = 0, Lq = 0, Lk = 0, H = 0, G = 0, D = 0, Dv = 0;
  TensorView q, k, v;
  Span span;
  int64_t num_bands = 1;            // disjoint spans over the same keys, one behind the other
  BiasView<const T*> bias;          // data null: none
  const T* alibi_slopes = nullptr;  // (B|1, H), null: none
  int64_t alibi_batch_stride = 0;
  int64_t alibi_head_stride = 0;
  const int32_t* q_pos = nullptr;  // (Lq,) global positions, given with ALiBi or dropout
  const int32_t* k_pos = nullptr;  // (Lk,)
  int64_t head_offset = 0;         // global index of query head 0
  int64_t num_heads = 0;           // query heads of the whole model
  int64_t group_size = 1;          // query heads that share one key head
  double softmax_scale = 1.0;
  double softcap = 0.0;    // 0: off
  double dropout_p = 0.0;  // 0: off
  uint64_t dropout_seed = 0;

  USP_HOST_DEVICE int64_t key_head(int64_t h) const {
    return (h + head_offset) / group_size - head_offset / group_size;
  }

  // A span for each band. Kernels that know one band take num_bands 1 alone.
  USP_HOST_DEVICE Span band(int64_t i) const {
    if (span.sees_all()) return span;
    const int64_t skipped = i * span.num_queries;
    return {span.first + skipped, span.stop + skipped, span.num_queries, span.num_keys};
  }

  // The query heads held here that read key head g.
  USP_HOST_DEVICE Range query_heads(int64_t g) const {
    const int64_t begin = (head_offset / group_size + g) * group_size - head_offset;
    return intersect({begin, begin + group_size}, {0, H});
  }
};

// The running softmax, updated in place: out (B, Lq, H, Dv) and lse (B, H, Lq), contiguous. Where
// out is null, no row has seen anything before. Where result is given, in the shape of out, it gets
// the new out, rounded to its dtype, and out stays as it was: for the last block.
template <typename T>
struct AttentionState {
  T* out;
  T* lse;
  void* result = nullptr;
  DType result_dtype = DType::kFloat32;
};

// Gradients of the only block, contiguous in the shapes of q, k, v, written over what is there and
// rounded to their dtypes.
struct GradientResults {
  void *dq = nullptr, *dk = nullptr, *dv = nullptr;  // all or none
  DType dq_dtype = DType::kFloat32;
  DType kv_dtype = DType::kFloat32;
};

// delta (B, H, Lq), contiguous, becomes <dout, out> over Dv: once for all blocks of a backward
// pass.
template <typename T>
struct AttentionDelta {
  int64_t B, Lq, H, Dv;
  TensorView dout, out;
  T* delta;
};

// What the backward pass takes beyond the inputs, and what it adds to. dq, dk, dv are contiguous
// in the shapes of q, k, v, null where there are results; dbias has the shape of bias (data null:
// not wanted).
template <typename T>
struct AttentionGradients {
  TensorView dout;
  const T* delta;  // (B, H, Lq)
  const T* lse;    // (B, H, Lq), final
  T* dq;
  T* dk;
  T* dv;
  BiasView<T*> dbias;
  GradientResults results;
};

}  // namespace usp
