// The GPU side of the torch ops, for CUDA and HIP alike: torch calls both devices CUDA.

#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include "gpu/attention.h"
#include "gpu/pack.h"
#include "gpu/state_merge.h"
#include "torch/attention_ops.h"
#include "torch/move_arguments.h"
#include "torch/once_ops.h"

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

void forward(const ForwardCall& call) {
  ArgumentReader args(call.q);
  const auto inputs = read_inputs<float>(args, call.q, call.k, call.v, call.optional, call.scalars);
  const auto state = read_state<float>(args, call.q, call.out, call.lse, call.result);
  check_takes(call.q, call.v);
  on_device_of(call.q, "attention_forward",
               [&](gpu::Stream stream) { return gpu::attention_forward(inputs, state, stream); });
}

void backward(const BackwardCall& call) {
  ArgumentReader args(call.q);
  const auto inputs = read_inputs<float>(args, call.q, call.k, call.v, call.optional, call.scalars);
  const auto gradients = read_gradients<float>(args, call.q, call.optional.bias, call.gradients);
  check_takes(call.q, call.v);
  on_device_of(call.q, "attention_backward", [&](gpu::Stream stream) {
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

void copy_pieces(Direction direction, const std::vector<Tensor>& tensors, const Tensor& message) {
  const auto pieces = read_pieces(tensors, message);
  on_device_of(message, direction == Direction::kPack ? "pack" : "unpack", [&](gpu::Stream stream) {
    return gpu::copy_pieces(direction, pieces, static_cast<char*>(message.data_ptr()), stream);
  });
}

void pack(const std::vector<Tensor>& tensors, const Tensor& message) {
  copy_pieces(Direction::kPack, tensors, message);
}

void unpack(const Tensor& message, const std::vector<Tensor>& tensors) {
  copy_pieces(Direction::kUnpack, tensors, message);
}

}  // namespace
}  // namespace usp

STABLE_TORCH_LIBRARY_IMPL(usp, CUDA, m) {
  m.impl("attention_forward", TORCH_BOX(&usp::attention_forward<usp::forward>));
  m.impl("attention_backward", TORCH_BOX(&usp::attention_backward<usp::backward>));
  m.impl("attention_delta", TORCH_BOX(&usp::attention_delta));
  m.impl("attention_once", TORCH_BOX(&usp::attention_once<usp::forward>));
  m.impl("attention_once_backward",
         TORCH_BOX((&usp::attention_once_backward<usp::attention_delta, usp::backward>)));
  m.impl("state_merge", TORCH_BOX(&usp::state_merge));
  m.impl("pack", TORCH_BOX(&usp::pack));
  m.impl("unpack", TORCH_BOX(&usp::unpack));
}
