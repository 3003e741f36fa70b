#pragma once

// Element-wise work on score tiles (keys, queries), and the softmax along their columns.

#include <algorithm>
#include <type_traits>

#include "cpu/words.h"

namespace usp::cpu {
namespace {

template <typename T>
void softcap(Tile<T> s, T cap, T* derivative) {
  const T inverse = T(1) / cap;
  const int64_t count = s.keys * s.queries;
  for (int64_t i = 0; i < count; i += kLanes<T>) {
    const Vec<T> t = tanh<T>(load(s.data + i) * inverse);
    store<T>(s.data + i, cap * t);
    if (derivative != nullptr) store<T>(derivative + i, T(1) - t * t);
  }
}

template <typename T>
void add_bias(Tile<T> s, int64_t num_rows, const T* bias, int64_t query_stride,
              int64_t key_stride) {
  if (query_stride == 0) {
    for (int64_t j = 0; j < s.keys; ++j) {
      const T b = bias[j * key_stride];
      T* __restrict row = s.row(j);
      for (int64_t i = 0; i < s.queries; ++i) row[i] += b;
    }
    return;
  }
  // Few query rows at a time, so that the cache lines of the row-major bias are used whole.
  for (int64_t i0 = 0; i0 < num_rows; i0 += kPad) {
    const int64_t i1 = i0 + kPad < num_rows ? i0 + kPad : num_rows;
    for (int64_t j = 0; j < s.keys; ++j) {
      T* __restrict row = s.row(j);
      const T* __restrict from = bias + j * key_stride;
      for (int64_t i = i0; i < i1; ++i) row[i] += from[i * query_stride];
    }
  }
}

template <typename T>
void add_alibi(Tile<T> s, T slope, const int32_t* q_pos, const int32_t* k_pos) {
  for (int64_t j = 0; j < s.keys; ++j) {
    T* __restrict row = s.row(j);
    const int32_t key_position = k_pos[j];
    for (int64_t i = 0; i < s.queries; ++i) {
      const int32_t distance = q_pos[i] - key_position;
      row[i] -= slope * static_cast<T>(distance < 0 ? -distance : distance);
    }
  }
}

// One end of what kLanes rows see, from row i; rows past the last take its end.
template <typename T>
USP_SIMD Mask<T> ends_of(const int32_t* ends, int64_t num_rows, int64_t i) {
  int32_t lanes[kLanes<T>];
  const int64_t count = std::min(num_rows - i, kLanes<T>);
  if (count == kLanes<T>) {
    __builtin_memcpy(lanes, ends + i, sizeof(lanes));
  } else {
    for (int64_t lane = 0; lane < kLanes<T>; ++lane) {
      lanes[lane] = ends[i + std::min(lane, count - 1)];
    }
  }
  Mask<T> result{};
  for (int64_t lane = 0; lane < kLanes<T>; ++lane) result[lane] = lanes[lane];
  return result;
}

// The ends move up with the rows: what is before the last `first` or from the first `stop` on is
// hidden from some of them.
template <typename T>
void mask(Tile<T> s, TileMask m) {
  using Lane = std::remove_cvref_t<decltype(Mask<T>{}[0])>;
  const auto mask_column = [&](Range keys, int64_t i) {
    const Mask<T> first = ends_of<T>(m.first, m.num_rows, i);
    const Mask<T> stop = ends_of<T>(m.stop, m.num_rows, i);
    const auto hide = [&](int64_t begin, int64_t end) {
      for (int64_t j = begin; j < end; ++j) {
        const Mask<T> key = static_cast<Lane>(m.first_key + j) - Mask<T>{};
        T* at = s.row(j) + i;
        Vec<T> x = load(at);
        x = first > key ? broadcast<T>(minus_infinity<T>()) : x;
        x = stop <= key ? broadcast<T>(minus_infinity<T>()) : x;
        store<T>(at, x);
      }
    };
    const auto at_key = [&](int64_t key) {
      const int64_t j = key - m.first_key;
      return j < keys.begin ? keys.begin : j < keys.end ? j : keys.end;
    };
    const int64_t begin = at_key(first[kLanes<T> - 1]), end = at_key(stop[0]);
    hide(keys.begin, begin);
    hide(begin < end ? end : begin, keys.end);
  };
  s.for_each_strip([&](const Strip& strip) {
    for (int64_t i = strip.columns.begin; i < strip.columns.end && i < m.num_rows; i += kLanes<T>) {
      mask_column(strip.keys, i);
    }
  });
}

// The four words of kPad queries at one counter of key positions.
struct PhiloxRows {
  uint32_t word[4][kPad];
};

USP_SIMD void philox_rows(uint32_t key_counter, const int32_t* q_pos, uint32_t row_of_heads,
                          PhiloxKey key, PhiloxRows& rows) {
  for (int64_t i = 0; i < kPad; ++i) {
    const PhiloxWords words =
        philox4x32_10({{key_counter, static_cast<uint32_t>(q_pos[i]), row_of_heads, 0u}}, key);
    for (int w = 0; w < 4; ++w) rows.word[w][i] = words.word[w];
  }
}

// Keys share a counter, and so its four words, where their positions are neighbours.
template <typename T>
void dropout(Tile<T> m, TileDropout d) {
  const T kept = static_cast<T>(d.kept_scale);
  PhiloxRows rows;
  for (int64_t i0 = 0; i0 < m.queries; i0 += kPad) {
    for (int64_t j = 0; j < m.keys; ++j) {
      const uint32_t counter = static_cast<uint32_t>(d.k_pos[j]) >> 2;
      if (j == 0 || counter != static_cast<uint32_t>(d.k_pos[j - 1]) >> 2) {
        philox_rows(counter, d.q_pos + i0, d.row_of_heads, d.key, rows);
      }
      const uint32_t* words = rows.word[d.k_pos[j] & 3];
      T* __restrict row = m.row(j) + i0;
      for (int64_t i = 0; i < kPad; ++i) row[i] = words[i] >= d.threshold ? kept : T(0);
    }
  }
}

// The largest of `bound` and what the vector of query rows from row i holds at these keys: four at
// a time, for each waits for the one before it.
template <typename T>
USP_SIMD Vec<T> max_of_column(Tile<T> s, Range keys, Vec<T> bound, int64_t i) {
  constexpr int kChains = 4;
  Vec<T> max[kChains];
#pragma GCC unroll 4
  for (Vec<T>& chain : max) chain = bound;
  int64_t j = keys.begin;
  for (; j + kChains <= keys.end; j += kChains) {
#pragma GCC unroll 4
    for (int c = 0; c < kChains; ++c) max[c] = max_or_nan<T>(max[c], load(s.row(j + c) + i));
  }
  for (; j < keys.end; ++j) max[0] = max_or_nan<T>(max[0], load(s.row(j) + i));
  return max_or_nan<T>(max_or_nan<T>(max[2], max[3]), max_or_nan<T>(max[1], max[0]));
}

// kVectors vectors of query rows from row i, and these keys, in whole words.
template <typename Words, int kVectors, typename T>
void softmax_columns(Tile<T> s, Range keys, SoftmaxRows<T> rows, const T* multiplier, T* room,
                     int64_t i) {
  const auto at = [i](int v) { return i + v * kLanes<T>; };
  Vec<T> max[kVectors], subtracted[kVectors], sum[kVectors];  // sum of this tile alone
#pragma GCC unroll 8
  for (int v = 0; v < kVectors; ++v) max[v] = load(rows.max + at(v));
  if constexpr (kVectors == 1) {
    max[0] = max_of_column(s, keys, max[0], i);
  } else {
    for (int64_t j = keys.begin; j < keys.end; ++j) {
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) max[v] = max_or_nan<T>(max[v], load(s.row(j) + at(v)));
    }
  }
#pragma GCC unroll 8
  for (int v = 0; v < kVectors; ++v) {
    subtracted[v] = max[v] == broadcast<T>(minus_infinity<T>()) ? Vec<T>{} : max[v];
    sum[v] = Vec<T>{};
  }
  for (int64_t j = keys.begin; j < keys.end; j += 2) {
    const bool paired = j + 1 < keys.end;
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      const auto weight = [&](int64_t key) {
        return exp<T, Words::kRounds>(load(s.row(key) + at(v)) - subtracted[v]);
      };
      Vec<T> first = weight(j), second = paired ? weight(j + 1) : Vec<T>{};
      sum[v] += first + second;
      if (multiplier != nullptr) {
        first *= load(multiplier + j * s.queries + at(v));
        if (paired) second *= load(multiplier + (j + 1) * s.queries + at(v));
      }
      Words::store_by_query(s, room, j, at(v), first, second);
    }
  }
#pragma GCC unroll 8
  for (int v = 0; v < kVectors; ++v) {
    const Vec<T> factor = exp<T, Words::kRounds>(load(rows.max + at(v)) - subtracted[v]);
    store<T>(rows.sum + at(v), load(rows.sum + at(v)) * factor + sum[v]);
    store<T>(rows.factor + at(v), factor);
    store<T>(rows.max + at(v), max[v]);
  }
}

