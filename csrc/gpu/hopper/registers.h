#pragma once

// A warp's part of the operands and results of wgmma that lie in registers: 16 of the warpgroup's
// 64 rows. Each lane holds parts of two of them, its row slots.

#include "../half.h"
#include "layouts.h"

namespace usp::gpu::hopper {

inline constexpr int kSlots = 2;

// Of the warp's 16 rows.
USP_DEVICE int row_of_slot(int slot) { return m64nNk16::d(lane(), 2 * slot).row; }

// 16 rows and kColumns columns of a product.
template <int kColumns>
struct Product {
  static constexpr int kCount = kColumns / 2;

  float x[kCount];

  USP_DEVICE static constexpr int slot(int i) { return i / 2 % 2; }
  USP_DEVICE static int column(int i) {
    return m64nNk16::d(lane(), 0).column + m64nNk16::d(0, i).column;
  }

  USP_DEVICE void clear() {
    USP_UNROLL
    for (int i = 0; i < kCount; ++i) x[i] = 0.0f;
  }

  // visit(number, row slot, column)
  template <typename Visit>
  USP_DEVICE void for_each(Visit&& visit) {
    USP_UNROLL
    for (int i = 0; i < kCount; ++i) visit(x[i], slot(i), column(i));
  }

  // visit(two neighbours in a row, row slot, column of the first)
  template <typename Visit>
  USP_DEVICE void for_each_pair(Visit&& visit) {
    USP_UNROLL
    for (int i = 0; i < kCount; i += 2) visit(x + i, slot(i), column(i));
  }
};

// One value for each row slot.
template <typename Value>
struct PerRow {
  Value of[kSlots];

  // visit(value, row in the warp's 16)
  template <typename Visit>
  USP_DEVICE void for_each(Visit&& visit) {
    USP_UNROLL
    for (int slot = 0; slot < kSlots; ++slot) visit(of[slot], row_of_slot(slot));
  }
};

// 16 rows and kColumns columns of a left operand, rounded to T.
template <typename T, int kColumns>
struct LeftOperand {
  static constexpr int kSteps = kColumns / 16;  // of wgmma

  uint32_t packed[kSteps][4];

  USP_DEVICE void from(const Product<kColumns>& product) {
    USP_UNROLL
    for (int i = 0; i < kColumns / 2; i += 2) {
      packed[i / 8][i / 2 % 4] = pack<T>(product.x[i], product.x[i + 1]);
    }
  }
};

// A left operand's step k lies like columns 16 k to 16 k + 15 of a product.
constexpr bool products_lie_like_left_operands() {
  for (int i = 0; i < 8; ++i) {
    for (int lane = 0; lane < 128; ++lane) {
      if (!(m64nNk16::d(lane, i) == m64nNk16::a(lane, i))) return false;
      const Position next = m64nNk16::d(lane, i + 8), here = m64nNk16::a(lane, i);
      if (!(next == Position{here.row, here.column + 16})) return false;
    }
  }
  return true;
}
static_assert(products_lie_like_left_operands());

// Over the four lanes that share a row.
USP_DEVICE float sum_of_row(float value) {
  value += shuffle_xor(value, 1);
  return value + shuffle_xor(value, 2);
}

USP_DEVICE float max_of_row(float value) {
  value = larger(value, shuffle_xor(value, 1));
  return larger(value, shuffle_xor(value, 2));
}

// Whether this lane is the first of those that share its rows.
USP_DEVICE bool leads_rows() { return m64nNk16::d(lane(), 0).column == 0; }

}  // namespace usp::gpu::hopper
