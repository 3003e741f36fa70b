// delta = <dout, out>, what a backward pass takes of every row's output. One pass over memory.

#include "gpu/attention.h"
#include "gpu/blocks.h"
#include "gpu/half.h"
#include "gpu/row_threads.h"

namespace usp::gpu {
namespace {

template <typename T, int kWidth>
USP_KERNEL USP_LAUNCH_BOUNDS(kRowThreads, 4) void delta_kernel(AttentionDelta<float> a,
                                                               int per_row) {
  const ThreadsRow row = ThreadsRow::of(per_row, a.B, a.Lq, a.H);
  const auto numbers_of = [&](const TensorView& x) {
    return reinterpret_cast<const Numbers<T, kWidth>*>(x.row<T>(row.b, row.l, row.h));
  };
  const auto *dout = numbers_of(a.dout), *out = numbers_of(a.out);
  float sum = 0.0f;
  for (int64_t i = row.thread; i < a.Dv / kWidth; i += per_row) {
    const auto left = dout[i], right = out[i];
    USP_UNROLL
    for (int d = 0; d < kWidth; ++d) {
      sum = fma(to_float(left.item[d]), to_float(right.item[d]), sum);
    }
  }
  for (int step = 1; step < per_row; step *= 2) sum += shuffle_xor(sum, step);
  if (row.exists && row.thread == 0) a.delta[(row.b * a.H + row.h) * a.Lq + row.l] = sum;
}

template <typename T, int kWidth>
const char* start(const AttentionDelta<float>& a, Stream stream) {
  return launch_rows<kWidth>(delta_kernel<T, kWidth>, a, a.B * a.Lq * a.H, a.Dv, stream);
}

template <typename T>
const char* start(const AttentionDelta<float>& a, Stream stream) {
  constexpr int kVector = 8;
  const bool vectors = has_aligned_rows(a.dout, a.Dv) && has_aligned_rows(a.out, a.Dv);
  return vectors ? start<T, kVector>(a, stream) : start<T, 1>(a, stream);
}

}  // namespace

const char* attention_delta(const AttentionDelta<float>& inputs, Stream stream) {
  if (inputs.B * inputs.Lq * inputs.H == 0) return nullptr;
  switch (inputs.dout.dtype) {
    case DType::kBFloat16:
      return start<BFloat16>(inputs, stream);
    case DType::kFloat16:
      return start<Float16>(inputs, stream);
    default:
      return "dout is neither bfloat16 nor float16, which the GPU kernel takes";
  }
}

}  // namespace usp::gpu
