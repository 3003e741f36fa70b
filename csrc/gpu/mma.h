#pragma once

// Products of square tiles, the same on every target: D += A B, A and B of 16-bit numbers in shared
// memory, D of fp32 in registers. A tile is 16 x 16, on AMD also 32 x 32.
//
//                 NVIDIA                  AMD
//   16 x 16 x 16  2 mma.sync m16n8k16     1 MFMA 16x16x16
//   32 x 32 x 32  -                       4 MFMA 32x32x8
//
// The MFMA computes the transpose, D^T = B^T A^T: its A and B have mirrored layouts, so this costs
// nothing, and it gives AMD what NVIDIA has by itself: a lane's numbers of D lie where its numbers
// of A would, so that the result of one product is the left operand of the next without leaving its
// registers.

#include "gpu/instructions.h"

namespace usp::gpu {

inline constexpr bool kWarps = kWaveSize == 32;

template <int kTile>
inline constexpr int kElements = kTile * kTile / kWaveSize;  // of a tile, in each lane

// Elements of one instruction follow on those of the one before, which is so much further.
template <int kTile>
USP_HOST_DEVICE constexpr Position left_position(int lane, int element) {
  static_assert(kTile == 16 || (kTile == 32 && !kWarps));
  if constexpr (kWarps) return m16n8k16::a(lane, element);
  if constexpr (kTile == 16) return mfma16x16x16::a(lane, element);
  const Position at = mfma32x32x8::a(lane, element % 4);
  return {at.row, at.column + element / 4 * 8};
}

template <int kTile>
USP_HOST_DEVICE constexpr Position right_position(int lane, int element) {
  if constexpr (kWarps) {
    const Position at = m16n8k16::b(lane, element % 4);
    return {at.row, at.column + element / 4 * 8};
  }
  if constexpr (kTile == 16) return mfma16x16x16::b(lane, element);
  const Position at = mfma32x32x8::b(lane, element % 4);
  return {at.row + element / 4 * 8, at.column};
}

template <int kTile>
USP_HOST_DEVICE constexpr Position accumulator_position(int lane, int element) {
  if constexpr (kWarps) {
    const Position at = m16n8k16::c(lane, element % 4);
    return {at.row, at.column + element / 4 * 8};
  }
  const Position transposed =
      kTile == 16 ? mfma16x16x16::c(lane, element) : mfma32x32x8::c(lane, element);
  return {transposed.column, transposed.row};
}

template <int kTile>
struct Accumulator {
  // A lane's elements lie in this many rows; element i is in row slot slot(i).
  static constexpr int kRowSlots = kWarps ? 2 : 1;
  // So many of them are neighbours in a row.
  static constexpr int kRun = kWarps ? 2 : 4;

  float x[kElements<kTile>];

  static USP_HOST_DEVICE constexpr int slot(int element) { return kWarps ? element / 2 % 2 : 0; }
  static USP_DEVICE int row_of_slot(int slot) {
    return accumulator_position<kTile>(lane(), 0).row + (kWarps ? slot * 8 : 0);
  }

  // Element i is in column first_column() + offset(i), the same for every lane.
  static USP_DEVICE int first_column() { return accumulator_position<kTile>(lane(), 0).column; }
  static USP_HOST_DEVICE constexpr int offset(int element) {
    return element % kRun + element / 4 * 8;
  }

  // Whether this lane holds the first column of its rows.
  static USP_DEVICE bool leads_row() { return first_column() == 0; }

  USP_DEVICE void clear() {
    USP_UNROLL
    for (int i = 0; i < kElements<kTile>; ++i) x[i] = 0.0f;
  }
};

template <int kTile>
constexpr bool accumulators_lie_like_left_operands() {
  using Sum = Accumulator<kTile>;
  for (int lane = 0; lane < kWaveSize; ++lane) {
    for (int i = 0; i < kElements<kTile>; ++i) {
      const Position at = accumulator_position<kTile>(lane, i);
      const Position first = accumulator_position<kTile>(lane, 0);
      if (!(at == left_position<kTile>(lane, i))) return false;
      if (at.column != first.column + Sum::offset(i)) return false;
      if (at.row != first.row + Sum::slot(i) * 8) return false;
    }
  }
  return true;
}
static_assert(accumulators_lie_like_left_operands<16>());
#if !defined(USP_GPU_CUDA)
static_assert(accumulators_lie_like_left_operands<kWarps ? 16 : 32>());
#endif

// Sum, or maximum, over the lanes that hold parts of one row.
template <int kTile>
USP_DEVICE float row_sum(float value) {
  for (int step = kWarps ? 1 : kTile; step < (kWarps ? 4 : kWaveSize); step *= 2) {
    value += shuffle_xor(value, step);
  }
  return value;
}

template <int kTile>
USP_DEVICE float row_max(float value) {
  for (int step = kWarps ? 1 : kTile; step < (kWarps ? 4 : kWaveSize); step *= 2) {
    value = larger(value, shuffle_xor(value, step));
  }
  return value;
}

// Sum over the lanes that hold parts of one column.
template <int kTile>
USP_DEVICE float column_sum(float value) {
  for (int step = kWarps ? 4 : 1; step < (kWarps ? kWaveSize : kTile); step *= 2) {
    value += shuffle_xor(value, step);
  }
  return value;
}

// AMD: a lane's numbers of one row of a tile in shared memory. The summed index may run in any
// order as long as both operands agree, so of 32 numbers each half of the wave takes 16 bytes at a
// time, two instructions' worth, instead of every other 8.
template <int kTile, typename T>
USP_DEVICE void load_row(uint32_t* packed, const T* row) {
  const int part = lane() / kTile;
  if constexpr (kTile == 16) {
    __builtin_memcpy(packed, __builtin_assume_aligned(row + part * 4, 8), 8);
  } else {
    USP_UNROLL
    for (int i = 0; i < 2; ++i) {
      __builtin_memcpy(packed + 4 * i, __builtin_assume_aligned(row + i * 16 + part * 8, 16), 16);
    }
  }
}

// A, from `tile` (rows, k) or from accumulators.
template <typename T, int kTile>
struct Left {
  uint32_t packed[kElements<kTile> / 2];

