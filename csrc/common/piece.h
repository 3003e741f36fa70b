#pragma once

// One strided tensor on its way into a flat message or out of it, as bytes. Free of torch.

#include <cstdint>
#include <vector>

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

// Halves a piece until no part has more than `max_bytes`; a run is cut at a multiple of
// `alignment`.
inline void cut(const Piece& piece, int64_t max_bytes, int64_t alignment,
                std::vector<Piece>& parts) {
  if (piece.bytes() <= max_bytes) return parts.push_back(piece);
  Piece head = piece, tail = piece;
  int d = 0;
  while (d < Piece::kDims && piece.sizes[d] == 1) ++d;
  if (d < Piece::kDims) {
    head.sizes[d] = piece.sizes[d] / 2;
    tail.sizes[d] = piece.sizes[d] - head.sizes[d];
    tail.data += head.sizes[d] * piece.strides[d];
  } else {
    head.run = (piece.run / 2 + alignment - 1) / alignment * alignment;
    tail.run = piece.run - head.run;
    tail.data += head.run;
  }
  tail.offset += head.bytes();
  cut(head, max_bytes, alignment, parts);
  cut(tail, max_bytes, alignment, parts);
}

}  // namespace usp
