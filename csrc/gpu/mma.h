#pragma once

// Products of 16 x 16 tiles, the same on every target: D (16 x 16) += A (16 x 16) B (16 x 16), A
// and B of 16-bit numbers in shared memory, D of fp32 in registers.
//
// One tile is two mma.sync on NVIDIA and one MFMA on AMD. The MFMA computes the transpose, D^T =
// B^T A^T: its A and B have mirrored layouts, so this costs nothing, and it gives AMD what NVIDIA
// has by itself: a lane's numbers of D lie where its numbers of A would, so that the result of one
// product is the left operand of the next without leaving its registers.

#include "instructions.h"

namespace usp::gpu {

inline constexpr int kTile = 16;
inline constexpr bool kWarps = kWaveSize == 32;
inline constexpr int kElements = kTile * kTile / kWaveSize;  // of a tile, in each lane

USP_HOST_DEVICE constexpr Position left_position(int lane, int element) {
  return kWarps ? m16n8k16::a(lane, element) : mfma16x16x16::a(lane, element);
}

USP_HOST_DEVICE constexpr Position right_position(int lane, int element) {
  if (!kWarps) return mfma16x16x16::b(lane, element);
  const Position at = m16n8k16::b(lane, element % 4);
  return {at.row, at.column + element / 4 * 8};
}

USP_HOST_DEVICE constexpr Position accumulator_position(int lane, int element) {
  if (!kWarps) {
    const Position transposed = mfma16x16x16::c(lane, element);
    return {transposed.column, transposed.row};
  }
  const Position at = m16n8k16::c(lane, element % 4);
  return {at.row, at.column + element / 4 * 8};
}

constexpr bool accumulators_lie_like_left_operands() {
  for (int lane = 0; lane < kWaveSize; ++lane) {
    for (int i = 0; i < kElements; ++i) {
      if (!(accumulator_position(lane, i) == left_position(lane, i))) return false;
    }
  }
  return true;
}
static_assert(accumulators_lie_like_left_operands());

struct Accumulator {
  // A lane's elements lie in this many rows; element i is in row slot slot(i).
  static constexpr int kRowSlots = kWarps ? 2 : 1;

  float x[kElements];

  static USP_DEVICE constexpr int slot(int element) { return kWarps ? element / 2 % 2 : 0; }
  static USP_DEVICE int row_of_slot(int slot) {
    return accumulator_position(lane(), 0).row + (kWarps ? slot * 8 : 0);
  }

  // Element i is in column first_column() + offset(i), the same for every lane.
  static USP_DEVICE int first_column() { return accumulator_position(lane(), 0).column; }
  static USP_DEVICE constexpr int offset(int element) {
    return kWarps ? element % 2 + element / 4 * 8 : element;
  }

  // Whether this lane holds the first column of its rows.
  static USP_DEVICE bool leads_row() { return first_column() == 0; }

  USP_DEVICE void clear() {
    USP_UNROLL
    for (int i = 0; i < kElements; ++i) x[i] = 0.0f;
  }
};

// Sum, or maximum, over the lanes that hold parts of one row.
USP_DEVICE float row_sum(float value) {
  constexpr int kStep = kWarps ? 1 : 16;
  value += shuffle_xor(value, kStep);
  return value + shuffle_xor(value, 2 * kStep);
}

USP_DEVICE float row_max(float value) {
  constexpr int kStep = kWarps ? 1 : 16;
  value = larger(value, shuffle_xor(value, kStep));
  return larger(value, shuffle_xor(value, 2 * kStep));
}

// Sum over the lanes that hold parts of one column.
USP_DEVICE float column_sum(float value) {
  for (int step = kWarps ? 4 : 1; step < (kWarps ? 32 : 16); step *= 2) {
    value += shuffle_xor(value, step);
  }
  return value;
}

// A, from `tile` (rows, k) or from accumulators.
template <typename T>
struct Left {
  uint32_t packed[kElements / 2];

  USP_DEVICE void load(const T* tile, int stride) {
    if constexpr (kWarps) {
      load_m8n8x4<false>(packed, tile + lane() % 16 * stride + lane() / 16 * 8);
    } else {
      const Position at = left_position(lane(), 0);
      __builtin_memcpy(packed, __builtin_assume_aligned(tile + at.row * stride + at.column, 8), 8);
    }
  }

  USP_DEVICE void from(const Accumulator& sum) {
    USP_UNROLL
    for (int i = 0; i < kElements / 2; ++i) packed[i] = pack<T>(sum.x[2 * i], sum.x[2 * i + 1]);
  }
};

// B, from `tile` stored as (k, columns), or transposed as (columns, k).
template <typename T>
struct Right {
  uint32_t packed[kElements / 2];

  USP_DEVICE void load(const T* tile, int stride) {
    if constexpr (kWarps) {
      load_m8n8x4<true>(packed, tile + lane() % 16 * stride + lane() / 16 * 8);
    } else {
      const Position at = right_position(lane(), 0);
      const T* from = tile + at.row * stride + at.column;
      USP_UNROLL
      for (int i = 0; i < 2; ++i) {
        packed[i] = static_cast<uint32_t>(from[(2 * i + 1) * stride].bits) << 16 |
                    from[2 * i * stride].bits;
      }
    }
  }

  USP_DEVICE void load_transposed(const T* tile, int stride) {
    if constexpr (kWarps) {
      const int matrix = lane() / 8;
      load_m8n8x4<false>(packed, tile + (matrix / 2 * 8 + lane() % 8) * stride + matrix % 2 * 8);
    } else {
      const Position at = right_position(lane(), 0);
      __builtin_memcpy(packed, __builtin_assume_aligned(tile + at.column * stride + at.row, 8), 8);
    }
  }
};

template <typename T>
USP_DEVICE void multiply_add(Accumulator& sum, const Left<T>& left, const Right<T>& right) {
  if constexpr (kWarps) {
    mma_m16n8k16<T>(sum.x, left.packed, right.packed);
    mma_m16n8k16<T>(sum.x + 4, left.packed, right.packed + 2);
  } else {
    mfma_16x16x16<T>(sum.x, right.packed, left.packed);
  }
}

}  // namespace usp::gpu
