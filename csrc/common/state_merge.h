#pragma once

// Joining the softmax over two disjoint sets of keys: what every device's kernel takes, and the
// arithmetic of one row. Free of torch.
//
// B batch, L rows of queries, H heads, Dv head dim of v.
//
// Source: Milakov & Gimelshein 2018, arXiv:1805.02867.

#include "common/attention.h"
#include "common/softmax.h"

namespace usp {

// (B, H, L); strides in elements.
template <typename Pointer>
struct LseView {
  Pointer data;
  int64_t batch_stride;
  int64_t head_stride;
  int64_t row_stride;

  USP_HOST_DEVICE Pointer at(int64_t b, int64_t l, int64_t h) const {
    return data + b * batch_stride + h * head_stride + l * row_stride;
  }
};

// Joins more_out, more_lse into out, lse, in place. out and more_out are (B, L, H, Dv); out holds
// T, more_out a dtype of its own.
template <typename T>
struct StateMerge {
  int64_t B, L, H, Dv;
  T* out;
  TensorView more_out;
  int64_t out_batch_stride, out_row_stride, out_head_stride;
  LseView<T*> lse;
  LseView<const T*> more_lse;

  USP_HOST_DEVICE T* out_row(int64_t b, int64_t l, int64_t h) const {
    return out + b * out_batch_stride + l * out_row_stride + h * out_head_stride;
  }
};

template <typename T>
struct MergedRow {
  T lse;
  T share;  // what the out of each part counts for; both 0 where neither has seen a key
  T more_share;
};

// `exp` and `log` are the device's own.
template <typename T, typename Exp, typename Log>
USP_HOST_DEVICE MergedRow<T> merge_row(T lse, T more_lse, Exp exp, Log log) {
  const T top = finite_max(lse > more_lse ? lse : more_lse);
  const T weight = exp(lse - top), more_weight = exp(more_lse - top);
  const T sum = weight + more_weight;
  const bool seen = sum > T(0);
  const T divisor = seen ? sum : T(1);
  return {seen ? top + log(sum) : minus_infinity<T>(), weight / divisor, more_weight / divisor};
}

}  // namespace usp
