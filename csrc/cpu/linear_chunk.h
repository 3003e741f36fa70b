#pragma once

// What forward and backward of linear attention share: a chunk's rows and triangles.
//
// All arithmetic is in T: the tables are those for inputs in T, whatever the inputs are, for states
// and decays have digits that bf16 would lose.

#include <algorithm>

#include "cpu/linear.h"
#include "cpu/tiles.h"

namespace usp::cpu {

template <typename T>
Matrix<const T> from_row(Matrix<const T> m, int64_t row) {
  return {m.data + row * m.ld, m.ld};
}

template <typename T>
Matrix<T> from_row(Matrix<T> m, int64_t row) {
  return {m.data + row * m.ld, m.ld};
}

// Triangles are worked out in rows of kPad, each up to its diagonal.

// Lower triangle (rows, rows) = a (rows, k) b (k, rows), and what is behind it up to a whole kPad.
template <typename T>
void lower_product(const Kernels<T>& table, int64_t rows, int64_t k, Matrix<const T> a,
                   Matrix<const T> b, Matrix<T> lower) {
  for (int64_t i = 0; i < rows; i += kPad) {
    const int64_t end = std::min(i + kPad, rows);
    table.gemm({end - i, padded(end), k, from_row(a, i), b, from_row(lower, i), {T(1), false}});
  }
}

// c (rows, n) += lower b.
template <typename T>
void add_lower_times(const Kernels<T>& table, int64_t rows, int64_t n, Matrix<T> lower,
                     Matrix<const T> b, Matrix<T> c) {
  for (int64_t i = 0; i < rows; i += kPad) {
    const int64_t end = std::min(i + kPad, rows);
    table.gemm({end - i, n, end, from_row(as_const(lower), i), b, from_row(c, i), {T(1), true}});
  }
}

// c (rows, n) += lower^T b.
template <typename T>
void add_upper_times(const Kernels<T>& table, int64_t rows, int64_t n, Matrix<T> lower,
                     Matrix<const T> b, Matrix<T> c) {
  for (int64_t j = 0; j < rows; j += kPad) {
    const int64_t end = std::min(j + kPad, rows);
    const Matrix<const T> columns{lower.data + j * lower.ld + j, lower.ld, true};
    table.gemm({end - j, n, rows - j, columns, from_row(b, j), from_row(c, j), {T(1), true}});
  }
}

// Which head of which part a task walks, and where its state lies.
struct HeadTask {
  int64_t part, b, h, state;

  template <typename T>
  HeadTask(const LinearAttention<T>& a, int64_t task)
      : part(task / (a.B * a.H)), b(task / a.H % a.B), h(task % a.H), state(task) {}
};

// Rows (rows, cols) of a tensor as either operand of a product: in place, or copied to `room`.
template <typename T>
Matrix<const T> rows_of(const Kernels<T>& table, const TensorView& x, int64_t b, int64_t h,
                        Range tokens, int64_t cols, Matrix<T> room) {
  const void* from = row_address(x, b, tokens.begin, h);
  if (x.dtype == kDType<T> && cols % kPad == 0) return {static_cast<const T*>(from), x.row_stride};
  table.right_rows(x.dtype, from, x.row_stride, tokens.size(), cols, room);
  return as_const(room);
}

// The same of head h of all.
template <typename T>
Matrix<const T> rows_of(const Kernels<T>& table, const HeadsView& x, const HeadTask& at,
                        int64_t heads, Range tokens, int64_t cols, Matrix<T> room) {
  return rows_of(table, x, at.b, x.head(at.h, heads), tokens, cols, room);
}

// Rows (rows, cols) to (B, L, H, cols).
template <typename T>
void store_result(const Kernels<T>& table, const LinearAttention<T>& a, const HeadTask& at,
                  Range tokens, Matrix<T> rows, int64_t cols, LinearResult to) {
  const int64_t first = ((at.b * a.L + tokens.begin) * a.H + at.h) * cols;
  char* dst = static_cast<char*>(to.data) + first * element_size(to.dtype);
  table.store_rows(as_const(rows), tokens.size(), cols, T(1), nullptr, to.dtype, dst, a.H * cols);
}

template <typename T>
Matrix<const T> transposed(Matrix<const T> m) {
  return {m.data, m.ld, true};
}

}  // namespace usp::cpu
