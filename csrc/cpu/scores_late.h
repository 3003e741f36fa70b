#pragma once

// Scores that matrix tiles have made, for AVX-512 with BF16.
//
// Tiles are stored as they are, so scores come unscaled: the scale is a factor of the exponent, in
// base 2, where it costs nothing. What is not products of tiles is most of the time of this level;
// so an exponential is eight instructions.

#include "cpu/pairs.h"
#include "cpu/scores.h"
#include "cpu/tile_products.h"
#include "cpu/tiles.h"

namespace usp::cpu {
namespace {

// Operands are half as large as their room.
inline constexpr int64_t kHalfRoom = kKeyTile * kQueryTile / 2;

inline constexpr float kLog2OfE = 1.44269504f;

// 2^t to 2^-17, exact where t is whole: 0 below the normal range, NaN stays NaN. 2^r for the rest r
// in [0, 1) is the minimax polynomial of the relative error, 2^-18.4, with 2^0 exact.
USP_SIMD Vec<float> exp2(Vec<float> t) {
  constexpr float kCoefficients[] = {1.0f, 0.69304472f, 0.24128064f, 0.05224205f, 0.01342681f};
  constexpr int kRestOfFloor = _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC;
  const auto r = (Vec<float>)_mm512_maskz_reduce_ps(0xFFFF, (__m512)t, kRestOfFloor);
  Vec<float> power = broadcast<float>(kCoefficients[4]);
#pragma GCC unroll 4
  for (int k = 3; k >= 0; --k) power = power * r + kCoefficients[k];
  const __mmask16 normal = _mm512_cmp_ps_mask((__m512)t, _mm512_set1_ps(-126), _CMP_NLT_UQ);
  return (Vec<float>)_mm512_maskz_scalef_ps(normal, (__m512)power, (__m512)t);
}

// Lane by lane the lower half of `low` and the upper one of `high`.
USP_SIMD Vec<float> words_of(Mask<float> low, Mask<float> high) {
  return (Vec<float>)_mm512_mask_blend_epi16(0xAAAAAAAA, (__m512i)low, (__m512i)high);
}

// Lane by lane a word of two bf16. Ties go away from zero: to even would cost half as much again.
USP_SIMD Vec<float> rounded_words(Vec<float> first, Vec<float> second) {
  constexpr int32_t kHalf = 0x8000;
  return words_of(((Mask<float>)first + kHalf) >> 16, (Mask<float>)second + kHalf);
}

// The largest scores of kVectors vectors of query rows from row i, in two chains each.
template <int kVectors>
USP_SIMD void largest_of_columns(Tile<float> s, Range keys, int64_t i,
                                 Vec<float> (&largest)[kVectors]) {
  Vec<float> other[kVectors];
#pragma GCC unroll 4
  for (int v = 0; v < kVectors; ++v) largest[v] = other[v] = broadcast(minus_infinity<float>());
  int64_t j = keys.begin;
  for (; j + 1 < keys.end; j += 2) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      const float* at = s.row(j) + i + v * kLanes<float>;
      largest[v] = max_or_nan<float>(largest[v], load(at));
      other[v] = max_or_nan<float>(other[v], load(at + s.queries));
    }
  }
#pragma GCC unroll 4
  for (int v = 0; v < kVectors; ++v) {
    if (j < keys.end) {
      largest[v] = max_or_nan<float>(largest[v], load(s.row(j) + i + v * kLanes<float>));
    }
    largest[v] = max_or_nan<float>(largest[v], other[v]);
  }
}

