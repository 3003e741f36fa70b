#pragma once

// Scores of one head, from the bare products of queries and keys, in units of log2: exp2 of them is
// the weight.

#include "common/attention.h"
#include "common/philox.h"
#include "gpu/blocks.h"

namespace usp::gpu {

// A pair of a query and a key, as indices into the block of attention.
struct Pair {
  int query, key;
};

// The columns [begin, end) of a tile of keys that a query sees.
struct Columns {
  int begin, end;

  USP_DEVICE bool contain(int column) const { return begin <= column && column < end; }
};

USP_DEVICE Columns visible_columns(const Span& span, int query, Rows keys, bool masked) {
  if (query >= span.num_queries) return {0, 0};
  if (!masked || span.sees_all()) return {0, keys.size()};
  const int stop = span.stop[query];
  return {span.first[query] - keys.begin, (stop < keys.end ? stop : keys.end) - keys.begin};
}

USP_DEVICE bool is_visible(const Span& span, Pair at) {
  if (at.query >= span.num_queries || at.key >= span.num_keys) return false;
  return span.sees_all() || (span.first[at.query] <= at.key && at.key < span.stop[at.query]);
}

struct Score {
  float value;       // in units of log2
  float derivative;  // of the softcap
};

// kPlain: neither softcap, bias, ALiBi nor dropout, and every row aligned to 16 bytes.
template <bool kPlain>
class Scoring {
 public:
  USP_DEVICE Scoring(const Attention<float>& a, int b, int h)
      : a_(a), b_(b), h_(h), scale_(static_cast<float>(a.softmax_scale)) {}

  USP_DEVICE const Span& span() const { return a_.span; }
  USP_DEVICE bool drops() const { return !kPlain && a_.dropout_p > 0; }

  // What is left to multiply scores with: the plain kernel folds it into the exponent.
  USP_DEVICE float remaining_scale() const { return kPlain ? scale_ * kLog2e : 1.0f; }

  USP_DEVICE Score score(float product, Pair at) const {
    if constexpr (kPlain) return {product, 1.0f};
    float x = product * scale_, derivative = 1.0f;
    if (a_.softcap > 0) {
      const float cap = static_cast<float>(a_.softcap);
      const float t = fast_tanh(x * fast_reciprocal(cap));
      x = cap * t;
      derivative = 1.0f - t * t;
    }
    if (a_.bias.data != nullptr) x += *a_.bias.at(b_, h_, at.query, at.key);
    if (a_.alibi_slopes != nullptr) x -= slope() * distance(at);
    return {x * kLog2e, derivative};
  }

  // keep / (1 - dropout_p)
  USP_DEVICE float multiplier(Pair at) const {
    if (!drops()) return 1.0f;
    const uint32_t key = static_cast<uint32_t>(a_.k_pos[at.key]);
    const uint32_t row = static_cast<uint32_t>(b_ * a_.num_heads + a_.head_offset + h_);
    const PhiloxWords words =
        philox4x32_10({{key >> 2, static_cast<uint32_t>(a_.q_pos[at.query]), row, 0u}},
                      philox_key(a_.dropout_seed));
    const uint32_t pair = key & 2, odd = key & 1;
    const uint32_t low = pair ? words.word[2] : words.word[0];
    const uint32_t high = pair ? words.word[3] : words.word[1];
    const bool kept = (odd ? high : low) >= dropout_threshold(a_.dropout_p);
    return kept ? static_cast<float>(1.0 / (1.0 - a_.dropout_p)) : 0.0f;
  }

 private:
  USP_DEVICE float slope() const {
    return a_.alibi_slopes[b_ * a_.alibi_batch_stride + h_ * a_.alibi_head_stride];
  }

  USP_DEVICE float distance(Pair at) const {
    const int64_t apart = static_cast<int64_t>(a_.q_pos[at.query]) - a_.k_pos[at.key];
    return static_cast<float>(apart < 0 ? -apart : apart);
  }

  const Attention<float>& a_;
  int b_, h_;
  float scale_;
};

// The factor that turns a plain kernel's products into exponents may be folded in only where larger
// products mean larger scores.
inline bool is_plain(const Attention<float>& a) {
  return a.softcap == 0 && a.bias.data == nullptr && a.alibi_slopes == nullptr &&
         a.dropout_p == 0 && a.softmax_scale > 0;
}

}  // namespace usp::gpu
