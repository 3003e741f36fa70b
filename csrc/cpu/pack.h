#pragma once

#include <vector>

#include "common/piece.h"
#include "cpu/parallel.h"

namespace usp::cpu {

// Copies pieces into `message`, or out of it.
void copy_pieces(Direction direction, const std::vector<Piece>& pieces, char* message,
                 const ParallelFor& parallel);

}  // namespace usp::cpu
