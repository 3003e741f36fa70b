#pragma once

// Decays between the tokens of a chunk of linear attention, and gradients of their logs. Logs are
// only ever added up, over the tokens between two others, and never subtracted: one of -inf forgets
// what was before, and no digits are lost.

#include "cpu/kernels.h"
#include "cpu/simd.h"

namespace usp::cpu {
namespace {

// exp(x), and infinity beyond the exponent range.
template <typename T>
USP_SIMD Vec<T> exp_or_infinity(Vec<T> x) {
  constexpr T kHighest = sizeof(T) == 8 ? T(709.7) : T(88.7);
  const Vec<T> infinity = broadcast<T>(static_cast<T>(__builtin_inf()));
  return x > broadcast<T>(kHighest) ? infinity : exp<T>(x);
}

// The places of a vector's lanes from `first` on.
template <typename T>
USP_SIMD Vec<T> places(int64_t first) {
  T lanes[kLanes<T>];
  for (int64_t lane = 0; lane < kLanes<T>; ++lane) lanes[lane] = static_cast<T>(first + lane);
  return load(lanes);
}

// Where row i of a lower triangle ends, in whole kPad.
USP_SIMD int64_t end_of_row(int64_t i) { return (i / kPad + 1) * kPad; }

template <typename T>
void decays_between(const T* logs, int64_t rows, Matrix<T> m) {
  const Vec<T> zero = {}, one = broadcast<T>(T(1));
  for (int64_t j = 0; j < rows; j += kLanes<T>) {
    const Vec<T> at = places<T>(j);
    Vec<T> sum = zero;  // of the logs behind j, up to i
    for (int64_t i = j / kPad * kPad; i < rows; ++i) {
      const Vec<T> here = broadcast<T>(static_cast<T>(i));
      if (logs != nullptr) sum = at < here ? sum + logs[i] : zero;
      const Vec<T> decay = logs != nullptr ? exp_or_infinity<T>(sum) : one;
      store<T>(m.data + i * m.ld + j, at > here ? zero : decay);
    }
  }
}

template <typename T>
void decays_since_start(const T* logs, int64_t rows, T* since_start) {
  T sum = 0;
  for (int64_t i = 0; i < rows; ++i) since_start[i] = sum += logs[i];
  for (int64_t i = 0; i < rows; i += kLanes<T>) {
    store<T>(since_start + i, exp_or_infinity<T>(load(since_start + i)));
  }
}

template <typename T>
void multiply_lower(Matrix<const T> a, Matrix<const T> b, int64_t rows, Matrix<T> product) {
  for (int64_t i = 0; i < rows; ++i) {
    const T *x = a.data + i * a.ld, *y = b.data + i * b.ld;
    T* to = product.data + i * product.ld;
    for (int64_t j = 0; j < end_of_row(i); j += kLanes<T>)
      store<T>(to + j, load(x + j) * load(y + j));
  }
}

template <typename T>
void sums_across(Matrix<const T> a, Matrix<const T> b, int64_t rows, T* sums, T* room) {
  for (int64_t j = 0; j < end_of_row(rows - 1); j += kLanes<T>) store<T>(room + j, Vec<T>{});
  for (int64_t i = rows - 1; i >= 0; --i) {
    const T *x = a.data + i * a.ld, *y = b.data + i * b.ld;
    Vec<T> earlier = {};
    int64_t j = 0;
    const auto add = [&] {
      const Vec<T> sum = load(room + j) + load(x + j) * load(y + j);
      store<T>(room + j, sum);
      return sum;
    };
    for (; j + kLanes<T> <= i; j += kLanes<T>) earlier += add();
    const Vec<T> here = broadcast<T>(static_cast<T>(i));
    for (; j < end_of_row(i); j += kLanes<T>) {
      const Vec<T> sum = add();
      earlier += places<T>(j) < here ? sum : Vec<T>{};
    }
    sums[i] = sum_of_lanes<T>(earlier)[0];
  }
}

}  // namespace
}  // namespace usp::cpu
