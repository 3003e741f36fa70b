#pragma once

// Tiles in shared memory that the TMA fills and wgmma reads, and how producer and consumers hand
// them to each other.
//
//   producer   waits for empty[s], starts the copies of step i into stage s = i % kStages
//   full[s]    ends its phase when their bytes have come
//   consumers  wait for full[s], multiply, and each warp arrives at empty[s] when it is through

#include "../blocks.h"
#include "tensor_map.h"
#include "wgmma.h"

namespace usp::gpu::hopper {

inline constexpr int kConsumers = 2;  // warpgroups, each with 64 of a block's own rows
inline constexpr int kOwnRows = kConsumers * 64;
inline constexpr int kThreads = (1 + kConsumers) * kGroup;
inline constexpr int kConsumerWaves = kConsumers * 4;
// 65536 registers a block: ptxas gives every thread the same number, and these hand them on.
inline constexpr int kProducerRegisters = 24, kConsumerRegisters = 240;
inline constexpr int kSharedLimit = 227 * 1024;
inline constexpr int kSharedAlign = 1024;  // of a swizzled tile

// kRows rows of kDim numbers: panels of 64 columns, in each the rows of 128 bytes one behind the
// other.
template <typename T, int kRows, int kDim>
struct Tile {
  static constexpr int kPanels = kDim / kBoxColumns;
  static constexpr int kPanelBytes = kRows * 128;
  static constexpr int kBytes = kPanels * kPanelBytes;
  static constexpr int kGroupBytes = 8 * 128;  // eight rows

  char* data;

  // Starts the copy of rows from `row` on.
  USP_DEVICE void load(const TensorMap& map, Barrier& barrier, int row, int head, int batch) const {
    USP_UNROLL
    for (int p = 0; p < kPanels; ++p) {
      load_box(data + p * kPanelBytes, map, barrier, {p * kBoxColumns, row, head, batch});
    }
  }

  // Rows from `row` (a multiple of 8) on, and columns 16 k to 16 k + 15, summed over columns.
  USP_HOST_DEVICE static constexpr uint64_t over_columns(uint32_t address, int k, int row) {
    const uint64_t tile = descriptor::make(address + row * 128, 16, kGroupBytes);
    return descriptor::advance(tile, k / 4 * kPanelBytes + k % 4 * 32);
  }

  // Rows 16 k to 16 k + 15 and all columns, summed over rows.
  USP_HOST_DEVICE static constexpr uint64_t over_rows(uint32_t address, int k) {
    const uint64_t tile = descriptor::make(address, kPanelBytes, kGroupBytes);
    return descriptor::advance(tile, k * 2 * kGroupBytes);
  }

  USP_DEVICE uint64_t over_columns(int k, int row = 0) const {
    return over_columns(shared_address(data), k, row);
  }

  USP_DEVICE uint64_t over_rows(int k) const { return over_rows(shared_address(data), k); }
};

// sums = left right^T, `left` from row `first_row` on. Runs on.
template <typename T, int kLeftRows, int kRightRows, int kDim>
USP_DEVICE void multiply_transposed(Product<kRightRows>& sums, const Tile<T, kLeftRows, kDim>& left,
                                    int first_row, const Tile<T, kRightRows, kDim>& right) {
  multiply_16<T, false>(sums, left.over_columns(0, first_row), right.over_columns(0));
  USP_UNROLL
  for (int k = 1; k < kDim / 16; ++k) {
    multiply_16<T, true>(sums, left.over_columns(k, first_row), right.over_columns(k));
  }
}

// sums += left right. Runs on.
template <typename T, int kRows, int kDim>
USP_DEVICE void multiply_accumulate(Product<kDim>& sums, const LeftOperand<T, kRows>& left,
                                    const Tile<T, kRows, kDim>& right) {
  USP_UNROLL
  for (int k = 0; k < kRows / 16; ++k) {
    multiply_16<T>(sums, left.packed[k], right.over_rows(k));
  }
}

// What a block of queries walks over: the steps over keys in which some of its rows see a key.
// Every wave finds the same ones.
template <int kKeys>
struct KeyWalk {
  const Walk& walk;
  const SeenSteps& seen;

  USP_DEVICE int first() const { return next(-1); }
  USP_DEVICE int next(int step) const { return seen.next(step); }
  USP_DEVICE bool has(int step) const { return step < walk.count; }
  USP_DEVICE bool is_empty() const { return !has(first()); }
  USP_DEVICE Rows rows(int step) const { return walk.step(step, kKeys); }
  // Where a step's box begins. The last one ends with the last key that is seen: what lies behind
  // may be NaN, and so is its product with a weight of zero. A row before the first is zeros.
  USP_DEVICE int first_row(int step) const { return rows(step).end - kKeys; }
  USP_DEVICE bool is_masked(int step) const { return walk.is_masked(step); }
};

// Stages of a tile, or of tiles that come together. Its `step` counts what passes through it.
template <int kStages>
struct Ring {
  Barrier full[kStages], empty[kStages];

  // `fillers` arrivals fill a stage.
  USP_DEVICE void init(int fillers) {
    for (int s = 0; s < kStages; ++s) {
      full[s].init(fillers);
      empty[s].init(kConsumerWaves);
    }
  }

  USP_DEVICE static uint32_t stage(uint32_t step) { return step % kStages; }
  USP_DEVICE static uint32_t parity(uint32_t step) { return step / kStages % 2; }

  // Producer: the stage is free. The first round finds it so.
  USP_DEVICE void wait_empty(int step) { empty[stage(step)].wait(parity(step) ^ 1); }

  USP_DEVICE void wait_full(int step) { full[stage(step)].wait(parity(step)); }

  // Consumers: this wave is through with the stage. All its lanes come here.
  USP_DEVICE void release(int step) {
    if (lane() == 0) empty[stage(step)].arrive();
  }
};

// The dynamic shared memory from its first multiple of kSharedAlign on.
USP_DEVICE char* aligned_shared_memory() {
  char* base = shared_memory();
  return base + (kSharedAlign - shared_address(base) % kSharedAlign) % kSharedAlign;
}

// Bytes to ask for: `used` behind the alignment.
constexpr int shared_bytes(int used) { return used + kSharedAlign; }

// Which of the block's own rows belong to a wave of a consumer.
struct OwnRows {
  int of_group, of_wave;  // first row

  USP_DEVICE static OwnRows of(int wave) {
    const int row = (wave - 4) * 16;
    return {row / 64 * 64, row};
  }
};

}  // namespace usp::gpu::hopper
