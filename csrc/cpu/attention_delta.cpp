#include "cpu/attention.h"
#include "cpu/tiles.h"

namespace usp::cpu {

template <typename T>
void attention_delta(const AttentionDelta<T>& a, const ParallelFor& parallel) {
  const Kernels<T>& table = kernels<T>(a.dout.dtype);
  const int64_t row_tiles = (a.Lq + kQueryTile - 1) / kQueryTile;
  parallel.for_each_task(a.B * row_tiles, [&](int64_t, int64_t task) {
    const int64_t b = task / row_tiles, begin = task % row_tiles * kQueryTile;
    const int64_t end = std::min(begin + kQueryTile, a.Lq);
    for (int64_t i = begin; i < end; ++i) {  // a token's heads are neighbours in memory
      table.row_products(a.dout.dtype, row_address(a.dout, b, i, 0), a.dout.head_stride,
                         row_address(a.out, b, i, 0), a.out.head_stride, a.H, a.Dv,
                         a.delta + b * a.H * a.Lq + i, a.Lq);
    }
  });
}

template void attention_delta(const AttentionDelta<float>&, const ParallelFor&);
template void attention_delta(const AttentionDelta<double>&, const ParallelFor&);

}  // namespace usp::cpu
