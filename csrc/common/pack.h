#pragma once

// Several strided tensors into one flat message, one behind the other, and back: what a rank sends
// at once. Bytes are copied, whatever they mean.

#include <vector>

#include "common/check.h"
#include "common/piece.h"

namespace usp {

// A tensor as torch describes it; strides in elements.
struct StridedTensor {
  char* data;
  int64_t itemsize;
  int64_t dims;
  const int64_t* sizes;
  const int64_t* strides;

  int64_t bytes() const {
    int64_t total = itemsize;
    for (int64_t d = 0; d < dims; ++d) total *= sizes[d];
    return total;
  }
};

struct JoinedDim {
  int64_t size;
  int64_t stride;  // bytes
};

// Innermost first, without dims of size 1; dims that lie one behind the other are one.
inline std::vector<JoinedDim> joined_dims(const StridedTensor& tensor) {
  std::vector<JoinedDim> joined;
  for (int64_t d = tensor.dims - 1; d >= 0; --d) {
    const JoinedDim dim{tensor.sizes[d], tensor.strides[d] * tensor.itemsize};
    if (dim.size == 1) continue;
    if (!joined.empty() && dim.stride == joined.back().size * joined.back().stride) {
      joined.back().size *= dim.size;
    } else {
      joined.push_back(dim);
    }
  }
  return joined;
}

inline Piece piece_of(const StridedTensor& tensor, int64_t offset) {
  Piece piece{tensor.data, offset, tensor.itemsize, {1, 1, 1, 1}, {0, 0, 0, 0}};
  std::vector<JoinedDim> dims = joined_dims(tensor);
  if (!dims.empty() && dims.front().stride == tensor.itemsize) {
    piece.run *= dims.front().size;
    dims.erase(dims.begin());
  }
  const auto count = static_cast<int64_t>(dims.size());
  check(count <= Piece::kDims, "a tensor of ", tensor.dims, " dims has ", count,
        " that cannot be joined, and a message takes ", Piece::kDims, ": call .contiguous()");
  for (int64_t d = 0; d < count; ++d) {
    piece.sizes[Piece::kDims - 1 - d] = dims[d].size;
    piece.strides[Piece::kDims - 1 - d] = dims[d].stride;
  }
  return piece;
}

// One piece for each tensor that holds anything.
inline std::vector<Piece> pieces_of(const std::vector<StridedTensor>& tensors) {
  std::vector<Piece> pieces;
  int64_t offset = 0;
  for (const StridedTensor& tensor : tensors) {
    if (tensor.bytes() > 0) pieces.push_back(piece_of(tensor, offset));
    offset += tensor.bytes();
  }
  return pieces;
}

}  // namespace usp
