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

// Which tile of which head is being computed: rows and the keys that some of them see.
struct TileIndex {
  int64_t b;
  int64_t h;
  Range rows;
  Range keys{};
  const Span* mask = nullptr;  // null: every row sees every key
  const Cut* cut = nullptr;    // of the tile by the mask

  template <typename Visit>
  void for_each_block(const Visit& visit) const {
    if (mask != nullptr) return cut->for_each_block(visit);
    visit(Strip{{0, padded(rows.size())}, {0, rows.size()}, {0, keys.size()}});
  }

  // Calls visit(some, seen) for as many rows at a time as a block of products has, but none of two
  // strips, with what they see of the keys.
  template <typename T, typename Visit>
  void for_each_run(const Kernels<T>& kernels, const Visit& visit) const {
    if (mask == nullptr) return visit(Range{0, rows.size()}, Range{0, keys.size()});
    const int64_t at_once = std::min(kernels.block_rows, Cut::kRows);
    cut->for_each_strip([&](const Strip& strip) {
      const int64_t unseeing = strip.rows.begin - strip.columns.begin;
      int64_t row = strip.columns.begin + unseeing / at_once * at_once;
      for (; row < strip.rows.end; row += at_once) {
        const Range some{row, std::min(row + at_once, strip.rows.end)};
        const Range mine{rows.begin + some.begin, rows.begin + some.end};
        visit(some, intersect(seen_in(*mask, mine, keys, kernels.word), strip.keys));
      }
    });
  }

  // Of an operand by query the part for these rows and keys.
  template <typename T>
  static Matrix<const T> by_query(const Kernels<T>& kernels, Matrix<const T> all, Range some,
                                  Range seen) {
    return {all.data + kernels.in_words(seen.begin) * all.ld + some.begin, all.ld, all.transposed};
  }
};

// Rows of queries, or of their gradients, as the second operand of scores.
template <typename T>
struct QueryOperand {
  Matrix<T> transposed;    // right operand (cols, padded rows); its room
  Matrix<const T> rows{};  // left operand, for products with few of them; data null: not kept

  // From left operand `left`, which stays as it is where it is kept, as few rows are.
  void set(const Kernels<T>& kernels, Matrix<const T> left, int64_t num_rows, int64_t cols,
           bool keeps) {
    rows = keeps ? left : Matrix<const T>{};
    if (num_rows <= kFew) return;
    transposed.ld = padded(num_rows);
    kernels.right_transpose(left, num_rows, cols, transposed);
  }

  // How often `multiply` asks ahead, about.
  static int64_t turns(const Kernels<T>& kernels, int64_t num_rows, int64_t keys) {
    return num_rows <= kFew ? keys : kernels.blocks(keys, num_rows);
  }

  // products (keys, padded rows) = scale * left (keys, cols) times this, where the cut has numbers.
  void multiply(const Kernels<T>& kernels, const TileIndex& at, int64_t cols, Matrix<const T> left,
                T* products, T scale, Lookahead& ahead) const {
    const int64_t ld = padded(at.rows.size());
    at.for_each_block([&](const Strip& block) {
      const auto [columns, seeing, keys] = block;
      const Matrix<const T> some{left.data + keys.begin * left.ld, left.ld};
      const Matrix<T> to{products + keys.begin * ld + columns.begin, ld};
      const int64_t count = seeing.end - columns.begin;
      if (rows.data != nullptr && count <= kFew && columns.size() == kPad) {
        kernels.products_with_few(keys.size(), count, cols, some, rows_from(rows, columns.begin),
                                  to, scale, ahead);
      } else {
        const Matrix<const T> right{transposed.data + columns.begin, transposed.ld};
        kernels.gemm(
            {keys.size(), columns.size(), cols, some, right, to, {scale, false, nullptr, &ahead}});
      }
    });
  }
};

static_assert(kQueryTile == Cut::kMostRows && kKeyTile == Cut::kMostKeys && kPad == Cut::kRows);

// Calls visit(index) for a tile of rows and those of `keys` that they see, in whole words counted
// from the first of `keys`; not if they see none. Strips see whole `unit`s of keys. `at` says whose
// rows, and `cut` is room.
template <typename Visit>
void with_seen(const Span& span, TileIndex at, Range keys, int64_t word, int64_t unit, Cut& cut,
               const Visit& visit) {
  at.keys = intersect(keys, visible_keys(span, at.rows));
  if (at.keys.empty()) return;
  at.keys.begin -= (at.keys.begin - keys.begin) & (word - 1);
  if (!unmasked_keys(span, at.rows).contains(at.keys)) {
    at.mask = &span;
    at.cut = &cut;
    cut.set(span, at.rows, at.keys, padded(at.rows.size()), unit);
    if (cut.empty()) return;
  }
  visit(at);
}

// Padded copies of what belongs to the query rows of a tile.
struct QueryPositions {
  int32_t* q_pos;

  void carve(Carver& carver) { q_pos = carver.take<int32_t>(kQueryTile); }

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
  return {data, at.keys.size(), padded(at.rows.size()), late ? scale : T(1), at.cut};
}

// s (keys, queries) = the scores of a tile: products, scaled but by s.scale, softcap, bias, ALiBi,
// -inf where masked. `softcap_derivative` (null: not wanted) is laid out like s.
template <typename T>
void compute_scores(const Attention<T>& a, const Kernels<T>& kernels, const TileIndex& at,
                    Matrix<const T> k, const QueryOperand<T>& q, const QueryPositions& positions,
                    Tile<T> s, T* softcap_derivative, Lookahead& ahead) {
  const T scale = s.scale == 1 ? static_cast<T>(a.softmax_scale) : T(1);
  q.multiply(kernels, at, a.D, k, s.data, scale, ahead);
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