// As softmax_columns (scores.h).
template <bool kDrops, int kVectors, typename Tiles>
void softmax_columns_late(Tile<float> s, Range keys, SoftmaxRows<float> rows,
                          const float* multiplier, float* room, int64_t i, Spread<Tiles>& spread) {
  const auto at = [i](int v) { return i + v * kLanes<float>; };
  const Vec<float> exponent = broadcast(s.scale * kLog2OfE), zero{};
  Vec<float> max[kVectors], subtracted[kVectors], sum[kVectors];
  if constexpr (kVectors == 1) {
    max[0] = max_of_column(s, keys, broadcast(minus_infinity<float>()), i);
  } else {
    largest_of_columns(s, keys, i, max);
  }
#pragma GCC unroll 4
  for (int v = 0; v < kVectors; ++v) {
    max[v] = max_or_nan<float>(load(rows.max + at(v)), s.scale * max[v]);
    const Vec<float> finite = max[v] == broadcast(minus_infinity<float>()) ? zero : max[v];
    const Vec<float> factor = exp<float, true>(load(rows.max + at(v)) - finite);
    store<float>(rows.factor + at(v), factor);
    store<float>(rows.max + at(v), max[v]);
    subtracted[v] = finite * kLog2OfE;
    sum[v] = zero;
  }
  for (int64_t j = keys.begin; j < keys.end; j += 2) {
    spread.turn();
    const bool paired = j + 1 < keys.end;
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      const float* score = s.row(j) + at(v);
      Vec<float> first = exp2(load(score) * exponent - subtracted[v]), second{};
      if (paired) second = exp2(load(score + s.queries) * exponent - subtracted[v]);
      sum[v] += first + second;
      if constexpr (kDrops) {
        const float* kept = multiplier + j * s.queries + at(v);
        first *= load(kept);
        if (paired) second *= load(kept + s.queries);
      }
      store<float>(room + j / 2 * s.queries + at(v), rounded_words(first, second));
    }
  }
#pragma GCC unroll 4
  for (int v = 0; v < kVectors; ++v) {
    const Vec<float> past = load(rows.sum + at(v)) * load(rows.factor + at(v));
    store<float>(rows.sum + at(v), past + sum[v]);
  }
}

// How many pairs of keys the columns of a tile take, `at_once` vectors of them together.
inline int64_t turns(Tile<float> s, int64_t at_once) {
  return (s.keys + 1) / 2 * ((s.queries + at_once * kLanes<float> - 1) / (at_once * kLanes<float>));
}

template <typename Tiles>
Matrix<const float> softmax_update_late(Tile<float> s, SoftmaxRows<float> rows,
                                        const float* multiplier, float* room) {
  Later<Tiles>& later = Later<Tiles>::of_thread();
  Spread<Tiles> spread(later, turns(s, 4));
  room += later.other_half() * kHalfRoom;
  s.for_each_strip([&](const Strip& strip) {
    int64_t i = strip.columns.begin;
    const auto columns = [&]<int kVectors>() {
      const auto update = multiplier == nullptr ? softmax_columns_late<false, kVectors, Tiles>
                                                : softmax_columns_late<true, kVectors, Tiles>;
      for (; i + kVectors * kLanes<float> <= strip.columns.end; i += kVectors * kLanes<float>) {
        update(s, strip.keys, rows, multiplier, room, i, spread);
      }
    };
    columns.template operator()<4>();
    columns.template operator()<2>();
    columns.template operator()<1>();
  });
  later.finish();
  return PairWords::by_query(s, room);
}

// A row's bf16 of kVectors vectors, one behind the other.
template <int kVectors>
USP_SIMD void store_halves(const Vec<float> (&x)[kVectors], float* to) {
  if constexpr (kVectors == 2) {
    store<float>(to, (Vec<float>)_mm512_cvtne2ps_pbh((__m512)x[1], (__m512)x[0]));
  } else {
    const Halves halves = rounded(x[0]);
    __builtin_memcpy(to, &halves, sizeof(halves));
  }
}

// kVectors vectors of query rows from row i. kPlain: no dropout and softcap, and `ds` not wanted.
template <bool kPlain, int kVectors, typename Tiles>
void gradient_columns_late(const GradientTile<float>& t, Range keys, int64_t i,
                           Spread<Tiles>& spread) {
  const auto [p_room, by_key, by_query] = t.rooms;
  const Vec<float> exponent = broadcast(t.s.scale * kLog2OfE);
  Vec<float> lse[kVectors], delta[kVectors], p[kVectors], ds[2][kVectors];
#pragma GCC unroll 2
  for (int v = 0; v < kVectors; ++v) {
    lse[v] = load(t.lse + i + v * kLanes<float>) * kLog2OfE;
    delta[v] = load(t.delta + i + v * kLanes<float>);
  }
  const auto gradients_of = [&](int64_t j, Vec<float>(&ds)[kVectors]) {
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) {
      const int64_t at = j * t.s.queries + i + v * kLanes<float>;
      p[v] = exp2(load(t.s.data + at) * exponent - lse[v]);
      Vec<float> dp = load(t.dp.data + at);
      if (!kPlain && t.multiplier != nullptr) dp *= load(t.multiplier + at);
      ds[v] = p[v] * (dp - delta[v]);
      if (!kPlain && t.multiplier != nullptr) p[v] *= load(t.multiplier + at);
      if (!kPlain && t.ds != nullptr) store<float>(t.ds + at, ds[v]);
      if (!kPlain && t.derivative != nullptr) ds[v] *= load(t.derivative + at);
    }
    store_halves(p, p_room + (j * t.s.queries + i) / 2);
    store_halves(ds, by_key + (j * t.s.queries + i) / 2);
  };
  for (int64_t j = keys.begin; j < keys.end; j += 2) {
    spread.turn();
    gradients_of(j, ds[0]);
    if (j + 1 < keys.end) {
      gradients_of(j + 1, ds[1]);
    } else {
      for (Vec<float>& none : ds[1]) none = Vec<float>{};
    }
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) {
      store<float>(by_query + j / 2 * t.s.queries + i + v * kLanes<float>,
                   rounded_words(ds[0][v], ds[1][v]));
    }
  }
}

