#pragma once

#include "../piece.h"
#include "stream.h"

namespace usp::gpu {

// Copies pieces into `message`, or out of it; as many as fit the arguments of a kernel (32) in one
// launch. Returns null, or what went wrong.
const char* head_exchange(Direction direction, const std::vector<Piece>& pieces, char* message,
                          Stream stream);

}  // namespace usp::gpu
