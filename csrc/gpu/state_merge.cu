// One pass: a row of (out, lse) and of the partial result is read once and written once.

#include <initializer_list>

#include "gpu/blocks.h"
#include "gpu/half.h"
#include "gpu/row_threads.h"
#include "gpu/state_merge.h"

namespace usp::gpu {
namespace {

USP_DEVICE float to_float(float x) { return x; }

template <typename Source, int kWidth>
USP_KERNEL USP_LAUNCH_BOUNDS(kRowThreads, 4) void merge_kernel(StateMerge<float> m, int per_row) {
  const auto [b, l, h, thread, exists] = ThreadsRow::of(per_row, m.B, m.L, m.H);
  float* lse = m.lse.at(b, l, h);
  const auto merged = merge_row(
      *lse, *m.more_lse.at(b, l, h), [](float x) { return fast_exp2(kLog2e * x); },
      [](float x) { return kLn2 * fast_log2(x); });
  barrier();  // every thread of the row has read lse
  if (!exists) return;
  if (thread == 0) *lse = merged.lse;
  auto* out = reinterpret_cast<Numbers<float, kWidth>*>(m.out_row(b, l, h));
  const auto* more =
      reinterpret_cast<const Numbers<Source, kWidth>*>(m.more_out.row<Source>(b, l, h));
  for (int64_t i = thread; i < m.Dv / kWidth; i += per_row) {
    const auto from = more[i];
    auto to = out[i];
    USP_UNROLL
    for (int d = 0; d < kWidth; ++d) {
      to.item[d] = merged.share * to.item[d] + merged.more_share * to_float(from.item[d]);
    }
    out[i] = to;
  }
}

bool divides(int64_t unit, std::initializer_list<int64_t> values) {
  for (const int64_t value : values) {
    if (value % unit != 0) return false;
  }
  return true;
}

template <typename Source, int kWidth>
bool takes_vectors(const StateMerge<float>& m) {
  return is_aligned(m.out) && is_aligned(m.more_out.data) &&
         divides(kWidth,
                 {m.Dv, m.more_out.batch_stride, m.more_out.row_stride, m.more_out.head_stride}) &&
         divides(4, {m.out_batch_stride, m.out_row_stride, m.out_head_stride});
}

template <typename Source, int kWidth>
const char* start(const StateMerge<float>& m, Stream stream) {
  return launch_rows<kWidth>(merge_kernel<Source, kWidth>, m, m.B * m.L * m.H, m.Dv, stream);
}

template <typename Source>
const char* start(const StateMerge<float>& m, Stream stream) {
  constexpr int kWidth = 16 / sizeof(Source);
  return takes_vectors<Source, kWidth>(m) ? start<Source, kWidth>(m, stream)
                                          : start<Source, 1>(m, stream);
}

}  // namespace

const char* state_merge(const StateMerge<float>& merge, Stream stream) {
  if (merge.B * merge.L * merge.H == 0) return nullptr;
  switch (merge.more_out.dtype) {
    case DType::kFloat32:
      return start<float>(merge, stream);
    case DType::kBFloat16:
      return start<BFloat16>(merge, stream);
    case DType::kFloat16:
      return start<Float16>(merge, stream);
    default:
      return "more_out is float64; the GPU kernel takes float32, bfloat16 and float16";
  }
}

}  // namespace usp::gpu
