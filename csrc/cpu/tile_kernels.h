#pragma once

// The tile kernels of one instruction set as a table; the including file has set
// USP_VECTOR_BYTES, USP_GEMM_ROWS, USP_GEMM_VECTORS and the compiler's target.

#include "cpu/channels.h"
#include "cpu/decays.h"
#include "cpu/gemm.h"
#include "cpu/kernels.h"
#include "cpu/rows.h"
#include "cpu/scores.h"

namespace usp::cpu {
namespace {

template <typename T, typename Words = SingleWords>
constexpr Kernels<T> make_kernels() {
  return {
      .word = Words::kElements,
      .block_rows = USP_GEMM_ROWS,
      .block_columns = USP_GEMM_VECTORS * kLanes<T>,
      .headroom = Words::kRounds ? T(16) : T(0),
      .gemm = gemm<Words, T>,
      .products_with_few = products_with_few<Words, T>,
      .left_rows = left_rows<T>,
      .right_rows = right_rows<T>,
      .weighted_rows = right_rows<T>,
      .right_transpose = right_transpose<T>,
      .store_rows = store_rows<T>,
      .row_products = row_products<T>,
      .add_rows = add_rows<T>,
      .scale_rows = scale_rows<T>,
      .softcap = softcap<T>,
      .add_bias = add_bias<T>,
      .add_alibi = add_alibi<T>,
      .mask = mask<T>,
      .dropout = dropout<T>,
      .softmax_update = softmax_update<Words, T>,
      .finish_rows = finish_rows<T>,
      .gradients = gradients<Words, T>,
      .add_bias_gradient = add_bias_gradient<T>,
      .decays_between = decays_between<T>,
      .decays_since_start = decays_since_start<T>,
      .multiply_lower = multiply_lower<T>,
      .sums_across = sums_across<T>,
      .channel_decays = channel_decays<T>,
      .channel_scores = channel_scores<T>,
      .channel_gradients = channel_gradients<T>,
      .multiply = multiply<T>,
      .sum_products = sum_products<T>,
      .add_products_behind = add_products_behind<T>,
      .add_products_before = add_products_before<T>,
  };
}

}  // namespace
}  // namespace usp::cpu
