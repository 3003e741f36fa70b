#pragma once

// Several numbers that are read or written at once.

namespace usp::gpu {

// As many as one or two vector loads take.
template <typename T, int kWidth>
struct alignas(sizeof(T) * kWidth < 16 ? sizeof(T) * kWidth : 16) Numbers {
  static constexpr int kCount = kWidth;

  T item[kWidth];
};

}  // namespace usp::gpu