template <typename Tiles>
GradientOperands<float> gradients_late(GradientTile<float> t) {
  Later<Tiles>& later = Later<Tiles>::of_thread();
  Spread<Tiles> spread(later, turns(t.s, 2));
  const int64_t half = later.other_half();
  for (float*& room : t.rooms) room += half * kHalfRoom;
  const bool plain = t.multiplier == nullptr && t.derivative == nullptr && t.ds == nullptr;
  t.s.for_each_strip([&](const Strip& strip) {
    int64_t i = strip.columns.begin;
    const auto columns = [&]<int kVectors>() {
      const auto gradients = plain ? gradient_columns_late<true, kVectors, Tiles>
                                   : gradient_columns_late<false, kVectors, Tiles>;
      for (; i + kVectors * kLanes<float> <= strip.columns.end; i += kVectors * kLanes<float>) {
        gradients(t, strip.keys, i, spread);
      }
    };
    columns.template operator()<2>();
    columns.template operator()<1>();
  });
  later.finish();
  return {PairWords::by_key(t.s, t.rooms[0]), PairWords::by_key(t.dp, t.rooms[1]),
          PairWords::by_query(t.dp, t.rooms[2])};
}

// 16 vectors of every second row from row i, 32 columns each: lane by lane two columns, zeros where
// nothing is there. Then each vector is two columns, lane by lane a row.
USP_SIMD void load_columns(const uint16_t* src, int64_t src_stride, int64_t i, int64_t rows,
                           __mmask32 cols, Vec<float> (&columns)[kLanes<float>]) {
#pragma GCC unroll 16
  for (int64_t w = 0; w < kLanes<float>; ++w) {
    const int64_t row = i + 2 * w;
    const uint16_t* from = row < rows ? src + row * src_stride : kNoRow;
    columns[w] = (Vec<float>)_mm512_maskz_loadu_epi16(cols, from);
  }
  transpose<float>(columns);
}

// Rows as the transposed operand of weights: words of two rows along a row of dst, which has one
// for each column, with zeros up to whole tiles.
template <typename Tiles>
void weighted_columns(DType, const void* src, int64_t src_stride, int64_t rows, int64_t cols,
                      Matrix<float> dst) {
  Later<Tiles>::of_thread().finish();  // what waits may read what was there
  constexpr int64_t kWords = kLanes<float>;
  for (int64_t d = 0; d < cols; d += 2 * kWords) {
    const auto* halves = static_cast<const uint16_t*>(src) + d;
    const int64_t there = cols - d, stored = (there + kPad - 1) / kPad * kPad;
    const auto some = static_cast<__mmask32>(there >= 2 * kWords ? -1 : (1 << there) - 1);
    for (int64_t i = 0; i < rows; i += 2 * kWords) {
      Vec<float> even[kWords], odd[kWords];
      load_columns(halves, src_stride, i, rows, some, even);
      load_columns(halves, src_stride, i + 1, rows, some, odd);
#pragma GCC unroll 16
      for (int64_t w = 0; w < kWords; ++w) {
        if (2 * w >= stored) break;
        const auto low = (Mask<float>)even[w], high = (Mask<float>)odd[w];
        float* to = dst.data + (d + 2 * w) * dst.ld + i / 2;
        store<float>(to, words_of(low, high << 16));
        store<float>(to + dst.ld, words_of(low >> 16, high));
      }
    }
  }
}

}  // namespace
}  // namespace usp::cpu
