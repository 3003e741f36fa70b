#pragma once

// Tile sizes of every kernel, by padded head dim and target: the one table.
//
// Bounds: 99 KiB of shared memory (sm_86, sm_89) and 255 registers a thread on NVIDIA, 64 KiB of
// LDS on AMD.

#include "gpu.h"
#include "mma.h"

namespace usp::gpu {

// Shared memory of one block: 99 KiB on sm_86 and sm_89, more elsewhere; LDS on AMD.
inline constexpr int kSharedLimit = (kWarps ? 99 : 64) * 1024;

// A block owns `rows` rows, 16 * strips of them in each wave, and walks over `columns` at a time:
// forward and dQ own queries and walk over keys, dK/dV owns keys and walks over queries.
struct Tiles {
  int waves;
  int strips;
  int columns;
  int stages;          // tiles in shared memory: 2 loads one while the other is used
  int blocks_at_once;  // on one multiprocessor, at least: bounds the registers
  bool hold_left;      // a wave's own rows in registers, not in shared memory

  USP_HOST_DEVICE constexpr int rows() const { return waves * strips * kTile; }
  USP_HOST_DEVICE constexpr int threads() const { return waves * kWaveSize; }
};

USP_HOST_DEVICE constexpr Tiles forward_tiles(int head_dim, bool plain) {
  if (kWarps) {
    if (head_dim <= 64 && plain) return {4, 2, 64, 2, 1, false};
    if (head_dim <= 128) return {4, 1, 64, 2, 1, true};
    return {4, 1, 32, 2, 1, false};
  }
  if (head_dim <= 64) return {4, 2, 64, 1, 1, true};
  if (head_dim <= 128) return {4, 2, 32, 1, 1, true};
  return {4, 1, 32, 1, 1, true};
}

USP_HOST_DEVICE constexpr Tiles backward_tiles(int head_dim) {
  if (kWarps) {
    if (head_dim <= 64) return {4, 1, 64, 2, 1, false};
    if (head_dim <= 128) return {4, 1, 32, 2, 1, false};
    return {4, 1, 16, 1, 1, false};
  }
  if (head_dim <= 64) return {4, 1, 64, 1, 1, false};
  if (head_dim <= 128) return {4, 1, 32, 1, 1, false};
  if (head_dim <= 192) return {4, 1, 16, 1, 1, false};
  return {2, 1, 16, 1, 1, false};
}

// Blocks that share the columns of one tile of dK and dV: more than 128 of both do not fit into 255
// registers.
USP_HOST_DEVICE constexpr int key_value_parts(int head_dim) {
  return kWarps && head_dim > 128 ? 2 : 1;
}

inline constexpr int kHeadDims[] = {32, 64, 96, 128, 192, 256};
inline constexpr int kMaxHeadDim = 256;

}  // namespace usp::gpu
