#pragma once

// What the backward kernels share: from the products q k and dout v to the gradient of a score.

#include <type_traits>

#include "gpu/attention.h"
#include "gpu/own_rows.h"
#include "gpu/scores.h"

namespace usp::gpu {

// dq, dk or dv in memory: a sum to add to, or a result to write over.
struct GradientTarget {
  enum class Kind { kSum, kFloats, kRounded };  // rounded to T

  void* data;
  Kind kind;

  USP_HOST_DEVICE static GradientTarget of_dq(const AttentionGradients<float>& g) {
    return of(g.dq, g.results.dq, g.results.dq_dtype);
  }
  USP_HOST_DEVICE static GradientTarget of_dk(const AttentionGradients<float>& g) {
    return of(g.dk, g.results.dk, g.results.kv_dtype);
  }
  USP_HOST_DEVICE static GradientTarget of_dv(const AttentionGradients<float>& g) {
    return of(g.dv, g.results.dv, g.results.kv_dtype);
  }

  // Then rows that nobody sees, or that see nothing, are written too: as zeros.
  USP_DEVICE bool is_overwritten() const { return kind != Kind::kSum; }

  // visit(pointer, integral constant: whether what is there counts)
  template <typename T, typename Visit>
  USP_DEVICE void visit(Visit&& visit) const {
    void* to = in_global_memory(data);
    if (kind == Kind::kSum) return visit(static_cast<float*>(to), std::true_type{});
    if (kind == Kind::kFloats) return visit(static_cast<float*>(to), std::false_type{});
    visit(static_cast<T*>(to), std::false_type{});
  }

 private:
  USP_HOST_DEVICE static GradientTarget of(float* sum, void* result, DType dtype) {
    if (result == nullptr) return {sum, Kind::kSum};
    return {result, dtype == DType::kFloat32 ? Kind::kFloats : Kind::kRounded};
  }
};

struct BackwardArguments {
  Attention<float> inputs;
  AttentionGradients<float> gradients;
  GradientTarget dq, dk, dv;
  BlockOrder order;
  bool vectors;
};

USP_DEVICE AttentionGradients<float> in_global_memory(AttentionGradients<float> g) {
  g.dout.data = in_global_memory(g.dout.data);
  g.delta = in_global_memory(g.delta);
  g.lse = in_global_memory(g.lse);
  g.dbias.data = in_global_memory(g.dbias.data);
  return g;
}

// bias_backward.cu: adds this block's share to dbias.
void bias_backward(const BackwardArguments& arguments, Stream stream);

// What is known of a query beforehand.
struct QueryResults {
  float lse;  // final, in units of log2; +inf for a query that has seen nothing
  float delta;

  USP_DEVICE static QueryResults of(float lse, float delta) { return {exponent_of(lse), delta}; }
  USP_DEVICE static float exponent_of(float lse) {
    return lse == -kInfinity ? kInfinity : lse * kLog2e;
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

// Columns of a tile as rows that a block walks over.
template <int kTile, int kStrips>
struct WalkedColumns {
  int first;                                 // the row of column 0
  bool all_visible;                          // with every own row, and all exist
  const PerRow<Rows, kTile, kStrips>& seen;  // by own rows, or that see them
};

// Every pair of a tile: `products` become weights, `output_products` gradients of products.
// pair(strip, slot, walked row) and query(strip, slot, column) say which pair and what is known of
// its query.
template <bool kPlain, int kTile, int kStrips, int kColumns, typename PairOf, typename QueryOf>
USP_DEVICE void tile_gradients(const Scoring<kPlain>& scoring,
                               Sums<kTile, kStrips, kColumns>& products,
                               Sums<kTile, kStrips, kColumns>& output_products,
                               const WalkedColumns<kTile, kStrips>& walked, PairOf&& pair,
                               QueryOf&& query) {
  using Element = Accumulator<kTile>;
  const auto visit_all = [&](auto all_visible) {
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
          PairGradients found{0.0f, 0.0f, 0.0f};
          if (all_visible || walked.seen.of[s][slot].contain(walked.first + column)) {
            const Pair at = pair(s, slot, walked.first + column);
            found = pair_gradients(scoring, x, dp, query(s, slot, column), at);
          }
          x = found.weight;
          dp = found.product;
        }
      }
    }
  };
  if (kPlain && walked.all_visible) {
    visit_all(std::true_type{});
  } else {
    visit_all(std::false_type{});
  }
}

}  // namespace usp::gpu
