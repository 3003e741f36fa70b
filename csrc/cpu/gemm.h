#pragma once

// c (m, n) takes alpha a (m, k) b (k, n): register blocks of USP_GEMM_ROWS rows by
// USP_GEMM_VECTORS vectors. a is read one word at a time, so it may be stored transposed.
//
// `Words` says what a word of a and b is (kernels.h) and how two of them are multiplied.

#include <algorithm>

#include "cpu/words.h"

namespace usp::cpu {
namespace {

template <bool kAdds, bool kScales, typename T, int kRows, int kVectors>
USP_SIMD void store_block(const Vec<T> (&sum)[kRows][kVectors], T* __restrict c, int64_t ldc,
                          T alpha, const T* factor) {
#pragma GCC unroll 12
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      T* at = c + r * ldc + v * kLanes<T>;
      Vec<T> result = alpha * sum[r][v];
      if constexpr (kAdds) result += kScales ? factor[r] * load(at) : load(at);
      store(at, result);
    }
  }
}

template <typename Words, typename T, int kRows, int kVectors, bool kTransposed>
void gemm_block(int64_t words, const T* __restrict a, int64_t lda, const T* __restrict b,
                int64_t ldb, T* __restrict c, int64_t ldc, const Update<T>& update,
                const T* factor) {
  Vec<T> sum[kRows][kVectors] = {};
  for (int64_t p = 0; p < words; ++p) {
    Vec<T> right[kVectors];
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) right[v] = load(b + p * ldb + v * kLanes<T>);
#pragma GCC unroll 12
    for (int r = 0; r < kRows; ++r) {
      const T& left = kTransposed ? a[p * lda + r] : a[r * lda + p];
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) {
        sum[r][v] = Words::multiply_add(left, right[v], sum[r][v]);
      }
    }
  }
  if (!update.adds) {
    store_block<false, false, T>(sum, c, ldc, update.alpha, factor);
  } else if (factor == nullptr) {
    store_block<true, false, T>(sum, c, ldc, update.alpha, factor);
  } else {
    store_block<true, true, T>(sum, c, ldc, update.alpha, factor);
  }
}

// All rows of one panel of kVectors vectors; the remainder of m takes the smaller blocks. `factor`
// is update.factor of its first row.
template <typename Words, typename T, int kRows, int kVectors, bool kTransposed>
void gemm_panel(int64_t m, int64_t words, const T* a, int64_t lda, const T* b, int64_t ldb, T* c,
                int64_t ldc, const Update<T>& update, const T* factor) {
  const auto pass = [&](int64_t rows) {
    a += rows * (kTransposed ? 1 : lda);
    c += rows * ldc;
    if (factor != nullptr) factor += rows;
    m -= rows;
  };
  while (m >= kRows) {
    if (kVectors == 1 && m > kRows && m < 2 * kRows) {
      // Few sums wait for their own last products: the last two blocks are about as high.
      const int64_t half = (m + 1) / 2;
      gemm_panel<Words, T, kRows, kVectors, kTransposed>(half, words, a, lda, b, ldb, c, ldc,
                                                         update, factor);
      pass(half);
    } else {
      update.look_ahead();
      gemm_block<Words, T, kRows, kVectors, kTransposed>(words, a, lda, b, ldb, c, ldc, update,
                                                         factor);
      pass(kRows);
    }
  }
  if constexpr (kRows > 1) {
    if (m > 0) {
      gemm_panel<Words, T, kRows - 1, kVectors, kTransposed>(m, words, a, lda, b, ldb, c, ldc,
                                                             update, factor);
    }
  }
}

// Rows of a block: narrow ones have more, for each sum waits for its own last product.
template <int kVectors>
inline constexpr int kGemmRows =
    std::min<int>(USP_GEMM_ROWS * USP_GEMM_VECTORS / kVectors, kHighestBlock);

// Panels of at most kVectors vectors, about equally wide: the columns from `column` on.
template <typename Words, typename T, int kVectors, bool kTransposed>
void gemm_columns(const Product<T>& p, int64_t column) {
  constexpr int64_t kWidth = kVectors * kLanes<T>;
  const int64_t words = (p.k + Words::kElements - 1) / Words::kElements;
  for (; column < p.n; column += kWidth) {
    const int64_t n = p.n - column;
    const int64_t panels = (n + kWidth - 1) / kWidth;
    if (n <= panels * (kWidth - kLanes<T>)) break;  // narrower ones suffice
    gemm_panel<Words, T, kGemmRows<kVectors>, kVectors, kTransposed>(
        p.m, words, p.a.data, p.a.ld, p.b.data + column, p.b.ld, p.c.data + column, p.c.ld,
        p.update, p.update.factor);
  }
  if constexpr (kVectors > 1) {
    if (column < p.n) gemm_columns<Words, T, kVectors - 1, kTransposed>(p, column);
  }
}

// row[i] = alpha <a, row i of b>; zeros behind them, up to kPad.
template <typename Words, typename T, int kRows>
USP_SIMD void dots(const T* __restrict a, Matrix<const T> b, int64_t words, T alpha,
                   T* __restrict row) {
  Vec<T> sum[kRows] = {};
  int64_t p = 0;
  for (; p + kLanes<T> <= words; p += kLanes<T>) {
    const Vec<T> left = load(a + p);
#pragma GCC unroll 4
    for (int i = 0; i < kRows; ++i) {
      sum[i] = Words::template multiply_add_lanes<T>(left, load(b.data + i * b.ld + p), sum[i]);
    }
  }
  if (p < words) {
    const Vec<T> left = load_some(a + p, words - p);
#pragma GCC unroll 4
    for (int i = 0; i < kRows; ++i) {
      const Vec<T> right = load_some(b.data + i * b.ld + p, words - p);
      sum[i] = Words::template multiply_add_lanes<T>(left, right, sum[i]);
    }
  }
  for (int64_t i = 0; i < kPad; i += kLanes<T>) store<T>(row + i, Vec<T>{});
  if constexpr (kRows > 1 && kRows <= kLanes<T>) {
    store<T>(row, first_lanes<T, kRows>(alpha * sums_of_lanes<T>(sum)));
  } else {
#pragma GCC unroll 4
    for (int i = 0; i < kRows; ++i) row[i] = alpha * sum_of_lanes<T>(sum[i])[0];
  }
}

template <typename Words, typename T, int kRows = kFew>
void products_with_few(int64_t m, int64_t n, int64_t k, Matrix<const T> a, Matrix<const T> b,
                       Matrix<T> c, T alpha, Lookahead& ahead) {
  if constexpr (kRows > 1) {
    if (n < kRows) return products_with_few<Words, T, kRows - 1>(m, n, k, a, b, c, alpha, ahead);
  }
  const int64_t words = (k + Words::kElements - 1) / Words::kElements;
  for (int64_t j = 0; j < m; ++j) {
    ahead.advance();
    dots<Words, T, kRows>(a.data + j * a.ld, b, words, alpha, c.data + j * c.ld);
  }
}

template <typename Words, typename T>
void gemm(const Product<T>& p) {
  if (p.a.transposed) {
    gemm_columns<Words, T, USP_GEMM_VECTORS, true>(p, 0);
  } else {
    gemm_columns<Words, T, USP_GEMM_VECTORS, false>(p, 0);
  }
}

}  // namespace
}  // namespace usp::cpu