  // For a right operand that is loaded transposed.
  USP_DEVICE void load(const T* tile, int stride) {
    if constexpr (kWarps) {
      load_m8n8x4<false>(packed, tile + lane() % 16 * stride + lane() / 16 * 8);
    } else {
      load_row<kTile>(packed, tile + lane() % kTile * stride);
    }
  }

  // For a right operand that is loaded as it lies.
  template <bool kWeights>
  USP_DEVICE void from(const Accumulator<kTile>& sum) {
    USP_UNROLL
    for (int i = 0; i < kElements<kTile> / 2; ++i) {
      const float low = sum.x[2 * i], high = sum.x[2 * i + 1];
      packed[i] = kWeights ? pack_weights<T>(low, high) : pack<T>(low, high);
    }
  }
};

// B.
template <typename T, int kTile>
struct Right {
  uint32_t packed[kElements<kTile> / 2];

  // From `tile` stored as (columns, k). Stored as (k, columns): load_interleaved.
  USP_DEVICE void load_transposed(const T* tile, int stride) {
    if constexpr (kWarps) {
      const int matrix = lane() / 8;
      load_m8n8x4<false>(packed, tile + (matrix / 2 * 8 + lane() % 8) * stride + matrix % 2 * 8);
    } else {
      load_row<kTile>(packed, tile + lane() % kTile * stride);
    }
  }
};

// B of kCount neighbouring tiles stored as (k, columns), whose columns interleave: column c of tile
// t is the stored column c * kCount + t.
//
// AMD: registers hold two rows of one column, rows lie along columns. A lane reads kCount columns
// of a row at once, as one word or two, and pairs them with those of the next row. Lanes of the
// same row read what is contiguous, 64 bytes or more, and the next ones of a wave four rows on,
// which is an odd number of 64 bytes away: all banks serve at once.
template <int kCount, typename T, int kTile>
USP_DEVICE void load_interleaved(Right<T, kTile> (&right)[kCount], const T* tiles, int stride) {
  if constexpr (kWarps) {
    static_assert(kCount == 1);
    load_m8n8x4<true>(right[0].packed, tiles + lane() % 16 * stride + lane() / 16 * 8);
  } else {
    const Position at = right_position<kTile>(lane(), 0);
    const T* from = tiles + at.row * stride + at.column * kCount;
    const auto read = [&](uint32_t* words, int row) {
      constexpr int kBytes = kCount * 2;
      __builtin_memcpy(words, __builtin_assume_aligned(from + row * stride, kBytes), kBytes);
    };
    USP_UNROLL
    for (int i = 0; i < kElements<kTile> / 2; ++i) {
      const int row = right_position<kTile>(0, 2 * i).row;
      uint32_t first[kCount / 2], second[kCount / 2];
      read(first, row);
      read(second, row + 1);
      USP_UNROLL
      for (int t = 0; t < kCount; t += 2) {
        right[t].packed[i] = low_halves(first[t / 2], second[t / 2]);
        right[t + 1].packed[i] = high_halves(first[t / 2], second[t / 2]);
      }
    }
  }
}

template <typename T, int kTile>
USP_DEVICE void multiply_add(Accumulator<kTile>& sum, const Left<T, kTile>& left,
                             const Right<T, kTile>& right) {
  if constexpr (kWarps) {
    mma_m16n8k16<T>(sum.x, left.packed, right.packed);
    mma_m16n8k16<T>(sum.x + 4, left.packed, right.packed + 2);
  } else if constexpr (kTile == 16) {
    mfma_16x16x16<T>(sum.x, right.packed, left.packed);
  } else {
    USP_UNROLL
    for (int i = 0; i < 4; ++i) {
      mfma_32x32x8<T>(sum.x, right.packed + 2 * i, left.packed + 2 * i);
    }
  }
}

}  // namespace usp::gpu
