#pragma once

// Rows of tensors that will be read soon, asked for a few at a time between the products. A head's
// rows lie a whole token apart, which the hardware does not foresee, and a short sequence would
// spend much of its time waiting for them.

#include "cpu/tiles.h"

namespace usp::cpu {

class Lookahead {
 public:
  void forget() { begin_ = end_ = 0; }

  void add(const TensorView& x, int64_t b, int64_t h, Range rows, int64_t cols) {
    if (rows.empty() || end_ == kRuns) return;
    const int64_t size = element_size(x.dtype);
    runs_[end_++] = {static_cast<const char*>(row_address(x, b, rows.begin, h)),
                     x.row_stride * size, rows.size(), cols * size};
  }

  // Asks for the next few rows.
  void advance() {
    constexpr int64_t kRowsAtOnce = 64, kCacheLine = 64;
    for (int64_t asked = 0; asked < kRowsAtOnce && begin_ < end_;) {
      Run& run = runs_[begin_];
      for (int64_t at = 0; at < run.bytes; at += kCacheLine) {
        __builtin_prefetch(run.from + at, 0, 2);  // to read, into the second level
      }
      run.from += run.stride;
      ++asked;
      if (--run.rows == 0) ++begin_;
    }
  }

 private:
  struct Run {
    const char* from;
    int64_t stride, rows, bytes;  // stride in bytes
  };

  static constexpr int64_t kRuns = 2 + kTilesHeld;  // keys, values, tiles of queries
  Run runs_[kRuns];
  int64_t begin_ = 0, end_ = 0;
};

}  // namespace usp::cpu
