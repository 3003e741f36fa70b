#pragma once

// Tiles in and out of memory: converted to the arithmetic's dtype, transposed, added to.

#include "cpu/kernels.h"
#include "cpu/simd.h"

namespace usp::cpu {
namespace {

USP_SIMD float float_of_bits(uint32_t bits) {
  float x;
  __builtin_memcpy(&x, &bits, sizeof(x));
  return x;
}

USP_SIMD float convert_bfloat16(uint16_t x) { return float_of_bits(uint32_t{x} << 16); }

// All ones where true: selects by arithmetic, for a loop over ternaries is not always vectorised.
USP_SIMD uint32_t mask_if(bool condition) { return uint32_t{0} - uint32_t{condition}; }

// Without subnormal floats on the way, so that flush-to-zero modes do not change it.
USP_SIMD float convert_float16(uint16_t x) {
  const uint32_t sign = uint32_t{x & 0x8000u} << 16;
  const uint32_t magnitude = x & 0x7FFFu;
  const uint32_t is_special = mask_if(magnitude >= 0x7C00u);  // infinity, NaN
  const uint32_t is_subnormal = mask_if(magnitude < 0x0400u);
  constexpr uint32_t kRebias = (127u - 15u) << 23;
  const uint32_t normal = (magnitude << 13) + kRebias + (is_special & kRebias);
  const float subnormal = static_cast<float>(static_cast<int32_t>(magnitude)) * 0x1p-24f;
  uint32_t subnormal_bits;
  __builtin_memcpy(&subnormal_bits, &subnormal, sizeof(subnormal));
  return float_of_bits((subnormal_bits & is_subnormal) | (normal & ~is_subnormal) | sign);
}

USP_SIMD uint32_t bits_of_float(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, sizeof(bits));
  return bits;
}

// To nearest, ties to even; NaN stays NaN.
USP_SIMD uint16_t round_to_bfloat16(float x) {
  const uint32_t bits = bits_of_float(x);
  const uint32_t is_nan = mask_if(x != x);
  const uint32_t rounded = bits + 0x7FFFu + ((bits >> 16) & 1u);
  return static_cast<uint16_t>(((rounded & ~is_nan) | ((bits | 0x400000u) & is_nan)) >> 16);
}

USP_SIMD uint16_t round_to_float16(float x) {
  const uint32_t bits = bits_of_float(x), sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7FFFFFFFu;
  const uint32_t is_nan = mask_if(magnitude > 0x7F800000u);
  const uint32_t is_large = mask_if(magnitude >= 0x477FF000u);  // rounds to infinity
  const uint32_t is_small = mask_if(magnitude < 0x38800000u);   // below the normal numbers
  constexpr uint32_t kRebias = (127u - 15u) << 23;
  const uint32_t normal = (magnitude - kRebias + 0xFFFu + ((magnitude >> 13) & 1u)) >> 13;
  // The sum's last bit is 2^-24, the spacing of subnormal halves.
  const uint32_t subnormal =
      bits_of_float(float_of_bits(magnitude & is_small) + 0.5f) - 0x3F000000u;
  const uint32_t finite = (normal & ~is_small) | (subnormal & is_small);
  const uint32_t special = 0x7C00u | (0x200u & is_nan);
  return static_cast<uint16_t>(sign | (finite & ~is_large) | (special & is_large));
}

USP_SIMD float convert_same(float x) { return x; }
USP_SIMD double convert_same(double x) { return x; }

template <typename T, typename Source, typename Convert>
USP_SIMD void load_rows_as(const Source* src, int64_t src_stride, int64_t rows, int64_t cols,
                           Matrix<T> dst, Convert convert) {
  for (int64_t i = 0; i < rows; ++i) {
    const Source* __restrict from = src + i * src_stride;
    T* __restrict to = dst.data + i * dst.ld;
    for (int64_t d = 0; d < cols; ++d) to[d] = convert(from[d]);
    for (int64_t d = cols; d < dst.ld; ++d) to[d] = T(0);
  }
}

template <typename T>
void right_rows(DType dtype, const void* src, int64_t src_stride, int64_t rows, int64_t cols,
                Matrix<T> dst) {
  const auto* halves = static_cast<const uint16_t*>(src);
  if (dtype == DType::kBFloat16) {
    load_rows_as(halves, src_stride, rows, cols, dst,
                 [](uint16_t x) { return convert_bfloat16(x); });
  } else if (dtype == DType::kFloat16) {
    load_rows_as(halves, src_stride, rows, cols, dst,
                 [](uint16_t x) { return convert_float16(x); });
  } else {
    load_rows_as(static_cast<const T*>(src), src_stride, rows, cols, dst,
                 [](T x) { return convert_same(x); });
  }
}

template <typename T>
Matrix<const T> left_rows(DType dtype, const void* src, int64_t src_stride, int64_t rows,
                          int64_t cols, Matrix<T> room) {
  const bool converted = dtype == DType::kBFloat16 || dtype == DType::kFloat16;
  if (!converted) return {static_cast<const T*>(src), src_stride};
  right_rows<T>(dtype, src, src_stride, rows, cols, room);
  return {room.data, room.ld};
}

// Column by column: where there are fewer than a vector has lanes.
template <typename T>
void transpose_narrow(Matrix<const T> src, int64_t rows, int64_t cols, Matrix<T> dst) {
  for (int64_t d = 0; d < cols; ++d) {
    T* __restrict to = dst.data + d * dst.ld;
    for (int64_t i = 0; i < rows; ++i) to[i] = src.data[i * src.ld + d];
    for (int64_t i = rows; i < dst.ld; ++i) to[i] = T(0);
  }
}

template <typename T>
void right_transpose(Matrix<const T> src, int64_t rows, int64_t cols, Matrix<T> dst) {
  constexpr int64_t kBlock = kLanes<T>;
  if (cols < kBlock) return transpose_narrow(src, rows, cols, dst);
  for (int64_t i0 = 0; i0 < dst.ld; i0 += kBlock) {
    for (int64_t end = kBlock; end < cols + kBlock; end += kBlock) {
      const int64_t d0 = (end < cols ? end : cols) - kBlock;  // the last may overlap another
      Vec<T> block[kBlock];
#pragma GCC unroll 16
      for (int64_t i = 0; i < kBlock; ++i) {
        block[i] = i0 + i < rows ? load(src.data + (i0 + i) * src.ld + d0) : Vec<T>{};
      }
      transpose<T>(block);
#pragma GCC unroll 16
      for (int64_t d = 0; d < kBlock; ++d) store<T>(dst.data + (d0 + d) * dst.ld + i0, block[d]);
    }
  }
}

template <typename T, typename Result, typename Round>
USP_SIMD void store_rows_as(Matrix<const T> src, int64_t rows, int64_t cols, T scale,
                            const T* factor, Result* dst, int64_t dst_stride, Round round) {
  for (int64_t i = 0; i < rows; ++i) {
    const T f = factor == nullptr ? scale : scale * factor[i];
    const T* __restrict from = src.data + i * src.ld;
    Result* __restrict to = dst + i * dst_stride;
    for (int64_t d = 0; d < cols; ++d) to[d] = round(f * from[d]);
  }
}

template <typename T>
void store_rows(Matrix<const T> src, int64_t rows, int64_t cols, T scale, const T* factor,
                DType dtype, void* dst, int64_t dst_stride) {
  auto* halves = static_cast<uint16_t*>(dst);
  if (dtype == DType::kBFloat16) {
    store_rows_as(src, rows, cols, scale, factor, halves, dst_stride,
                  [](T x) { return round_to_bfloat16(static_cast<float>(x)); });
  } else if (dtype == DType::kFloat16) {
    store_rows_as(src, rows, cols, scale, factor, halves, dst_stride,
                  [](T x) { return round_to_float16(static_cast<float>(x)); });
  } else {
    store_rows_as(src, rows, cols, scale, factor, static_cast<T*>(dst), dst_stride,
                  [](T x) { return convert_same(x); });
  }
}

template <typename T, typename Source, typename Convert>
USP_SIMD void row_products_as(const Source* a, int64_t a_stride, const Source* b, int64_t b_stride,
                              int64_t rows, int64_t cols, T* result, int64_t result_stride,
                              Convert convert) {
  for (int64_t i = 0; i < rows; ++i) {
    const Source* __restrict x = a + i * a_stride, * __restrict y = b + i * b_stride;
    T sums[kLanes<T>] = {};
    int64_t d = 0;
    for (; d + kLanes<T> <= cols; d += kLanes<T>) {
      for (int64_t lane = 0; lane < kLanes<T>; ++lane) {
        sums[lane] += convert(x[d + lane]) * convert(y[d + lane]);
      }
    }
    T total = 0;
    for (; d < cols; ++d) total += convert(x[d]) * convert(y[d]);
    for (const T sum : sums) total += sum;
    result[i * result_stride] = total;
  }
}

template <typename T>
void row_products(DType dtype, const void* a, int64_t a_stride, const void* b, int64_t b_stride,
                  int64_t rows, int64_t cols, T* result, int64_t result_stride) {
  const auto *x = static_cast<const uint16_t*>(a), *y = static_cast<const uint16_t*>(b);
  if (dtype == DType::kBFloat16) {
    row_products_as(x, a_stride, y, b_stride, rows, cols, result, result_stride,
                    [](uint16_t h) { return T(convert_bfloat16(h)); });
  } else if (dtype == DType::kFloat16) {
    row_products_as(x, a_stride, y, b_stride, rows, cols, result, result_stride,
                    [](uint16_t h) { return T(convert_float16(h)); });
  } else {
    row_products_as(static_cast<const T*>(a), a_stride, static_cast<const T*>(b), b_stride, rows,
                    cols, result, result_stride, [](T h) { return convert_same(h); });
  }
}

template <typename T>
void add_rows(Matrix<const T> src, int64_t rows, int64_t cols, T scale, T* dst,
              int64_t dst_stride) {
  for (int64_t i = 0; i < rows; ++i) {
    const T* __restrict from = src.data + i * src.ld;
    T* __restrict to = dst + i * dst_stride;
    for (int64_t d = 0; d < cols; ++d) to[d] += scale * from[d];
  }
}

template <typename T>
void scale_rows(Matrix<T> m, int64_t rows, int64_t cols, const T* factor) {
  for (int64_t i = 0; i < rows; ++i) {
    const T f = factor[i];
    if (f == T(1)) continue;
    T* __restrict row = m.data + i * m.ld;
    for (int64_t d = 0; d < cols; ++d) row[d] *= f;
  }
}

}  // namespace
}  // namespace usp::cpu
