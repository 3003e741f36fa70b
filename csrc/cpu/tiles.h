#pragma once

// What forward and backward share: tile sizes, loading of query and key rows, and the scores of a
// tile before its softmax.

#include <algorithm>
#include <utility>

#include "cpu/kernels.h"
#include "cpu/scratch.h"

namespace usp::cpu {

inline constexpr int64_t kQueryTile = 64;
inline constexpr int64_t kKeyTile = 128;

inline int64_t padded(int64_t count) { return round_up(count, kPad); }

inline int64_t element_size(DType dtype) {
  switch (dtype) {
    case DType::kFloat64:
      return 8;
    case DType::kFloat32:
      return 4;
    default:
      return 2;
  }
}

template <typename T>
inline constexpr DType kDType = sizeof(T) == 8 ? DType::kFloat64 : DType::kFloat32;

// Address of (b, row, h, 0).
inline const void* row_address(const TensorView& x, int64_t b, int64_t row, int64_t h) {
  const int64_t offset = b * x.batch_stride + row * x.row_stride + h * x.head_stride;
  return static_cast<const char*>(x.data) + offset * element_size(x.dtype);
}

// Says that these rows will be read.
inline void expect(Lookahead& ahead, const TensorView& x, int64_t b, int64_t h, Range rows,
                   int64_t cols) {
  if (rows.empty()) return;
  const int64_t size = element_size(x.dtype);
  ahead.add(row_address(x, b, rows.begin, h), x.row_stride * size, rows.size(), cols * size);
}

template <typename T>
Matrix<const T> left_rows(const Kernels<T>& kernels, const TensorView& x, int64_t b, int64_t h,
                          Range rows, int64_t cols, Matrix<T> room) {
  return kernels.left_rows(x.dtype, row_address(x, b, rows.begin, h), x.row_stride, rows.size(),
                           cols, room);
}

template <typename T>
void right_rows(const Kernels<T>& kernels, const TensorView& x, int64_t b, int64_t h, Range rows,
                int64_t cols, Matrix<T> dst) {
  kernels.right_rows(x.dtype, row_address(x, b, rows.begin, h), x.row_stride, rows.size(), cols,
                     dst);
}

template <typename T>
void weighted_rows(const Kernels<T>& kernels, const TensorView& x, int64_t b, int64_t h, Range rows,
                   int64_t cols, Matrix<T> dst) {
  kernels.weighted_rows(x.dtype, row_address(x, b, rows.begin, h), x.row_stride, rows.size(), cols,
                        dst);
}

// Sums (rows, cols) as they are, or transposed to `room`.
template <typename T>
Matrix<const T> as_rows(const Kernels<T>& kernels, Matrix<T> sums, int64_t rows, int64_t cols,
                        T* room) {
  if (!sums.transposed) return {sums.data, sums.ld};
  const Matrix<T> to{room, padded(cols)};
  kernels.right_transpose({sums.data, sums.ld}, cols, rows * kernels.word, to);
  return {to.data, to.ld};
}

// With the padding of a transpose.
template <typename T>
void set_zero(Matrix<T> m, int64_t rows, int64_t cols) {
  if (m.transposed) std::swap(rows, cols), cols = padded(cols);
  if (cols == m.ld) cols *= std::exchange(rows, 1);
  for (int64_t i = 0; i < rows; ++i) std::fill_n(m.data + i * m.ld, cols, T(0));
}

template <typename T>
Matrix<const T> as_const(Matrix<T> m) {
  return {m.data, m.ld, m.transposed};
}

// Rows of queries, or of their gradients, as the second operand of scores.
template <typename T>
struct QueryOperand {
  Matrix<T> transposed;   // right operand (cols, padded rows); its room
  Matrix<const T> few{};  // left operand instead, where the rows are few

  // From left operand `rows`, which must outlive this where they are few.
  void set(const Kernels<T>& kernels, Matrix<const T> rows, int64_t num_rows, int64_t cols) {
    const bool are_few = num_rows <= kFew;
    few = are_few ? rows : Matrix<const T>{};
    if (are_few) return;
    transposed.ld = padded(num_rows);
    kernels.right_transpose(rows, num_rows, cols, transposed);
  }

  // From one row on, a multiple of kPad: the first where the rows are few.
  QueryOperand from(int64_t row) const { return {{transposed.data + row, transposed.ld}, few}; }

  // How often `multiply` asks ahead, about.
  static int64_t turns(const Kernels<T>& kernels, int64_t num_rows, int64_t keys) {
    return num_rows <= kFew ? 1 : kernels.blocks(keys, num_rows);
  }

