#include "cpu/state_merge.h"

#define USP_VECTOR_BYTES 16  // of rows.h only the conversions are used
#include "cpu/rows.h"

namespace usp::cpu {
namespace {

constexpr int64_t kRowsPerTask = 64;

template <typename T, typename Source, typename Convert>
void merge_one(const StateMerge<T>& m, int64_t row, Convert convert) {
  const int64_t h = row % m.H, l = row / m.H % m.L, b = row / m.H / m.L;
  T* lse = m.lse.at(b, l, h);
  const auto merged = merge_row(
      *lse, *m.more_lse.at(b, l, h), [](T x) { return std::exp(x); },
      [](T x) { return std::log(x); });
  *lse = merged.lse;
  T* __restrict out = m.out_row(b, l, h);
  const Source* __restrict more = m.more_out.template row<Source>(b, l, h);
  for (int64_t d = 0; d < m.Dv; ++d) {
    out[d] = merged.share * out[d] + merged.more_share * convert(more[d]);
  }
}

template <typename T, typename Source, typename Convert>
void merge_all(const StateMerge<T>& m, const ParallelFor& parallel, Convert convert) {
  const int64_t rows = m.B * m.L * m.H;
  parallel.for_each_task((rows + kRowsPerTask - 1) / kRowsPerTask, [&](int64_t, int64_t task) {
    const int64_t stop = std::min(rows, (task + 1) * kRowsPerTask);
    for (int64_t row = task * kRowsPerTask; row < stop; ++row) {
      merge_one<T, Source>(m, row, convert);
    }
  });
}

}  // namespace

template <typename T>
void state_merge(const StateMerge<T>& merge, const ParallelFor& parallel) {
  switch (merge.more_out.dtype) {
    case DType::kBFloat16:
      return merge_all<T, uint16_t>(merge, parallel,
                                    [](uint16_t x) -> T { return convert_bfloat16(x); });
    case DType::kFloat16:
      return merge_all<T, uint16_t>(merge, parallel,
                                    [](uint16_t x) -> T { return convert_float16(x); });
    default:
      return merge_all<T, T>(merge, parallel, [](T x) { return x; });
  }
}

template void state_merge<float>(const StateMerge<float>&, const ParallelFor&);
template void state_merge<double>(const StateMerge<double>&, const ParallelFor&);

}  // namespace usp::cpu
