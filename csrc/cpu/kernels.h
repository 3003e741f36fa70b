#pragma once

// The arithmetic on tiles, behind one table of functions per instruction set.
//
// The algorithms (attention_forward.cpp, attention_backward.cpp) are compiled once and reach
// vectors only through this table. A score tile is key-major: row j holds one key's scores for all
// query rows of the tile, so what belongs to a query (max, lse, delta, its interval of keys) is a
// vector, and no reduction runs along one. Query columns are padded to a whole number of vectors.
//
// Operands of gemm are made of words. A word is an element, or, in the tables for bf16 inputs, two
// bf16 elements that are neighbours along the dim that gemm sums over; the left operand's second is
// 0 past an odd end. A word is as large as a T either way, so that operands take room of T.

#include <algorithm>
#include <cstdint>

#include "common/attention.h"
#include "common/philox.h"
#include "common/softmax.h"
#include "cpu/capability.h"
#include "cpu/cut.h"
#include "cpu/lookahead.h"

namespace usp::cpu {

// Tiles are padded to this many elements along vectors: 64 bytes of the narrowest type.
inline constexpr int64_t kPad = 16;

// Up to this many rows of queries take less as rows than padded to kPad columns.
inline constexpr int64_t kFew = 4;

// Rows of a register block of gemm that is as narrow as a vector.
inline constexpr int64_t kHighestBlock = 12;

template <typename T>
struct Matrix {
  T* data;
  int64_t ld;               // elements from one row to the next
  bool transposed = false;  // the transpose of what is stored is meant
};

template <typename T>
Matrix<T> rows_from(Matrix<T> m, int64_t row) {
  return {m.data + (m.transposed ? row : row * m.ld), m.ld, m.transposed};
}

// (keys, queries) scores or gradients of scores; `queries` includes the padding. Where a cut is
// given, mask, softmax_update and gradients look at nothing but the strips and their keys.
template <typename T>
struct Tile {
  T* data;
  int64_t keys;
  int64_t queries;
  T scale = 1;  // of scores that are not scaled yet (Kernels::scales_late)
  const Cut* cut = nullptr;

  T* row(int64_t j) const { return data + j * queries; }

  template <typename Visit>
  void for_each_strip(const Visit& visit) const {
    if (cut == nullptr) return visit(Strip{{0, queries}, {0, queries}, {0, keys}});
    cut->for_each_strip(visit);
  }
};

// Visible keys of the tile's query rows, relative to nothing: local key indices.
struct TileMask {
  const int32_t* first;
  const int32_t* stop;
  int64_t num_rows;
  int64_t first_key;  // local index of the tile's row 0
};

// What a tile's query rows have seen so far.
template <typename T>
struct SoftmaxRows {
  T* max;
  T* sum;  // of exp(score - max)
  T* factor;
};

// What becomes of row i of c in a product: factor[i] * c + alpha * product, or only the latter.
template <typename T>
struct Update {
  T alpha;
  bool adds;
  const T* factor = nullptr;  // null: 1
  // Asked for the next few rows once a register block; null: nothing will be read soon.
  Lookahead* ahead = nullptr;

  void look_ahead() const {
    if (ahead != nullptr) ahead->advance();
  }
};

// c (m, n) takes a (m, k) b (k, n), a and b in words along k. n is a multiple of kPad, the other
// two are any number. A left operand is transposed only where it is by query.
template <typename T>
struct Product {
  int64_t m, n, k;
  Matrix<const T> a, b;
  Matrix<T> c;
  Update<T> update;
};

struct TileDropout {
  const int32_t* q_pos;  // padded like the tile
  const int32_t* k_pos;
  uint32_t row_of_heads;  // b * num_heads + global head
  PhiloxKey key;
  uint32_t threshold;
  double kept_scale;  // 1 / (1 - dropout_p)
};

// What the gradients of a tile of scores are made of; all tiles have the same shape.
template <typename T>
struct GradientTile {
  Tile<T> s, dp;         // scores, and gradients of what dropout leaves of their weights
  const T *lse, *delta;  // (rows,)
  const T* multiplier;   // of dropout, null: none
  const T* derivative;   // of softcap, null: none
  T* ds;                 // the gradient before softcap is written here, null: not wanted
  T* rooms[3];           // for the operands, in their order, each for a whole tile
};

template <typename T>
struct GradientOperands {
  Matrix<const T> weights_by_key;   // (keys, rows) exp(s - lse) * multiplier
  Matrix<const T> scores_by_key;    // (keys, rows) gradients of the scores before softcap
  Matrix<const T> scores_by_query;  // (rows, keys), the same
};

// Of a chunk with a decay a channel, each (rows, cols); its two halves meet at row kPad.
template <typename T>
struct ChannelFactors {
  Matrix<T> each;                     // of each token: its log, and then the factor
  Matrix<T> since_start, to_end;      // up to each token, and behind it up to the end
  Matrix<T> since_middle, to_middle;  // of rows of the second half, and of the first
};

// Of tokens that see each other: what they are, and gradients that are added to.
template <typename T>
struct ChannelGradients {
  Matrix<const T> q, k, factors;
  Matrix<T> dq, dk, dg;  // dg.data null: not wanted
};

template <typename T>
struct Kernels {
  int64_t word;                       // elements in one: 1 or 2
  int64_t block_rows, block_columns;  // of c that gemm holds in registers at once
  // How far below its lse the maximum of a carried row starts. Where weights are rounded for their
  // product, the largest of a tile is exp(0), exact, on a carried row as on a new one.
  T headroom;
  // Whether softmax_update and gradients scale the scores.
  bool scales_late = false;
  // Whether products of operands by query (GradientOperands) want the other one, of weighted_rows,
  // transposed, and give the transpose.
  bool transposes_sums = false;
  // Around all that a thread does with gemm; null: nothing is to be done. Until the end, or another
  // call of softmax_update or gradients, a product may wait that is added to something: its
  // operands stay, but for weighted_rows, and rooms that these two may write to again.
  void (*begin)() = nullptr;
  void (*end)() = nullptr;

