#pragma once

namespace usp::gpu {

struct Stream {
  void* handle = nullptr;  // cudaStream_t or hipStream_t; null: the default stream
};

}  // namespace usp::gpu
