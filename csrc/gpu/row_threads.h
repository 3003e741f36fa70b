#pragma once

// For kernels that read every row of a tensor once: a row is taken by 1 to 32 neighbouring threads,
// each with 16 bytes at a time; the rows of a block are neighbours in memory.

#include "gpu/gpu.h"
#include "gpu/numbers.h"

namespace usp::gpu {

inline constexpr int kRowThreads = 256;  // of a block
inline constexpr int kMaxThreadsPerRow = 32;

// A row (b, l, h) of B * L * H, and which of its threads this one is.
struct ThreadsRow {
  int64_t b, l, h;
  int thread;
  bool exists;  // else the last row that does

  USP_DEVICE static ThreadsRow of(int per_row, int64_t B, int64_t L, int64_t H) {
    const int index = static_cast<int>(thread_index());
    const int64_t last = B * L * H - 1;
    const int64_t row = block_index() * int64_t{kRowThreads / per_row} + index / per_row;
    ThreadsRow found{0, 0, 0, index % per_row, row <= last};
    found.place(found.exists ? row : last, L, H);
    return found;
  }

 private:
  USP_DEVICE void place(int64_t row, int64_t L, int64_t H) {
    if (row <= 0xFFFFFFFF) {  // 32-bit division takes a fifth of the time
      const auto small = static_cast<uint32_t>(row);
      const auto bl = small / static_cast<uint32_t>(H);
      b = bl / static_cast<uint32_t>(L);
      l = bl % static_cast<uint32_t>(L);
      h = small % static_cast<uint32_t>(H);
    } else {
      b = row / H / L;
      l = row / H % L;
      h = row % H;
    }
  }
};

// Starts `kernel(arguments, threads per row)` for all rows of `size` numbers, kWidth at a time.
template <int kWidth, typename Arguments>
const char* launch_rows(void (*kernel)(Arguments, int), const Arguments& arguments, int64_t rows,
                        int64_t size, Stream stream) {
  int per_row = 1;
  while (per_row < kMaxThreadsPerRow && per_row * kWidth < size) per_row *= 2;
  const int64_t rows_per_block = kRowThreads / per_row;
  const int64_t blocks = (rows + rows_per_block - 1) / rows_per_block;
  if (blocks > 0x7FFFFFFF) return "more rows than one launch takes";
  launch(kernel, static_cast<uint32_t>(blocks), kRowThreads, 0, stream, arguments, per_row);
  return last_error();
}

}  // namespace usp::gpu