  // products (keys, padded rows) = scale * left (keys, cols) times this.
  void multiply(const Kernels<T>& kernels, int64_t num_rows, int64_t cols, Matrix<const T> left,
                Tile<T> products, T scale, Lookahead& ahead) const {
    const Matrix<T> to{products.data, products.queries};
    if (few.data != nullptr) {
      ahead.advance();
      kernels.products_with_few(products.keys, num_rows, cols, left, few, to, scale);
    } else {
      kernels.gemm(products.keys, products.queries, cols, left, as_const(transposed), to,
                   {scale, false, nullptr, &ahead});
    }
  }
};

// Which tile of which head is being computed.
struct TileIndex {
  int64_t b;
  int64_t h;
  Range rows;
  Range keys;
  const Span* mask;  // null: every row sees every key
};

// Rows of a tile that an edge of the mask crosses are taken in strips: each sees less than all of
// them together.
inline constexpr int64_t kStrip = kPad;

// Those of `keys` that every row sees, in whole vectors counted from the first; may be empty.
inline Range seen_by_all(const Span& span, Range rows, Range keys) {
  const Range all = intersect(unmasked_keys(span, rows), keys);
  if (all.empty()) return {keys.end, keys.end};
  const int64_t begin = keys.begin + round_up(all.begin - keys.begin, kPad);
  const int64_t end = keys.begin + (all.end - keys.begin) / kPad * kPad;
  return begin < end ? Range{begin, end} : Range{keys.end, keys.end};
}

// Calls visit(rows, keys, mask) for the tile, or for its strips and for the keys that all of them
// see, with those of `keys` that are seen, in whole words counted from the first; mask as in
// TileIndex.
template <typename Visit>
void for_each_part(const Span& span, Range rows, Range keys, int64_t word, const Visit& visit) {
  Range seen = intersect(keys, visible_keys(span, rows));
  if (seen.empty()) return;
  seen.begin -= (seen.begin - keys.begin) % word;
  if (unmasked_keys(span, rows).contains(seen)) return visit(rows, seen, nullptr);
  if (rows.size() <= kStrip) {
    if (sees_any(span, rows, seen)) visit(rows, seen, &span);
    return;
  }
  const Range together = seen_by_all(span, rows, seen);
  if (!together.empty()) visit(rows, together, nullptr);
  for (int64_t begin = rows.begin; begin < rows.end; begin += kStrip) {
    const Range strip{begin, std::min(begin + kStrip, rows.end)};
    for_each_part(span, strip, {seen.begin, together.begin}, word, visit);
    for_each_part(span, strip, {together.end, seen.end}, word, visit);
  }
}

// Rows up to the last that sees one of the keys. Columns behind them hold nothing but -inf.
inline int64_t rows_seeing(const TileIndex& at) {
  if (at.mask == nullptr) return at.rows.size();
  int64_t end = at.rows.end;
  while (end > at.rows.begin + 1) {
    const Range seen{at.mask->first[end - 1], at.mask->stop[end - 1]};
    if (!intersect(seen, at.keys).empty()) break;
    --end;
  }
  return end - at.rows.begin;
}

// Padded copies of what belongs to the query rows of a tile.
struct QueryPositions {
  int32_t* q_pos;

  void carve(Carver& carver) { q_pos = carver.take<int32_t>(kQueryTile); }

  QueryPositions from(int64_t row) const { return {q_pos + row}; }

  template <typename T>
  void load(const Attention<T>& a, Range rows) {
    if (a.q_pos == nullptr) return;
    for (int64_t i = 0; i < padded(rows.size()); ++i) {
      q_pos[i] = i < rows.size() ? a.q_pos[rows.begin + i] : 0;
    }
  }
};

// A tile of scores to come; they are scaled late only where nothing else is done to them.
template <typename T>
Tile<T> score_tile(const Attention<T>& a, const Kernels<T>& kernels, const TileIndex& at, T* data) {
  const auto scale = static_cast<T>(a.softmax_scale);
  const bool alone = !(a.softcap > 0) && a.bias.data == nullptr && a.alibi_slopes == nullptr;
  const bool late = kernels.scales_late && alone && scale > 0;
  return {data, at.keys.size(), padded(at.rows.size()), late ? scale : T(1)};
}

// s (keys, queries) = the scores of a tile: products, scaled but by s.scale, softcap, bias, ALiBi,
// -inf where masked. `softcap_derivative` (null: not wanted) is laid out like s.
template <typename T>
void compute_scores(const Attention<T>& a, const Kernels<T>& kernels, const TileIndex& at,
                    Matrix<const T> k, const QueryOperand<T>& q, const QueryPositions& positions,
                    Tile<T> s, T* softcap_derivative, Lookahead& ahead) {
  const T scale = s.scale == 1 ? static_cast<T>(a.softmax_scale) : T(1);
  q.multiply(kernels, at.rows.size(), a.D, k, s, scale, ahead);
  if (a.softcap > 0) kernels.softcap(s, static_cast<T>(a.softcap), softcap_derivative);
  if (a.bias.data != nullptr) {
    kernels.add_bias(s, at.rows.size(), a.bias.at(at.b, at.h, at.rows.begin, at.keys.begin),
                     a.bias.query_stride, a.bias.key_stride);
  }
  if (a.alibi_slopes != nullptr) {
    const T slope = a.alibi_slopes[at.b * a.alibi_batch_stride + at.h * a.alibi_head_stride];
    kernels.add_alibi(s, slope, positions.q_pos, a.k_pos + at.keys.begin);
  }
  if (at.mask != nullptr) {
    kernels.mask(s, {at.mask->first + at.rows.begin, at.mask->stop + at.rows.begin, at.rows.size(),
                     at.keys.begin});
  }
}

// m (keys, queries) = keep / (1 - dropout_p).
template <typename T>
void dropout_multiplier(const Attention<T>& a, const Kernels<T>& kernels, const TileIndex& at,
                        const QueryPositions& positions, Tile<T> m) {
  kernels.dropout(m,
                  {.q_pos = positions.q_pos,
                   .k_pos = a.k_pos + at.keys.begin,
                   .row_of_heads = static_cast<uint32_t>(at.b * a.num_heads + a.head_offset + at.h),
                   .key = philox_key(a.dropout_seed),
                   .threshold = dropout_threshold(a.dropout_p),
                   .kept_scale = 1.0 / (1.0 - a.dropout_p)});
}

}  // namespace usp::cpu
