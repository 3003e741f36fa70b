#pragma once

// Philox4x32-10, a counter-based random number generator: the same counter and key give the same
// four words on every device, in any order.
//
// Source: Salmon, Moraes, Dror, Shaw 2011, "Parallel random numbers: as easy as 1, 2, 3".

#include <cstdint>

#include "common/macros.h"

namespace usp {

struct PhiloxKey {
  uint32_t low;
  uint32_t high;
};

USP_HOST_DEVICE PhiloxKey philox_key(uint64_t seed) {
  return {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)};
}

struct PhiloxWords {
  uint32_t word[4];
};

USP_HOST_DEVICE PhiloxWords philox4x32_10(PhiloxWords counter, PhiloxKey key) {
  constexpr int kRounds = 10;
  uint32_t c0 = counter.word[0], c1 = counter.word[1], c2 = counter.word[2], c3 = counter.word[3];
#if defined(__GNUC__) && !defined(__clang__) && !defined(__CUDACC__)
#pragma GCC unroll 10
#endif
  for (int round = 0; round < kRounds; ++round) {
    const uint64_t product0 = uint64_t{0xD2511F53u} * c0;
    const uint64_t product2 = uint64_t{0xCD9E8D57u} * c2;
    c0 = static_cast<uint32_t>(product2 >> 32) ^ c1 ^ key.low;
    c2 = static_cast<uint32_t>(product0 >> 32) ^ c3 ^ key.high;
    c1 = static_cast<uint32_t>(product2);
    c3 = static_cast<uint32_t>(product0);
    key.low += 0x9E3779B9u;
    key.high += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

// A word below this threshold drops its element: P(drop) = dropout_p, 0 <= dropout_p < 1.
USP_HOST_DEVICE uint32_t dropout_threshold(double dropout_p) {
  return static_cast<uint32_t>(dropout_p * 4294967296.0);
}

}  // namespace usp
