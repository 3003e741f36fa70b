#pragma once

// The few rows in front that see all keys where others see few, as registers and a class token do
// under a window: riders. They would read all keys and values once more. Instead they ride along
// with each share of the other rows, and see a run of the keys, about those that it reads anyway.
// What they gathered with each is merged at the end, in the order of the shares.

#include <algorithm>
#include <memory>

#include "common/softmax.h"
#include "cpu/shares.h"

namespace usp::cpu {

// Which keys the riders of a share see: a run of them, with the band in which its other rows see
// most, so that they meet the same tiles of keys.
template <typename T>
class Ride {
 public:
  void set(const Attention<T>& a, Range keys, Range others) {
    std::fill_n(begin_, kMostRiders, static_cast<int32_t>(keys.begin));
    std::fill_n(end_, kMostRiders, static_cast<int32_t>(keys.end));
    const auto width = [&](int64_t band) { return visible_keys(a.band(band), others).size(); };
    band_ = 0;
    for (int64_t band = 1; band < a.num_bands; ++band) {
      if (width(band) > width(band_)) band_ = band;
    }
  }

  Span span(const Attention<T>& a, int64_t riders, int64_t band) const {
    return {begin_, band == band_ ? end_ : begin_, riders, a.Lk};
  }

 private:
  int32_t begin_[kMostRiders], end_[kMostRiders];
  int64_t band_ = 0;
};

// What the rows gathered with each share.
template <typename T>
class RiderParts {
 public:
  RiderParts(const Attention<T>& a, const Shares<T>& shares)
      : a_(a),
        shares_(shares),
        size_(shares.riders() * (2 + a.Dv)),
        parts_(new T[static_cast<size_t>(shares.count() * size_)]) {}

  // (rows,), (rows,) and (rows, Dv), not normalised.
  T* max(int64_t task) const { return parts_.get() + task * size_; }
  T* sum(int64_t task) const { return max(task) + shares_.riders(); }
  T* out(int64_t task) const { return sum(task) + shares_.riders(); }

  // Merges all shares into one of each head; visit(b, h, task) then stores what is that task's.
  template <typename Visit>
  void merge(const Visit& visit) const {
    std::vector<int64_t> merged(static_cast<size_t>(a_.B * a_.H), -1);
    for (int64_t task = 0; task < shares_.count(); ++task) {
      int64_t& into = merged[static_cast<size_t>(shares_[task].b * a_.H + shares_[task].g)];
      if (into < 0) {
        into = task;
      } else {
        add(task, into);
      }
    }
    for (int64_t i = 0; i < a_.B * a_.H; ++i) visit(i / a_.H, i % a_.H, merged[i]);
  }

 private:
  void add(int64_t from, int64_t into) const {
    for (int64_t i = 0; i < shares_.riders(); ++i) {
      RunningSoftmax<T> softmax{max(into)[i], sum(into)[i]}, more{max(from)[i], sum(from)[i]};
      const T factor = softmax.raise(more.max), more_factor = more.raise(softmax.max);
      max(into)[i] = softmax.max;
      sum(into)[i] = softmax.sum + more.sum;
      T* __restrict to = out(into) + i * a_.Dv;
      const T* __restrict row = out(from) + i * a_.Dv;
      for (int64_t d = 0; d < a_.Dv; ++d) to[d] = factor * to[d] + more_factor * row[d];
    }
  }

  const Attention<T>& a_;
  const Shares<T>& shares_;
  const int64_t size_;
  const std::unique_ptr<T[]> parts_;
};

}  // namespace usp::cpu
