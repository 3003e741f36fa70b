#pragma once

// Element-wise work on score tiles (keys, queries), and the softmax along their columns.

#include "words.h"

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

// The rows that see a key are an interval whose ends move up with the key.
template <typename T>
void mask(Tile<T> s, TileMask m) {
  int64_t begin = 0, end = 0;
  for (int64_t j = 0; j < s.keys; ++j) {
    const int64_t key = m.first_key + j;
    while (begin < m.num_rows && m.stop[begin] <= key) ++begin;
    while (end < m.num_rows && m.first[end] <= key) ++end;
    T* __restrict row = s.row(j);
    for (int64_t i = 0; i < begin; ++i) row[i] = minus_infinity<T>();
    for (int64_t i = end; i < s.queries; ++i) row[i] = minus_infinity<T>();
  }
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

template <typename Words, typename T>
Matrix<const T> softmax_update(Tile<T> s, SoftmaxRows<T> rows, const T* multiplier, T* room) {
  for (int64_t i = 0; i < s.queries; i += kLanes<T>) {
    const Vec<T> old_max = load(rows.max + i);
    Vec<T> new_max = old_max;
    for (int64_t j = 0; j < s.keys; ++j) new_max = max_or_nan<T>(new_max, load(s.row(j) + i));
    const Vec<T> empty = broadcast<T>(minus_infinity<T>());
    const Vec<T> subtracted = new_max == empty ? Vec<T>{} : new_max;
    const auto exp_below = [&](Vec<T> x) { return exp<T, Words::kRounds>(x - subtracted); };
    Vec<T> tile_sum = {};
    for (int64_t j = 0; j < s.keys; j += 2) {
      Vec<T> first = exp_below(load(s.row(j) + i)), second = {};
      if (j + 1 < s.keys) second = exp_below(load(s.row(j + 1) + i));
      tile_sum += first + second;
      if (multiplier != nullptr) {
        first *= load(multiplier + j * s.queries + i);
        if (j + 1 < s.keys) second *= load(multiplier + (j + 1) * s.queries + i);
      }
      Words::store_by_query(s, room, j, i, first, second);
    }
    const Vec<T> shrink = exp_below(old_max);
    store<T>(rows.factor + i, shrink);
    store<T>(rows.sum + i, load(rows.sum + i) * shrink + tile_sum);
    store<T>(rows.max + i, new_max);
  }
  return Words::written_by_query(s, room);
}

template <typename Words, typename T>
void probabilities(Tile<T> s, const T* lse) {
  for (int64_t j = 0; j < s.keys; ++j) {
    for (int64_t i = 0; i < s.queries; i += kLanes<T>) {
      store<T>(s.row(j) + i, exp<T, Words::kRounds>(load(s.row(j) + i) - load(lse + i)));
    }
  }
}

template <typename T>
void score_gradient(Tile<T> dp, const T* p, const T* delta) {
  for (int64_t j = 0; j < dp.keys; ++j) {
    T* __restrict row = dp.row(j);
    const T* __restrict weight = p + j * dp.queries;
    for (int64_t i = 0; i < dp.queries; ++i) row[i] = weight[i] * (row[i] - delta[i]);
  }
}

template <typename T>
void multiply(Tile<T> x, const T* __restrict y) {
  T* __restrict data = x.data;
  const int64_t count = x.keys * x.queries;
  for (int64_t i = 0; i < count; ++i) data[i] *= y[i];
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