template <typename Words, typename T>
Matrix<const T> softmax_update(Tile<T> s, SoftmaxRows<T> rows, const T* multiplier, T* room) {
  s.for_each_strip([&](const Strip& strip) {
    int64_t i = strip.columns.begin;
    const auto columns = [&]<int kVectors>() {
      for (; i + kVectors * kLanes<T> <= strip.columns.end; i += kVectors * kLanes<T>) {
        softmax_columns<Words, kVectors>(s, strip.keys, rows, multiplier, room, i);
      }
    };
    columns.template operator()<4>();
    columns.template operator()<2>();
    columns.template operator()<1>();
  });
  return Words::by_query(s, room);
}

template <typename T>
void finish_rows(SoftmaxRows<T> rows, int64_t num_rows, T* lse) {
  for (int64_t i = 0; i < num_rows; i += kLanes<T>) {
    const Vec<T> sum = load(rows.sum + i), none = broadcast<T>(minus_infinity<T>());
    store<T>(lse + i, sum == Vec<T>{} ? none : load(rows.max + i) + log<T>(sum));
    store<T>(rows.factor + i, sum == Vec<T>{} ? Vec<T>{} : T(1) / sum);
  }
}

template <typename Words, typename T>
void strip_gradients(const GradientTile<T> t, const Strip strip) {
  const auto [p_room, by_key, by_query] = t.rooms;
  const auto gradient = [&](int64_t j, int64_t i) {
    const int64_t at = j * t.s.queries + i;
    Vec<T> p = exp<T, Words::kRounds>(load(t.s.data + at) - load(t.lse + i));
    Vec<T> dp = load(t.dp.data + at);
    if (t.multiplier != nullptr) dp *= load(t.multiplier + at);
    Vec<T> ds = p * (dp - load(t.delta + i));
    if (t.multiplier != nullptr) p *= load(t.multiplier + at);
    if (t.ds != nullptr) store<T>(t.ds + at, ds);
    if (t.derivative != nullptr) ds *= load(t.derivative + at);
    Words::store_by_key(t.s, p_room, j, i, p);
    Words::store_by_key(t.dp, by_key, j, i, ds);
    return ds;
  };
  for (int64_t j = strip.keys.begin; j < strip.keys.end; j += 2) {
    for (int64_t i = strip.columns.begin; i < strip.columns.end; i += kLanes<T>) {
      const Vec<T> first = gradient(j, i);
      const Vec<T> second = j + 1 < strip.keys.end ? gradient(j + 1, i) : Vec<T>{};
      if constexpr (!Words::kInPlace) Words::store_by_query(t.dp, by_query, j, i, first, second);
    }
  }
}