  // A shift, for a division takes as long as many products.
  int64_t in_words(int64_t elements) const { return elements >> (word - 1); }

  // About how many register blocks gemm makes of c (m, n): of few columns higher ones.
  int64_t blocks(int64_t m, int64_t n) const {
    const int64_t columns = std::min(std::max(n + kPad - 1, kPad) & -kPad, block_columns);
    const int64_t high = std::min(block_rows * block_columns / columns, kHighestBlock);
    const int64_t rows = std::max(block_rows, high);
    return ((m + rows - 1) / rows) * ((n + columns - 1) / columns);
  }

  // By reference: a copy of operands that were made just before would wait for them.
  void (*gemm)(const Product<T>& product);
  // c (m, kPad) = alpha a (m, k) b^T, b (n, k) of at most kFew rows, both left operands; zero in
  // the padding columns. Asks ahead once for each row of a.
  void (*products_with_few)(int64_t m, int64_t n, int64_t k, Matrix<const T> a, Matrix<const T> b,
                            Matrix<T> c, T alpha, Lookahead& ahead);

  // Rows (rows, cols) of a tensor as left operand, in words along a row: in place, or copied to
  // `room`.
  Matrix<const T> (*left_rows)(DType dtype, const void* src, int64_t src_stride, int64_t rows,
                               int64_t cols, Matrix<T> room);
  // The same rows as right operand, in words along a column: dst (rows, ld), zero in the padding
  // columns.
  void (*right_rows)(DType dtype, const void* src, int64_t src_stride, int64_t rows, int64_t cols,
                     Matrix<T> dst);
  // Also rows (rows, cols) as right operand: of products of operands by query. Where these are
  // transposed, with whole tiles of zeros behind an end.
  void (*weighted_rows)(DType dtype, const void* src, int64_t src_stride, int64_t rows,
                        int64_t cols, Matrix<T> dst);
  // The transpose of left rows as right operand: dst (cols, ld), zero in the padding columns.
  void (*right_transpose)(Matrix<const T> left, int64_t rows, int64_t cols, Matrix<T> dst);
  // dst (rows, cols) = scale * factor[i] * src, rounded to `dtype`; factor null: 1.
  void (*store_rows)(Matrix<const T> src, int64_t rows, int64_t cols, T scale, const T* factor,
                     DType dtype, void* dst, int64_t dst_stride);
  // result[i * result_stride] = <row i of a, row i of b>, both in `dtype`.
  void (*row_products)(DType dtype, const void* a, int64_t a_stride, const void* b,
                       int64_t b_stride, int64_t rows, int64_t cols, T* result,
                       int64_t result_stride);
  // dst (rows, cols) += scale * src.
  void (*add_rows)(Matrix<const T> src, int64_t rows, int64_t cols, T scale, T* dst,
                   int64_t dst_stride);
  // Multiplies row i of m (rows, cols) by factor[i].
  void (*scale_rows)(Matrix<T> m, int64_t rows, int64_t cols, const T* factor);

  // s = cap * tanh(s / cap); derivative (where not null) = 1 - tanh^2.
  void (*softcap)(Tile<T> s, T cap, T* derivative);
  // s += bias; `bias` points at (query 0, key 0) of the tile.
  void (*add_bias)(Tile<T> s, int64_t num_rows, const T* bias, int64_t query_stride,
                   int64_t key_stride);
  // s -= slope * |q_pos - k_pos|.
  void (*add_alibi)(Tile<T> s, T slope, const int32_t* q_pos, const int32_t* k_pos);
  // s = -inf where the row does not see the key.
  void (*mask)(Tile<T> s, TileMask mask);
  // m = keep / (1 - dropout_p) for every element.
  void (*dropout)(Tile<T> m, TileDropout dropout);

