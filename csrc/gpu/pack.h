#pragma once

#include "common/piece.h"
#include "gpu/stream.h"

namespace usp::gpu {

// Copies pieces into `message`, or out of it; as many as fit the arguments of a kernel (32) in one
// launch. Returns null, or what went wrong.
const char* copy_pieces(Direction direction, const std::vector<Piece>& pieces, char* message,
                        Stream stream);

}  // namespace usp::gpu
