#pragma once

// The tile kernels of one instruction set as a table; the including file has set
// USP_VECTOR_BYTES, USP_GEMM_ROWS, USP_GEMM_VECTORS and the compiler's target.

#include "gemm.h"
#include "kernels.h"
#include "rows.h"
#include "scores.h"

namespace usp::cpu {
namespace {

template <typename T>
constexpr Kernels<T> make_kernels() {
  return {
      .gemm = gemm<SingleWords, T>,
      .load_rows = load_rows<T>,
      .transpose = transpose<T>,
      .by_row_words = by_row_words<T>,
      .tile_by_key = tile_by_key<T>,
      .tile_by_query = tile_by_query<T>,
      .add_rows = add_rows<T>,
      .scale_rows = scale_rows<T>,
      .softcap = softcap<T>,
      .add_bias = add_bias<T>,
      .add_alibi = add_alibi<T>,
      .mask = mask<T>,
      .dropout = dropout<T>,
      .softmax_update = softmax_update<T>,
      .probabilities = probabilities<T>,
      .score_gradient = score_gradient<T>,
      .multiply = multiply<T>,
      .add_bias_gradient = add_bias_gradient<T>,
  };
}

}  // namespace
}  // namespace usp::cpu
