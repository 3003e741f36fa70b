#pragma once

// Rows of tensors that will be read soon, asked for a few at a time among the blocks of the
// products. A head's rows lie a whole token apart, which the hardware does not foresee, and a short
// sequence would spend much of its time waiting for them. More at once than the lines that a core
// can wait for would stop it just the same.

#include <cstdint>

namespace usp::cpu {

class Lookahead {
 public:
  void forget() { begin_ = end_ = waiting_ = 0; }

  // Rows of a result too: where they are not in the cache, a store waits for them as well.
  void add(const void* from, int64_t stride_bytes, int64_t rows, int64_t row_bytes) {
    if (rows == 0 || end_ == kRuns) return;
    waiting_ += rows;
    runs_[end_++] = {static_cast<const char*>(from), stride_bytes, rows, row_bytes};
  }

  // So many calls of `advance` will come.
  void spread(int64_t turns) {
    rows_at_once_ = turns > 0 ? (waiting_ + turns - 1) / turns : waiting_;
  }

  // Asks for the next few rows.
  void advance() {
    constexpr int64_t kCacheLine = 64;
    for (int64_t asked = 0; asked < rows_at_once_ && begin_ < end_;) {
      Run& run = runs_[begin_];
      for (int64_t at = 0; at < run.bytes; at += kCacheLine) {
        __builtin_prefetch(run.from + at, 0, 3);
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

  static constexpr int64_t kRuns = 24;  // keys, values, and tiles of queries and of results
  Run runs_[kRuns];
  int64_t begin_ = 0, end_ = 0, waiting_ = 0, rows_at_once_ = 0;  // rows that wait at first
};

}  // namespace usp::cpu
