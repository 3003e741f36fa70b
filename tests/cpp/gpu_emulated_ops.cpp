// The emulated GPU's kernels, as torch ops for tests: `usp_gpu_emulated_<wave size>`.
// ArgumentReader are read as the real GPU binding reads them.

#include <torch/csrc/stable/library.h>

#include "gpu/attention.h"
#include "gpu/pack.h"
#include "gpu/state_merge.h"
#include "torch/move_arguments.h"

namespace usp {
namespace {

void done(const char* error) { check(error == nullptr, error == nullptr ? "" : error); }

void attention_delta(const Tensor& dout, const Tensor& out, const Tensor& delta) {
  done(gpu::attention_delta(read_delta<float>(dout, out, delta), {}));
}

void state_merge(const Tensor& out, const Tensor& lse, const Tensor& more_out,
                 const Tensor& more_lse) {
  done(gpu::state_merge(read_merge<float>(out, lse, more_out, more_lse), {}));
}

void pack(const std::vector<Tensor>& tensors, const Tensor& message) {
  const auto pieces = read_pieces(tensors, message);
  done(gpu::copy_pieces(Direction::kPack, pieces, static_cast<char*>(message.data_ptr()), {}));
}

void unpack(const Tensor& message, const std::vector<Tensor>& tensors) {
  const auto pieces = read_pieces(tensors, message);
  done(gpu::copy_pieces(Direction::kUnpack, pieces, static_cast<char*>(message.data_ptr()), {}));
}

}  // namespace
}  // namespace usp

// The macro's arguments are pasted into names before they are expanded.
#define USP_EMULATED_OPS(name) STABLE_TORCH_LIBRARY(name, m)
#define USP_EMULATED_OPS_IMPL(name) STABLE_TORCH_LIBRARY_IMPL(name, CPU, m)

USP_EMULATED_OPS(USP_GPU_EMULATED_OPS) {
  m.def("attention_delta(Tensor dout, Tensor out, Tensor(a!) delta) -> ()");
  m.def("state_merge(Tensor(a!) out, Tensor(b!) lse, Tensor more_out, Tensor more_lse) -> ()");
  m.def("pack(Tensor[] tensors, Tensor(a!) message) -> ()");
  m.def("unpack(Tensor message, Tensor(a!)[] tensors) -> ()");
}

USP_EMULATED_OPS_IMPL(USP_GPU_EMULATED_OPS) {
  m.impl("attention_delta", TORCH_BOX(&usp::attention_delta));
  m.impl("state_merge", TORCH_BOX(&usp::state_merge));
  m.impl("pack", TORCH_BOX(&usp::pack));
  m.impl("unpack", TORCH_BOX(&usp::unpack));
}
