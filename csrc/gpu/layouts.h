#pragma once

// Which element of a matrix each register of each lane holds, for every matrix instruction in use.
//
// D (m x n) = A (m x k) B (k x n) + C. `element` counts a lane's numbers of one operand, two to a
// 32-bit register for 16-bit formats, the lower half first.

#include "common/macros.h"

namespace usp::gpu {

struct Position {
  int row, column;

  USP_HOST_DEVICE constexpr bool operator==(const Position& other) const {
    return row == other.row && column == other.column;
  }
};

// NVIDIA mma.sync.m16n8k16 with 16-bit A and B and fp32 accumulators: a warp of 32 lanes in 8
// groups of 4.
//
//        k  0 1   2 3   4 5   6 7 | 8 9  ...                  n  0    1    2  ..  7
//   A    0  0:01  1:01  2:01  3:01  0:45  1:45 ..       B  k 0  0:0  4:0  8:0    28:0
//   row  1  4:01  5:01  6:01  7:01  4:45  5:45 ..            1  0:1  4:1  8:1    28:1
//       ..                                                   2  1:0  5:0  9:0    29:0
//        8  0:23  1:23  2:23  3:23  0:67  1:67 ..           ..
//                                                            8  0:2  4:2  8:2    28:2
//   lane:elements of A; C is like A's left half,
//   with rows 8 to 15 in elements 2 and 3.
//
// Source: PTX ISA, "Matrix Fragments for mma.m16n8k16 with floating point type".
namespace m16n8k16 {

USP_HOST_DEVICE constexpr Position a(int lane, int element) {
  return {lane / 4 + element / 2 % 2 * 8, lane % 4 * 2 + element % 2 + element / 4 * 8};
}

USP_HOST_DEVICE constexpr Position b(int lane, int element) {
  return {lane % 4 * 2 + element % 2 + element / 2 * 8, lane / 4};
}

USP_HOST_DEVICE constexpr Position c(int lane, int element) {
  return {lane / 4 + element / 2 * 8, lane % 4 * 2 + element % 2};
}

}  // namespace m16n8k16

// NVIDIA ldmatrix.m8n8.x4: four 8 x 8 matrices of 16-bit numbers. Lane l gives the address of row
// l % 8 of matrix l / 8; register i of a lane receives two numbers of matrix i: those at (row,
// column) and (row, column + 1), or with .trans those at (column, row) and (column + 1, row).
//
// Source: PTX ISA, "Warp-level matrix load instruction: ldmatrix".
namespace m8n8x4 {

USP_HOST_DEVICE constexpr Position received(int lane) { return {lane / 4, lane % 4 * 2}; }

}  // namespace m8n8x4

// AMD v_mfma_f32_16x16x16_f16 and v_mfma_f32_16x16x16_bf16_1k: a wave of 64 lanes in 4 groups
// of 16.
//
//         k  0..3      4..7       8..11     12..15            n  0     1    ..  15
//   A     0  0:0123    16:0123    32:0123   48:0123     D m 0    0:0   1:0      15:0
//   row   1  1:0123    17:0123    33:0123   49:0123         1    0:1   1:1      15:1
//        ..                                                 ..
//        15  15:0123   31:0123    47:0123   63:0123         4    16:0  17:0     31:0
//
//   B is like A with columns for rows.
//
// Source: AMD matrix instruction calculator, CDNA2 and CDNA3, which agree; the CDNA3 ISA manual,
// "Matrix Arithmetic Instructions".
namespace mfma16x16x16 {

USP_HOST_DEVICE constexpr Position a(int lane, int element) {
  return {lane % 16, lane / 16 * 4 + element};
}

USP_HOST_DEVICE constexpr Position b(int lane, int element) {
  return {lane / 16 * 4 + element, lane % 16};
}

USP_HOST_DEVICE constexpr Position c(int lane, int element) {
  return {lane / 16 * 4 + element, lane % 16};
}

}  // namespace mfma16x16x16

// AMD v_mfma_f32_32x32x8_f16 and v_mfma_f32_32x32x8_bf16_1k: a wave of 64 lanes in 2 halves.
//
//         k  0..3      4..7           n  0      1     ..  31
//   A     0  0:0123    32:0123    D m 0  0:0    1:0       31:0
//   row   1  1:0123    33:0123        1  0:1    1:1       31:1
//        ..                           4  32:0   33:0      63:0
//        31  31:0123   63:0123        8  0:4    1:4       31:4
//                                    12  32:4   33:4      63:4
//
//   B is like A with columns for rows.
//
// Source: as above.
namespace mfma32x32x8 {

USP_HOST_DEVICE constexpr Position a(int lane, int element) {
  return {lane % 32, lane / 32 * 4 + element};
}

USP_HOST_DEVICE constexpr Position b(int lane, int element) {
  return {lane / 32 * 4 + element, lane % 32};
}

USP_HOST_DEVICE constexpr Position c(int lane, int element) {
  return {element / 4 * 8 + lane / 32 * 4 + element % 4, lane % 32};
}

}  // namespace mfma32x32x8

}  // namespace usp::gpu
