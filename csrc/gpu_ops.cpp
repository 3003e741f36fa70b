// The GPU side of the torch ops, for CUDA and HIP alike: torch calls both devices CUDA.

#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "gpu/attention.h"
#include "gpu/head_exchange.h"
#include "gpu/state_merge.h"
#include "move_arguments.h"

namespace usp {
namespace {

using StreamGetter = AOTITorchError (*)(int32_t device, void** stream);

// torch's GPU library is not linked, for then usp would not load beside a CPU torch. Whoever has a
// GPU tensor has it loaded.
StreamGetter stream_getter() {
  for (const char* library : {"libtorch_cuda.so", "libtorch_hip.so"}) {
    if (void* handle = dlopen(library, RTLD_LAZY | RTLD_NOLOAD)) {
      return reinterpret_cast<StreamGetter>(dlsym(handle, "aoti_torch_get_current_cuda_stream"));
    }
  }
  return nullptr;
}

gpu::Stream current_stream(const Tensor& x) {
  static const StreamGetter get = stream_getter();
  check(get != nullptr, "this torch has no GPU library to ask for the current stream");
  gpu::Stream stream;
  check(get(x.get_device_index(), &stream.handle) == AOTI_TORCH_SUCCESS,
        "torch gave no current stream for device ", x.get_device_index());
  return stream;
}

// Runs `start(stream)` on the device of `like`; it returns what went wrong, or null.
template <typename Start>
void on_device_of(const Tensor& like, const char* op, const Start& start) {
  const torch::stable::accelerator::DeviceGuard guard(like.get_device_index());
  const char* error = start(current_stream(like));
  check(error == nullptr, "usp::", op, ": ", error == nullptr ? "" : error);
}

// What their tiles take.
constexpr int64_t kMaxHeadDim = 256;

void check_takes(const Tensor& q, const Tensor& v) {
  const DType dtype = dtype_of("q", q);
  check(dtype == DType::kBFloat16 || dtype == DType::kFloat16, "q is ",
        torch::headeronly::toString(q.scalar_type()),
        "; the GPU kernels take bfloat16 and float16");
  for (const auto& [name, x] : {std::pair{"q", &q}, std::pair{"v", &v}}) {
    check(x->size(3) <= kMaxHeadDim, name, " has head_dim ", x->size(3),
          "; the GPU kernels take up to ", kMaxHeadDim);
  }
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
  Arguments args(q);
  const auto inputs = read_inputs<float>(args, q, k, v, masks, scalars);
  const auto state = read_state<float>(args, q, out, lse, result);
  check_takes(q, v);
  on_device_of(q, "attention_forward",
               [&](gpu::Stream stream) { return gpu::attention_forward(inputs, state, stream); });
}

// The kernels add to fp32 sums: what is to be overwritten gets them rounded.
void overwrite_with(const Tensor& sum, Tensor result) { torch::stable::copy_(result, sum); }

Tensor new_sum(const Tensor& like) {
  return torch::stable::new_zeros(like, like.sizes(), ScalarType::Float);
}

void attention_backward(const Tensor& dout, const Tensor& q, const Tensor& k, const Tensor& v,
                        const Tensor& delta, const Tensor& lse, const MaybeTensor& first,
                        const MaybeTensor& stop, const MaybeTensor& bias,
                        const MaybeTensor& alibi_slopes, const MaybeTensor& q_pos,
                        const MaybeTensor& k_pos, int64_t head_offset, int64_t num_heads,
                        int64_t group_size, double softmax_scale, double softcap, double dropout_p,
                        int64_t dropout_seed, const Tensor& dq, const Tensor& dk, const Tensor& dv,
                        const MaybeTensor& dbias, bool overwrite) {
  if (overwrite) {
    const Tensor sums[] = {new_sum(dq), new_sum(dk), new_sum(dv)};
    attention_backward(dout, q, k, v, delta, lse, first, stop, bias, alibi_slopes, q_pos, k_pos,
                       head_offset, num_heads, group_size, softmax_scale, softcap, dropout_p,
                       dropout_seed, sums[0], sums[1], sums[2], dbias, false);
    overwrite_with(sums[0], dq);
    overwrite_with(sums[1], dk);
    return overwrite_with(sums[2], dv);
  }
  const Masks masks{first, stop, bias, alibi_slopes, q_pos, k_pos};
  const Scalars scalars{head_offset, num_heads, group_size,  softmax_scale,
                        softcap,     dropout_p, dropout_seed};
  Arguments args(q);
  const auto inputs = read_inputs<float>(args, q, k, v, masks, scalars);
  const auto gradients =
      read_gradients<float>(args, q, bias, {dout, delta, lse, dq, dk, dv, dbias, false});
  check_takes(q, v);
  on_device_of(q, "attention_backward", [&](gpu::Stream stream) {
    return gpu::attention_backward(inputs, gradients, stream);
  });
}

void attention_delta(const Tensor& dout, const Tensor& out, const Tensor& delta) {
  const auto inputs = read_delta<float>(dout, out, delta);
  on_device_of(dout, "attention_delta",
               [&](gpu::Stream stream) { return gpu::attention_delta(inputs, stream); });
}

void state_merge(const Tensor& out, const Tensor& lse, const Tensor& more_out,
                 const Tensor& more_lse) {
  const auto merge = read_merge<float>(out, lse, more_out, more_lse);
  on_device_of(out, "state_merge",
               [&](gpu::Stream stream) { return gpu::state_merge(merge, stream); });
}

void head_exchange(Direction direction, const std::vector<Tensor>& tensors, const Tensor& message) {
  const auto pieces = read_pieces(tensors, message);
  on_device_of(message, direction == Direction::kPack ? "pack" : "unpack", [&](gpu::Stream stream) {
    return gpu::head_exchange(direction, pieces, static_cast<char*>(message.data_ptr()), stream);
  });
}

void pack(const std::vector<Tensor>& tensors, const Tensor& message) {
  head_exchange(Direction::kPack, tensors, message);
}

void unpack(const Tensor& message, const std::vector<Tensor>& tensors) {
  head_exchange(Direction::kUnpack, tensors, message);
}

}  // namespace
}  // namespace usp

STABLE_TORCH_LIBRARY_IMPL(usp, CUDA, m) {
  m.impl("attention_forward", TORCH_BOX(&usp::attention_forward));
  m.impl("attention_backward", TORCH_BOX(&usp::attention_backward));
  m.impl("attention_delta", TORCH_BOX(&usp::attention_delta));
  m.impl("state_merge", TORCH_BOX(&usp::state_merge));
  m.impl("pack", TORCH_BOX(&usp::pack));
  m.impl("unpack", TORCH_BOX(&usp::unpack));
}