template <typename Words, typename T>
GradientOperands<T> gradients(const GradientTile<T> t) {
  t.s.for_each_strip([&](const Strip& strip) { strip_gradients<Words>(t, strip); });
  const auto [p_room, by_key, by_query] = t.rooms;
  return {Words::by_key(t.s, p_room), Words::by_key(t.dp, by_key), Words::by_query(t.dp, by_query)};
}

template <typename T>
void add_bias_gradient(Tile<T> ds, int64_t num_rows, T* dbias, int64_t query_stride,
                       int64_t key_stride) {
  if (query_stride == 0) {
    for (int64_t j = 0; j < ds.keys; ++j) {
      Vec<T> sums = {};
      for (int64_t i = 0; i < ds.queries; i += kLanes<T>) sums += load(ds.row(j) + i);
      T total = 0;
      for (int64_t lane = 0; lane < kLanes<T>; ++lane) total += sums[lane];
      dbias[j * key_stride] += total;
    }
    return;
  }
  for (int64_t i0 = 0; i0 < num_rows; i0 += kPad) {
    const int64_t i1 = i0 + kPad < num_rows ? i0 + kPad : num_rows;
    for (int64_t j = 0; j < ds.keys; ++j) {
      const T* __restrict row = ds.row(j);
      T* __restrict to = dbias + j * key_stride;
      for (int64_t i = i0; i < i1; ++i) to[i * query_stride] += row[i];
    }
  }
}

}  // namespace
}  // namespace usp::cpu
