// AVX-512 with BF16: the products of bf16 inputs, two at a time. Everything else is AVX-512's.
//
// Products are exact and summed in fp32. Weights and gradients of scores are rounded to bf16 for
// their products, to nearest even.

#include "kernels.h"

#if USP_CPU_X86

#include <immintrin.h>

// The target is set in the source, after every header that other objects share, so that no build
// system has to know it and no shared inline function is compiled for it.
#if defined(__clang__)
#pragma clang attribute push(                                                          \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma"))), \
    apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma")
#endif

#define USP_VECTOR_BYTES 64
#define USP_GEMM_ROWS 6
#define USP_GEMM_VECTORS 4
#include "gemm.h"
#include "rows.h"

namespace usp::cpu {
namespace {

// A word is two bf16, the first in the low half.
struct PairWords {
  static constexpr int64_t kElements = 2;

  static USP_SIMD_MEMBER Vec<float> multiply_add(float left, Vec<float> right, Vec<float> sum) {
    return _mm512_dpbf16_ps(sum, (__m512bh)_mm512_set1_ps(left), (__m512bh)right);
  }
};

int64_t pairs(int64_t count) { return (count + 1) / 2; }

typedef uint16_t Halves __attribute__((vector_size(32)));

// 16 words, each of one bf16 of `low` and one of `high`.
USP_SIMD Mask<float> interleave(Halves low, Halves high) {
  return __builtin_convertvector(low, Mask<float>) |
         (__builtin_convertvector(high, Mask<float>) << 16);
}

USP_SIMD Halves rounded(const float* p) { return (Halves)_mm512_cvtneps_pbh((__m512)load(p)); }

USP_SIMD Halves load_halves(const uint16_t* p) {
  Halves v;
  __builtin_memcpy(&v, p, sizeof(v));
  return v;
}

uint16_t* halves(const Matrix<float>& m, int64_t row) {
  return reinterpret_cast<uint16_t*>(m.data + row * m.ld);
}

// The padding reaches as far as by_row_words reads: a multiple of kPad bf16.
void load_row_pairs(DType, const void* src, int64_t src_stride, int64_t rows, int64_t cols,
                    Matrix<float> dst) {
  const int64_t padding = (cols + kPad - 1) / kPad * kPad - cols;
  for (int64_t i = 0; i < rows; ++i) {
    uint16_t* to = halves(dst, i);
    __builtin_memcpy(to, static_cast<const uint16_t*>(src) + i * src_stride,
                     static_cast<size_t>(cols) * sizeof(*to));
    __builtin_memset(to + cols, 0, static_cast<size_t>(padding) * sizeof(*to));
  }
}

void transpose_pairs(Matrix<const float> src, int64_t rows, int64_t cols, Matrix<float> dst) {
  transpose<float>(src, rows, pairs(cols), dst);
}

Matrix<const float> by_row_pairs(Matrix<const float> src, int64_t rows, int64_t cols,
                                 Matrix<float> room) {
  for (int64_t i = 0; i < rows; i += 2) {
    const auto* low = reinterpret_cast<const uint16_t*>(src.data + i * src.ld);
    const auto* high = low + 2 * src.ld;
    float* to = room.data + i / 2 * room.ld;
    for (int64_t d = 0; d < cols; d += kPad) {
      const Halves second = i + 1 < rows ? load_halves(high + d) : Halves{};
      store<float>(to + d, (Vec<float>)interleave(load_halves(low + d), second));
    }
  }
  return {room.data, room.ld};
}

Matrix<const float> tile_pairs_by_key(Tile<float> tile, float* room) {
  const int64_t words = tile.queries / 2;
  for (int64_t j = 0; j < tile.keys; ++j) {
    for (int64_t i = 0; i < tile.queries; i += kPad) {
      const Halves words_of_row = rounded(tile.row(j) + i);
      __builtin_memcpy(room + j * words + i / 2, &words_of_row, sizeof(words_of_row));
    }
  }
  return {room, words};
}

Matrix<const float> tile_pairs_by_query(Tile<float> tile, float* room) {
  for (int64_t j = 0; j < tile.keys; j += 2) {
    float* to = room + j / 2 * tile.queries;
    for (int64_t i = 0; i < tile.queries; i += kPad) {
      const bool paired = j + 1 < tile.keys;
      const Halves second = paired ? rounded(tile.row(j + 1) + i) : Halves{};
      store<float>(to + i, (Vec<float>)interleave(rounded(tile.row(j) + i), second));
    }
  }
  return {room, tile.queries, true};
}

Kernels<float> make_bf16_kernels() {
  Kernels<float> table = avx512_kernels<float>();
  table.gemm = gemm<PairWords, float>;
  table.load_rows = load_row_pairs;
  table.transpose = transpose_pairs;
  table.by_row_words = by_row_pairs;
  table.tile_by_key = tile_pairs_by_key;
  table.tile_by_query = tile_pairs_by_query;
  return table;
}

}  // namespace

const Kernels<float>& avx512_bf16_kernels() {
  static const Kernels<float> table = make_bf16_kernels();
  return table;
}

}  // namespace usp::cpu

#if defined(__clang__)
#pragma clang attribute pop
#endif

#endif  // USP_CPU_X86
