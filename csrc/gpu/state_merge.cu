// One pass: a row of (out, lse) and of the partial result is read once and written once.
//
// A row is taken by 1 to 32 neighbouring threads, each with 16 bytes of the partial result at a
// time; the rows of a block are neighbours in memory.

#include <initializer_list>

#include "gpu.h"
#include "half.h"
#include "state_merge.h"

namespace usp::gpu {
namespace {

constexpr int kThreads = 256;
constexpr int kMaxThreadsPerRow = 32;

USP_DEVICE float to_float(float x) { return x; }

// As many numbers as one or two vector loads take.
template <typename T, int kWidth>
struct alignas(sizeof(T) * kWidth < 16 ? sizeof(T) * kWidth : 16) Numbers {
  T item[kWidth];
};

struct RowIndex {
  int64_t b, l, h;
};

USP_DEVICE RowIndex row_index(int64_t row, int64_t L, int64_t H) {
  if (row <= 0xFFFFFFFF) {  // 32-bit division takes a fifth of the time
    const auto small = static_cast<uint32_t>(row);
    const auto bl = small / static_cast<uint32_t>(H);
    return {bl / static_cast<uint32_t>(L), bl % static_cast<uint32_t>(L),
            small % static_cast<uint32_t>(H)};
  }
  return {row / H / L, row / H % L, row % H};
}

template <typename Source, int kWidth>
USP_KERNEL USP_LAUNCH_BOUNDS(kThreads, 4) void merge_kernel(StateMerge<float> m, int per_row) {
  const int thread = static_cast<int>(thread_index());
  const int first = thread % per_row;
  const int64_t rows = m.B * m.L * m.H;
  const int64_t row = block_index() * int64_t{kThreads / per_row} + thread / per_row;
  const bool is_row = row < rows;
  const auto [b, l, h] = row_index(is_row ? row : rows - 1, m.L, m.H);
  float* lse = m.lse.at(b, l, h);
  const auto merged = merge_row(
      *lse, *m.more_lse.at(b, l, h), [](float x) { return fast_exp2(kLog2e * x); },
      [](float x) { return kLn2 * fast_log2(x); });
  barrier();  // every thread of the row has read lse
  if (!is_row) return;
  if (first == 0) *lse = merged.lse;
  auto* out = reinterpret_cast<Numbers<float, kWidth>*>(m.out_row(b, l, h));
  const auto* more = reinterpret_cast<const Numbers<Source, kWidth>*>(m.more_row<Source>(b, l, h));
  for (int64_t i = first; i < m.Dv / kWidth; i += per_row) {
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

bool is_aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

template <typename Source, int kWidth>
bool takes_vectors(const StateMerge<float>& m) {
  return is_aligned(m.out) && is_aligned(m.more_out.data) &&
         divides(kWidth,
                 {m.Dv, m.more_out.batch_stride, m.more_out.row_stride, m.more_out.head_stride}) &&
         divides(4, {m.out_batch_stride, m.out_row_stride, m.out_head_stride});
}

template <typename Source, int kWidth>
const char* start(const StateMerge<float>& m, Stream stream) {
  int per_row = 1;
  while (per_row < kMaxThreadsPerRow && per_row * kWidth < m.Dv) per_row *= 2;
  const int64_t rows_per_block = kThreads / per_row;
  const int64_t blocks = (m.B * m.L * m.H + rows_per_block - 1) / rows_per_block;
  if (blocks > 0x7FFFFFFF) return "more rows than one launch takes";
  launch(merge_kernel<Source, kWidth>, {static_cast<uint32_t>(blocks)}, kThreads, 0, stream, m,
         per_row);
  return last_error();
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
