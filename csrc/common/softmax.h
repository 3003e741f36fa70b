#pragma once

// The running softmax of one query row, and the rules for rows that have seen nothing.
//
// A finished state is (out, lse): out the normalised sum of values, lse the natural logarithm of
// the sum of exp(score), -inf (with out 0) for a row that has seen no key. A kernel continues from
// it with max = lse, sum = 1 and accumulator = out.
//
// Source: Milakov & Gimelshein 2018, arXiv:1805.02867.

#include <cmath>
#include <limits>

#include "common/macros.h"

namespace usp {

template <typename T>
USP_HOST_DEVICE constexpr T minus_infinity() {
  return -std::numeric_limits<T>::infinity();
}

// The value to subtract before exp: a maximum of -inf would turn -inf - -inf into NaN.
template <typename T>
USP_HOST_DEVICE T finite_max(T max) {
  return max == minus_infinity<T>() ? T(0) : max;
}

template <typename T>
struct RunningSoftmax {
  T max;
  T sum;  // of exp(score - finite_max(max))

  // The maximum may start below lse, by the logarithm of `sum`: what was accumulated grows with it.
  static USP_HOST_DEVICE RunningSoftmax from_lse(T lse, T headroom = T(0), T sum = T(1)) {
    return {lse - headroom, lse == minus_infinity<T>() ? T(0) : sum};
  }

  USP_HOST_DEVICE bool operator==(const RunningSoftmax& other) const {
    return max == other.max && sum == other.sum;
  }

  // Raises the maximum to at least `score`; returns the factor for what was accumulated so far.
  USP_HOST_DEVICE T raise(T score) {
    const T new_max = score > max ? score : max;
    const T factor = std::exp(max - finite_max(new_max));
    max = new_max;
    sum *= factor;
    return factor;
  }

  // Lets one score in; returns its weight. The caller has raised the maximum first.
  USP_HOST_DEVICE T add(T score) {
    const T weight = std::exp(score - finite_max(max));
    sum += weight;
    return weight;
  }

  USP_HOST_DEVICE T lse() const { return sum > T(0) ? max + std::log(sum) : nan_or_empty(); }

  // Factor that turns the accumulator into `out`; 0 for a row that has seen nothing.
  USP_HOST_DEVICE T normaliser() const { return sum == T(0) ? T(0) : T(1) / sum; }

 private:
  USP_HOST_DEVICE T nan_or_empty() const { return sum == T(0) ? minus_infinity<T>() : sum; }
};

// The lse to subtract in a backward pass, where p = exp(score - lse) must be 0 in empty rows.
template <typename T>
USP_HOST_DEVICE T backward_lse(T lse) {
  return lse == minus_infinity<T>() ? std::numeric_limits<T>::infinity() : lse;
}

}  // namespace usp
