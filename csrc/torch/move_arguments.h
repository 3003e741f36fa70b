#pragma once

// The ops that move and join what others computed: from torch's tensors to raw pointers, checked.

#include "common/pack.h"
#include "common/state_merge.h"
#include "torch/arguments.h"

namespace usp {

template <typename Pointer>
LseView<Pointer> lse_view(Pointer data, const Tensor& x) {
  return {data, x.stride(0), x.stride(1), x.stride(2)};
}

template <typename T>
StateMerge<T> read_merge(const Tensor& out, const Tensor& lse, const Tensor& more_out,
                         const Tensor& more_lse) {
  ArgumentReader args(out);
  StateMerge<T> merge{};
  const TensorView held = args.view("out", out, kScalarType<T>, {"B", "L", "H", "Dv"});
  merge.out = static_cast<T*>(out.data_ptr());
  merge.out_batch_stride = held.batch_stride;
  merge.out_row_stride = held.row_stride;
  merge.out_head_stride = held.head_stride;
  merge.more_out = args.view("more_out", more_out, more_out.scalar_type(), {"B", "L", "H", "Dv"});
  const bool is_half =
      merge.more_out.dtype == DType::kBFloat16 || merge.more_out.dtype == DType::kFloat16;
  const bool fits =
      merge.more_out.dtype == held.dtype || (is_half && held.dtype == DType::kFloat32);
  check(fits, "more_out is ", torch::headeronly::toString(more_out.scalar_type()), ", but out is ",
        torch::headeronly::toString(out.scalar_type()));
  for (const auto& [name, x] : {std::pair{"lse", &lse}, std::pair{"more_lse", &more_lse}}) {
    args.shape(name, *x, {"B", "H", "L"});
    args.dtype(name, *x, kScalarType<T>);
  }
  merge.lse = lse_view(static_cast<T*>(lse.data_ptr()), lse);
  merge.more_lse = lse_view(static_cast<const T*>(more_lse.const_data_ptr()), more_lse);
  merge.B = args["B"];
  merge.L = args["L"];
  merge.H = args["H"];
  merge.Dv = args["Dv"];
  return merge;
}

inline std::vector<Piece> read_pieces(const std::vector<Tensor>& tensors, const Tensor& message) {
  check(message.scalar_type() == ScalarType::Byte && message.dim() == 1 && message.is_contiguous(),
        "message is not a flat contiguous uint8 tensor");
  std::vector<StridedTensor> described;
  int64_t bytes = 0;
  for (const Tensor& x : tensors) {
    check(x.device() == message.device(), "a tensor is on another device than its message");
    described.push_back({static_cast<char*>(x.data_ptr()), static_cast<int64_t>(x.element_size()),
                         x.dim(), x.sizes().data(), x.strides().data()});
    bytes += described.back().bytes();
  }
  check(message.numel() == bytes, "the message has ", message.numel(), " bytes, its tensors ",
        bytes);
  return pieces_of(described);
}

}  // namespace usp
