#pragma once

// What wgmma finds where: registers of its 128 lanes, and tiles in shared memory.

#include "../layouts.h"

namespace usp::gpu {

// wgmma.m64nNk16 with 16-bit A and B and fp32 accumulators: warp w of the warpgroup holds rows 16 w
// to 16 w + 15, each warp like one mma.sync.m16n8k16.
//
//        n  0 1   2 3   4 5   6 7 | 8 9  ...  N - 1
//   D    0  0:01  1:01  2:01  3:01  0:45  1:45 ..
//   row  1  4:01  5:01  6:01  7:01  4:45  5:45 ..        lane:elements of D.
//       ..                                               A, where it comes from registers, is like
//        8  0:23  1:23  2:23  3:23  0:67  1:67 ..        D with N = 16.
//       16  32:01 33:01 ..
//
// Source: PTX ISA, "Register Fragments and Shared Memory Matrix Layouts: wgmma.mma_async.m64nNk16".
namespace m64nNk16 {

USP_HOST_DEVICE constexpr Position d(int lane, int element) {
  return {lane / 32 * 16 + lane % 32 / 4 + element / 2 % 2 * 8,
          lane % 4 * 2 + element % 2 + element / 4 * 8};
}

USP_HOST_DEVICE constexpr Position a(int lane, int element) { return d(lane, element); }

}  // namespace m64nNk16

// The 64 bits that describe a tile in shared memory to wgmma, here always with the swizzle of 128
// bytes: the address bits 4 to 6 are XORed with bits 7 to 9, of the address in shared memory, so
// that a tile begins at a multiple of 1024 bytes.
//
//   bits  0 - 13  start address / 16
//        16 - 29  leading byte offset / 16
//        32 - 45  stride byte offset / 16
//        49 - 51  base offset, 0 in a tile aligned to 1024
//        62 - 63  1: swizzle of 128 bytes
//
// "Major" is the dim along which the tile's rows of 128 bytes run, 64 numbers each.
//
//   K major: A, and B stored as (n, k)          MN major: B stored as (k, n)
//
//            k 0 .. 63                                    n 0 .. 63       n 64 ..
//   row 0    128 bytes                           k 0      128 bytes      + leading offset
//       ..   + 128 each                             ..    + 128 each
//       8    + stride offset                        8     + stride offset
//
//   The next 16 of k: 32 bytes further.          The next 16 of k: two stride offsets further.
//   The leading offset is not used.
//
// Source: PTX ISA, "Matrix Descriptor Format", "Strides" and "Swizzling modes".
namespace descriptor {

inline constexpr uint64_t kSwizzle128 = uint64_t{1} << 62;

USP_HOST_DEVICE constexpr uint64_t make(uint32_t address, uint32_t leading, uint32_t stride) {
  return (address & 0x3FFFF) >> 4 | static_cast<uint64_t>(leading >> 4) << 16 |
         static_cast<uint64_t>(stride >> 4) << 32 | kSwizzle128;
}

// The same tile, `bytes` further.
USP_HOST_DEVICE constexpr uint64_t advance(uint64_t made, int bytes) {
  return made + static_cast<uint64_t>(bytes >> 4);
}

USP_HOST_DEVICE constexpr uint32_t start_address(uint64_t made) { return (made & 0x3FFF) << 4; }
USP_HOST_DEVICE constexpr uint32_t leading_offset(uint64_t made) {
  return (made >> 16 & 0x3FFF) << 4;
}
USP_HOST_DEVICE constexpr uint32_t stride_offset(uint64_t made) {
  return (made >> 32 & 0x3FFF) << 4;
}

USP_HOST_DEVICE constexpr uint32_t swizzled(uint32_t address) {
  return address ^ (address >> 7 & 7) << 4;
}

// Where number (row, k) of a K major tile lies, k < 16.
USP_HOST_DEVICE constexpr uint32_t k_major(uint64_t made, int row, int k) {
  return swizzled(start_address(made) + row / 8 * stride_offset(made) + row % 8 * 128 + k * 2);
}

// Where number (k, n) of an MN major tile lies, k < 16.
USP_HOST_DEVICE constexpr uint32_t mn_major(uint64_t made, int k, int n) {
  return swizzled(start_address(made) + n / 64 * leading_offset(made) +
                  k / 8 * stride_offset(made) + k % 8 * 128 + n % 64 * 2);
}

}  // namespace descriptor

}  // namespace usp::gpu
