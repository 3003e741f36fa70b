#pragma once

// Tile sizes of every kernel, by padded head dim and target: the one table.
//
// Bounds: 99 KiB of shared memory (sm_86, sm_89) and 255 registers a thread on NVIDIA, 64 KiB of
// LDS on AMD.

#include "gpu/gpu.h"
#include "gpu/mma.h"

namespace usp::gpu {

// Shared memory of one block: 99 KiB on sm_86 and sm_89, more elsewhere; LDS on AMD.
inline constexpr int kSharedLimit = (kWarps ? 99 : 64) * 1024;

// A block owns `rows` rows, `wave_rows` of them in each wave, and walks over `columns` at a time:
// forward and dQ own queries and walk over keys, dK/dV owns keys and walks over queries.
struct Tiles {
  int tile;  // 16, or 32 on AMD, see mma.h
  int waves;
  int strips;  // tiles of a wave's own rows
  int columns;
  int stages;          // tiles in shared memory: 2 loads one while the other is used
  int blocks_at_once;  // on one multiprocessor, at least: bounds the registers
  bool hold_left;      // a wave's own rows in registers, not in shared memory

  USP_HOST_DEVICE constexpr int wave_rows() const { return strips * tile; }
  USP_HOST_DEVICE constexpr int rows() const { return waves * wave_rows(); }
  USP_HOST_DEVICE constexpr int threads() const { return waves * kWaveSize; }
  // Own rows in shared memory at once: those that are held pass through the room of two walked
  // tiles.
  USP_HOST_DEVICE constexpr int shared_rows() const {
    return hold_left && 2 * columns < rows() ? 2 * columns : rows();
  }
};

// On AMD a wave's rows are one tile of 32, or where the head dim is an odd number of those two of
// 16: tiles of right operands come in pairs at least, see load_interleaved.
USP_HOST_DEVICE constexpr Tiles tiles_of_32_rows(int head_dim, int columns, int blocks) {
  if (head_dim % 64 == 0) return {32, 4, 1, columns, 1, blocks, true};
  return {16, 4, 2, columns, 1, blocks, true};
}

// On AMD a wave takes 32 rows: what it reads of a shared tile serves twice the products that it
// would with 16, and a row's maximum is one shuffle away, not two. At head dim 256 a wave takes 16:
// 32 would spill. Where it can, a kernel keeps to 256 registers and half the LDS: then two waves
// share a SIMD, one multiplies while the other has its softmax, and no sum lies in the registers of
// the matrix unit, from where every step would fetch it.
USP_HOST_DEVICE constexpr Tiles forward_tiles(int head_dim, bool plain) {
  if (kWarps) {
    if (head_dim <= 64 && plain) return {16, 4, 2, 64, 2, 1, false};
    if (head_dim <= 128) return {16, 4, 1, 64, 2, 1, true};
    return {16, 4, 1, plain ? 32 : 16, 2, 1, false};  // with options 32 would spill
  }
  if (head_dim <= 64) return tiles_of_32_rows(head_dim, 64, 2);
  if (head_dim <= 128) return tiles_of_32_rows(head_dim, 32, 2);
  if (head_dim <= 192) return tiles_of_32_rows(head_dim, 32, 1);
  return {16, 4, 1, 32, 1, 2, true};
}

enum class Gradient { kQuery, kKeyValue, kBias };

// On AMD what is held decides: sums (two of them for dK and dV, which take all 512 registers), own
// rows, and the rows in flight. Beyond head dim 64 that leaves fewer columns at a time, beyond 128
// it leaves 16 rows. For dbias four tensors lie in shared memory at once.
USP_HOST_DEVICE constexpr Tiles backward_tiles(Gradient gradient, int head_dim, bool plain) {
  if (kWarps) {
    if (head_dim <= 64 && plain && gradient == Gradient::kQuery) return {16, 4, 2, 32, 2, 1, false};
    if (head_dim <= 64) return {16, 4, 1, 64, 2, 1, false};
    if (head_dim <= 128) return {16, 4, 1, 32, 2, 1, false};
    return {16, 4, 1, 16, 1, 1, false};
  }
  if (gradient != Gradient::kBias) {
    const int blocks = gradient == Gradient::kQuery ? 2 : 1;
    if (head_dim <= 64) return tiles_of_32_rows(head_dim, 64, blocks);
    if (head_dim <= 128) return tiles_of_32_rows(head_dim, 32, blocks);
    return {16, 4, 1, 32, 1, blocks, true};
  }
  if (head_dim <= 64) return {16, 4, 1, 64, 1, 1, false};
  if (head_dim <= 128) return {16, 4, 1, 32, 1, 1, false};
  if (head_dim <= 192) return {16, 4, 1, 16, 1, 1, false};
  return {16, 2, 1, 16, 1, 1, false};
}

// Blocks that share the columns of one tile of dK and dV: more than 128 of both do not fit into 255
// registers.
USP_HOST_DEVICE constexpr int key_value_parts(int head_dim) {
  return kWarps && head_dim > 128 ? 2 : 1;
}

inline constexpr int kHeadDims[] = {32, 64, 96, 128, 192, 256};
inline constexpr int kMaxHeadDim = 256;

// Kernels that read options do much of their work on scores, whatever the head dim: of them fewer
// are compiled, for the time that a build takes.
USP_HOST_DEVICE constexpr bool is_compiled(int head_dim, bool plain) {
  return plain || head_dim == 64 || head_dim == 128 || head_dim == 256;
}

}  // namespace usp::gpu
