#pragma once

// What the backward kernels share: from the products q k and dout v to the gradient of a score.

#include <type_traits>

#include "attention.h"
#include "own_rows.h"
#include "scores.h"

namespace usp::gpu {

struct BackwardArguments {
  Attention<float> inputs;
  AttentionGradients<float> gradients;
  FirstBlock first;
  bool vectors;
};

USP_DEVICE AttentionGradients<float> in_global_memory(AttentionGradients<float> g) {
  g.dout.data = in_global_memory(g.dout.data);
  g.delta = in_global_memory(g.delta);
  g.lse = in_global_memory(g.lse);
  g.dq = in_global_memory(g.dq);
  g.dk = in_global_memory(g.dk);
  g.dv = in_global_memory(g.dv);
  g.results.dq = in_global_memory(g.results.dq);
  g.results.dk = in_global_memory(g.results.dk);
  g.results.dv = in_global_memory(g.results.dv);
  g.dbias.data = in_global_memory(g.dbias.data);
  return g;
}

// dq, dk or dv in memory: a sum to add to, or a result to write over, in fp32 or in T.
struct GradientTarget {
  float* sum;
  void* result;  // null: there is a sum
  DType dtype;

  USP_DEVICE static GradientTarget of_dq(const AttentionGradients<float>& g) {
    return {g.dq, g.results.dq, g.results.dq_dtype};
  }
  USP_DEVICE static GradientTarget of_dk(const AttentionGradients<float>& g) {
    return {g.dk, g.results.dk, g.results.kv_dtype};
  }
  USP_DEVICE static GradientTarget of_dv(const AttentionGradients<float>& g) {
    return {g.dv, g.results.dv, g.results.kv_dtype};
  }

  // visit(pointer, integral constant: whether what is there counts)
  template <typename T, typename Visit>
  USP_DEVICE void visit(Visit&& visit) const {
    if (result == nullptr) return visit(sum, std::true_type{});
    if (dtype == DType::kFloat32) return visit(static_cast<float*>(result), std::false_type{});
    visit(static_cast<T*>(result), std::false_type{});
  }
};

// Whether rows that nobody sees, or that see nothing, are written too: as zeros.
USP_HOST_DEVICE bool overwrites(const AttentionGradients<float>& g) {
  return g.results.dq != nullptr || g.results.dk != nullptr || g.results.dv != nullptr;
}

// bias_backward.cu: adds this block's share to dbias.
void bias_backward(const BackwardArguments& arguments, Stream stream);

// What is known of a query beforehand.
struct QueryResults {
  float lse;  // final, in units of log2; +inf for a query that has seen nothing
  float delta;

  USP_DEVICE static QueryResults of(float lse, float delta) {
    return {lse == -kInfinity ? kInfinity : lse * kLog2e, delta};
  }
};

struct PairGradients {
  float weight;   // p m, what the output used
  float score;    // ds, the gradient of a bias
  float product;  // of scale * <q, k>
};

template <bool kPlain>
USP_DEVICE PairGradients pair_gradients(const Scoring<kPlain>& scoring, float product,
                                        float output_product, QueryResults query, Pair at) {
  const Score score = scoring.score(product, at);
  const float p = fast_exp2(fma(score.value, scoring.remaining_scale(), -query.lse));
  const float m = scoring.multiplier(at);
  const float ds = p * (output_product * m - query.delta);
  return {p * m, ds, ds * score.derivative};
}

// Every pair of a tile: `products` become weights, `output_products` gradients of products.
// pair(strip, slot, column) and query(strip, slot, column) say which pair and what is known of its
// query. `all_visible`: no pair of the tile is masked, and all exist.
template <bool kPlain, int kTile, int kStrips, int kColumns, typename PairOf, typename QueryOf>
USP_DEVICE void tile_gradients(const Scoring<kPlain>& scoring,
                               Sums<kTile, kStrips, kColumns>& products,
                               Sums<kTile, kStrips, kColumns>& output_products, bool all_visible,
                               PairOf&& pair, QueryOf&& query) {
  using Element = Accumulator<kTile>;
  const auto visit_all = [&](auto&& is_there) {
    USP_UNROLL
    for (int s = 0; s < kStrips; ++s) {
      USP_UNROLL
      for (int n = 0; n < kColumns; ++n) {
        USP_UNROLL
        for (int i = 0; i < kElements<kTile>; ++i) {
          const int slot = Element::slot(i);
          const int column = Element::first_column() + n * kTile + Element::offset(i);
          float& x = products.tile[s][n].x[i];
          float& dp = output_products.tile[s][n].x[i];
          const Pair at = pair(s, slot, column);
          PairGradients found{0.0f, 0.0f, 0.0f};
          if (is_there(at)) found = pair_gradients(scoring, x, dp, query(s, slot, column), at);
          x = found.weight;
          dp = found.product;
        }
      }
    }
  };
  if (kPlain && all_visible) {
    visit_all([](Pair) { return true; });
  } else {
    visit_all([&](Pair at) { return is_visible(scoring.span(), at); });
  }
}

}  // namespace usp::gpu
