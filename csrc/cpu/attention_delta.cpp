#include "attention.h"
#include "tiles.h"

namespace usp::cpu {

template <typename T>
void attention_delta(const AttentionDelta<T>& a, const ParallelFor& parallel) {
  const Kernels<T>& table = kernels<T>(a.dout.dtype);
  const int64_t row_tiles = (a.Lq + kQueryTile - 1) / kQueryTile;
  parallel.for_each_task(a.B * row_tiles, [&](int64_t, int64_t task) {
    const int64_t b = task / row_tiles, begin = task % row_tiles * kQueryTile;
    const int64_t rows = std::min(kQueryTile, a.Lq - begin);
    for (int64_t h = 0; h < a.H; ++h) {
      table.row_products(a.dout.dtype, row_address(a.dout, b, begin, h), a.dout.row_stride,
                         row_address(a.out, b, begin, h), a.out.row_stride, rows, a.Dv,
                         a.delta + (b * a.H + h) * a.Lq + begin);
    }
  });
}

template void attention_delta(const AttentionDelta<float>&, const ParallelFor&);
template void attention_delta(const AttentionDelta<double>&, const ParallelFor&);

}  // namespace usp::cpu
