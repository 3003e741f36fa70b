#pragma once

#include <vector>

#include "../piece.h"
#include "parallel.h"

namespace usp::cpu {

// Copies pieces into `message`, or out of it.
void head_exchange(Direction direction, const std::vector<Piece>& pieces, char* message,
                   const ParallelFor& parallel);

}  // namespace usp::cpu
