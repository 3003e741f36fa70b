#pragma once

// c (m, n) = or += a (m, k) b (k, n): register blocks of USP_GEMM_ROWS rows by USP_GEMM_VECTORS
// vectors. a is read one element at a time, so it may be stored transposed.

#include "kernels.h"
#include "simd.h"

namespace usp::cpu {
namespace {

template <typename T, int kRows, int kVectors, bool kTransposed>
void gemm_block(int64_t k, const T* __restrict a, int64_t lda, const T* __restrict b, int64_t ldb,
                T* __restrict c, int64_t ldc, bool accumulate) {
  Vec<T> sum[kRows][kVectors] = {};
  for (int64_t p = 0; p < k; ++p) {
    Vec<T> right[kVectors];
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) right[v] = load(b + p * ldb + v * kLanes<T>);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const T left = kTransposed ? a[p * lda + r] : a[r * lda + p];
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) sum[r][v] += left * right[v];
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      T* at = c + r * ldc + v * kLanes<T>;
      store(at, accumulate ? load(at) + sum[r][v] : sum[r][v]);
    }
  }
}

// All rows of one panel of kVectors vectors; the remainder of m takes the smaller blocks.
template <typename T, int kRows, int kVectors, bool kTransposed>
void gemm_panel(int64_t m, int64_t k, const T* a, int64_t lda, const T* b, int64_t ldb, T* c,
                int64_t ldc, bool accumulate) {
  for (; m >= kRows; m -= kRows) {
    gemm_block<T, kRows, kVectors, kTransposed>(k, a, lda, b, ldb, c, ldc, accumulate);
    a += kRows * (kTransposed ? 1 : lda);
    c += kRows * ldc;
  }
  if constexpr (kRows > 1) {
    if (m > 0) {
      gemm_panel<T, kRows - 1, kVectors, kTransposed>(m, k, a, lda, b, ldb, c, ldc, accumulate);
    }
  }
}

template <typename T, int kVectors, bool kTransposed>
void gemm_columns(int64_t m, int64_t n, int64_t k, Matrix<const T> a, Matrix<const T> b,
                  Matrix<T> c, bool accumulate) {
  constexpr int64_t kWidth = kVectors * kLanes<T>;
  for (; n >= kWidth; n -= kWidth) {
    gemm_panel<T, USP_GEMM_ROWS, kVectors, kTransposed>(m, k, a.data, a.ld, b.data, b.ld, c.data,
                                                        c.ld, accumulate);
    b.data += kWidth;
    c.data += kWidth;
  }
  if constexpr (kVectors > 1) {
    if (n > 0) gemm_columns<T, kVectors - 1, kTransposed>(m, n, k, a, b, c, accumulate);
  }
}

template <typename T>
void gemm(int64_t m, int64_t n, int64_t k, Matrix<const T> a, Matrix<const T> b, Matrix<T> c,
          bool accumulate) {
  if (a.transposed) {
    gemm_columns<T, USP_GEMM_VECTORS, true>(m, n, k, a, b, c, accumulate);
  } else {
    gemm_columns<T, USP_GEMM_VECTORS, false>(m, n, k, a, b, c, accumulate);
  }
}

}  // namespace
}  // namespace usp::cpu
