#pragma once

// A decay a channel between the tokens of a chunk of linear attention, which comes in two halves of
// at most kPad tokens. Logs are only ever added up, and factors multiplied, over the tokens between
// two others: neither is ever taken back, so nothing overflows where no factor is above 1.

#include "cpu/decays.h"
#include "cpu/kernels.h"
#include "cpu/simd.h"

namespace usp::cpu {
namespace {

template <typename T>
void channel_decays(int64_t rows, int64_t cols, ChannelFactors<T> to) {
  const int64_t middle = rows < kPad ? rows : kPad;
  for (int64_t d = 0; d < cols; d += kLanes<T>) {
    const auto log = [&](int64_t i) { return load(to.each.data + i * to.each.ld + d); };
    const auto put = [&](Matrix<T> m, int64_t i, Vec<T> x) { store<T>(m.data + i * m.ld + d, x); };
    Vec<T> sum = {}, first = broadcast<T>(T(1)), last = first;  // of all of a half
    for (int64_t i = 0; i < middle; ++i) {
      put(to.since_start, i, first = exp_or_infinity<T>(sum += log(i)));
    }
    sum = Vec<T>{};
    for (int64_t i = middle; i < rows; ++i) {
      put(to.since_middle, i - middle, last = exp_or_infinity<T>(sum += log(i)));
      put(to.since_start, i, first * last);
    }
    sum = Vec<T>{};
    for (int64_t i = rows - 1; i >= middle; --i) {
      put(to.to_end, i, exp_or_infinity<T>(sum));
      sum += log(i);
    }
    sum = Vec<T>{};
    for (int64_t i = middle - 1; i >= 0; --i) {
      const Vec<T> decay = exp_or_infinity<T>(sum);
      put(to.to_middle, i, decay);
      put(to.to_end, i, decay * last);
      sum += log(i);
    }
    for (int64_t i = 0; i < rows; ++i) put(to.each, i, exp_or_infinity<T>(log(i)));
  }
}

// Lane i of the result is the sum over the lanes of vector i.
template <typename T, int kStep = kLanes<T> / 2>
USP_SIMD Vec<T> sums_of_each(Vec<T>* vectors) {
  if constexpr (kStep == 0) {
    return vectors[0];
  } else {
#pragma GCC unroll 8
    for (int i = 0; i < kStep; ++i) {
      const Vec<T> a = vectors[i], b = vectors[i + kStep];
      vectors[i] = half_groups<kStep, false, T>(a, b) + half_groups<kStep, true, T>(a, b);
    }
    return sums_of_each<T, kStep / 2>(vectors);
  }
}

template <typename T>
void channel_scores(int64_t rows, int64_t cols, Matrix<const T> q, Matrix<const T> k,
                    Matrix<const T> factors, Matrix<T> scores) {
  for (int64_t i = 0; i < rows; ++i) {
    Vec<T> sums[kPad] = {};
    for (int64_t d = 0; d < cols; d += kLanes<T>) {
      Vec<T> decayed = load(q.data + i * q.ld + d);
      for (int64_t j = i; j >= 0; --j) {
        sums[j] += decayed * load(k.data + j * k.ld + d);
        decayed *= load(factors.data + j * factors.ld + d);
      }
    }
    for (int64_t j = 0; j < kPad; j += kLanes<T>) {
      store<T>(scores.data + i * scores.ld + j, sums_of_each<T>(sums + j));
    }
  }
}

template <bool kDecays, typename T>
void channel_gradients_of(int64_t rows, int64_t cols, Matrix<const T> dscores,
                          ChannelGradients<T> at) {
  for (int64_t d = 0; d < cols; d += kLanes<T>) {
    for (int64_t i = 0; i < rows; ++i) {
      Vec<T> decays[kPad];  // behind each token, up to this one
      decays[i] = broadcast<T>(T(1));
      for (int64_t j = i; j > 0; --j) {
        decays[j - 1] = decays[j] * load(at.factors.data + j * at.factors.ld + d);
      }
      const Vec<T> q = load(at.q.data + i * at.q.ld + d);
      Vec<T> dq = load(at.dq.data + i * at.dq.ld + d), passed = {};
      for (int64_t j = 0; j <= i; ++j) {
        const Vec<T> k = load(at.k.data + j * at.k.ld + d);
        const Vec<T> weight = dscores.data[i * dscores.ld + j] * decays[j];
        T* dk = at.dk.data + j * at.dk.ld + d;
        dq += weight * k;
        store<T>(dk, load(dk) + weight * q);
        if constexpr (kDecays) {
          if (j == i) break;
          passed += weight * (q * k);  // not of a product above, which would be rounded elsewhere
          T* dg = at.dg.data + (j + 1) * at.dg.ld + d;
          store<T>(dg, load(dg) + passed);
        }
      }
      store<T>(at.dq.data + i * at.dq.ld + d, dq);
    }
  }
}

template <typename T>
void channel_gradients(int64_t rows, int64_t cols, Matrix<const T> dscores,
                       ChannelGradients<T> at) {
  if (at.dg.data == nullptr) return channel_gradients_of<false, T>(rows, cols, dscores, at);
  channel_gradients_of<true, T>(rows, cols, dscores, at);
}

template <typename T>
void multiply(Matrix<const T> a, Matrix<const T> b, int64_t rows, int64_t cols, Matrix<T> product) {
  for (int64_t i = 0; i < rows; ++i) {
    const T *x = a.data + i * a.ld, *y = b.data + i * b.ld;
    T* to = product.data + i * product.ld;
    for (int64_t d = 0; d < cols; d += kLanes<T>) store<T>(to + d, load(x + d) * load(y + d));
  }
}

template <typename T>
void sum_products(Matrix<const T> a, Matrix<const T> b, int64_t rows, int64_t cols, T* sums) {
  for (int64_t d = 0; d < cols; d += kLanes<T>) {
    Vec<T> sum = {};
    for (int64_t i = 0; i < rows; ++i) {
      sum += load(a.data + i * a.ld + d) * load(b.data + i * b.ld + d);
    }
    store<T>(sums + d, sum);
  }
}

template <typename T>
void add_products_behind(Matrix<const T> a, Matrix<const T> b, int64_t rows, int64_t cols,
                         Matrix<T> sums) {
  for (int64_t d = 0; d < cols; d += kLanes<T>) {
    Vec<T> sum = {};
    for (int64_t i = rows - 1; i >= 0; --i) {
      sum += load(a.data + i * a.ld + d) * load(b.data + i * b.ld + d);
      T* to = sums.data + i * sums.ld + d;
      store<T>(to, load(to) + sum);
    }
  }
}

template <typename T>
void add_products_before(Matrix<const T> a, Matrix<const T> b, int64_t rows, int64_t cols,
                         Matrix<T> sums) {
  for (int64_t d = 0; d < cols; d += kLanes<T>) {
    Vec<T> sum = {};
    for (int64_t i = 0; i < rows; ++i) {
      T* to = sums.data + i * sums.ld + d;
      store<T>(to, load(to) + sum);
      sum += load(a.data + i * a.ld + d) * load(b.data + i * b.ld + d);
    }
  }
}

}  // namespace
}  // namespace usp::cpu
