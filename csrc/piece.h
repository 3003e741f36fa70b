#pragma once

// One strided tensor on its way into a flat message or out of it, as bytes. Free of torch.

#include <cstdint>

namespace usp {

enum class Direction { kPack, kUnpack };

// Runs without gaps, in a grid of up to four dims, outermost first. In the message they lie one
// behind the other.
struct Piece {
  static constexpr int kDims = 4;

  char* data;
  int64_t offset;  // in the message, bytes
  int64_t run;     // bytes
  int64_t sizes[kDims];
  int64_t strides[kDims];  // bytes

  int64_t runs() const { return sizes[0] * sizes[1] * sizes[2] * sizes[3]; }
  int64_t bytes() const { return runs() * run; }
};

}  // namespace usp