  // Lets the tile into the running softmax: max and sum move on, and `factor` says by how much what
  // was accumulated before must shrink. Returns the transpose of exp(s - max), times `multiplier`
  // where not null, as left operand: in place, or written to `room`, for a whole tile.
  Matrix<const T> (*softmax_update)(Tile<T> s, SoftmaxRows<T> rows, const T* multiplier, T* room);
  // lse = max + log(sum), factor = 1 / sum, of whole vectors of rows; where sum is 0, -inf and 0.
  void (*finish_rows)(SoftmaxRows<T> rows, int64_t num_rows, T* lse);
  // Weights and gradients of a tile of scores, as left operands: in place, or written to `rooms`.
  GradientOperands<T> (*gradients)(GradientTile<T> tile);
  // dbias += ds; summed over the queries first where query_stride is 0.
  void (*add_bias_gradient)(Tile<T> ds, int64_t num_rows, T* dbias, int64_t query_stride,
                            int64_t key_stride);

  // Of linear attention. Triangles are (rows, rows) and stored by query, with zeros behind the
  // diagonal up to a whole kPad; what is further on is neither read nor written.

  // m[i, j] = exp of the sum of logs behind j, up to i; logs null: 1.
  void (*decays_between)(const T* logs, int64_t rows, Matrix<T> m);
  // since_start[i] = exp of the sum of logs up to i; room for a whole kPad.
  void (*decays_since_start)(const T* logs, int64_t rows, T* since_start);
  // product = a * b, element by element.
  void (*multiply_lower)(Matrix<const T> a, Matrix<const T> b, int64_t rows, Matrix<T> product);
  // sums[t] = the sum of a[i, j] * b[i, j] over i >= t > j; `room` is as long as a row.
  void (*sums_across)(Matrix<const T> a, Matrix<const T> b, int64_t rows, T* sums, T* room);

  // Of linear attention with a decay a channel: rows of tokens, cols whole vectors of channels.

  // Makes factors of the logs in `to.each`.
  void (*channel_decays)(int64_t rows, int64_t cols, ChannelFactors<T> to);
  // scores (rows, kPad) of at most kPad tokens: the sum over channels of q_i k_j times the factors
  // behind j, up to i; 0 where j is behind i.
  void (*channel_scores)(int64_t rows, int64_t cols, Matrix<const T> q, Matrix<const T> k,
                         Matrix<const T> factors, Matrix<T> scores);
  // Adds what comes of the gradients of these scores.
  void (*channel_gradients)(int64_t rows, int64_t cols, Matrix<const T> dscores,
                            ChannelGradients<T> at);
  // product = a * b, element by element; may be a.
  void (*multiply)(Matrix<const T> a, Matrix<const T> b, int64_t rows, int64_t cols,
                   Matrix<T> product);
  // sums (cols,) = the sum over rows of a * b.
  void (*sum_products)(Matrix<const T> a, Matrix<const T> b, int64_t rows, int64_t cols, T* sums);
  // sums[t] += the sum of a[i] * b[i] over i >= t; or over i < t.
  void (*add_products_behind)(Matrix<const T> a, Matrix<const T> b, int64_t rows, int64_t cols,
                              Matrix<T> sums);
  void (*add_products_before)(Matrix<const T> a, Matrix<const T> b, int64_t rows, int64_t cols,
                              Matrix<T> sums);
};

// Sums of products of operands by query, or weighted rows in words: up to `rows` of them.
template <typename T>
Matrix<T> by_query_sums(const Kernels<T>& kernels, T* data, int64_t rows, int64_t cols) {
  return {data, kernels.transposes_sums ? rows : cols, kernels.transposes_sums};
}

// While it lives, its thread may call gemm.
template <typename T>
class Products {
 public:
  explicit Products(const Kernels<T>& kernels) : kernels_(kernels) {
    if (kernels.begin != nullptr) kernels.begin();
  }
  ~Products() {
    if (kernels_.end != nullptr) kernels_.end();
  }
  Products(const Products&) = delete;
  Products& operator=(const Products&) = delete;

 private:
  const Kernels<T>& kernels_;
};

// The table in use now for inputs of a dtype, by capability_for() (fastest.h).
template <typename T>
const Kernels<T>& kernels(DType inputs);

// The table of one instruction set, whatever the machine has; for tests.
template <typename T>
const Kernels<T>& kernels_of(Capability capability, DType inputs);

// One per object file.
template <typename T>
const Kernels<T>& default_kernels();
template <typename T>
const Kernels<T>& avx2_kernels();
template <typename T>
const Kernels<T>& avx512_kernels();
const Kernels<float>& avx512_bf16_kernels();  // for bf16 inputs only: a word is a pair
const Kernels<float>& amx_kernels();          // these too
const Kernels<float>& amx_emulated_kernels();
const Kernels<float>& neon_bf16_kernels();

}  // namespace usp::cpu
