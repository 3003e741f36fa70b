#pragma once

// The tensor memory accelerator (TMA): one thread copies a box of a tensor to shared memory.
//
// Source: PTX ISA, "Data Movement and Conversion Instructions: Tensor copy"; CUDA driver API,
// "Tensor Map Object Management".

#include "../../attention.h"
#include "barrier.h"

#if defined(USP_GPU_CUDA)
#include <cuda.h>  // types alone: the function is asked for by name

#define USP_GRID_CONSTANT __grid_constant__
#else
#define USP_GRID_CONSTANT
#endif

namespace usp::gpu::hopper {

inline constexpr int kBoxColumns = 64;  // 128 bytes of 16-bit numbers: the widest swizzle

// A tensor of 16-bit numbers as the TMA sees it: (batch, head, row, head_dim), and a box of `rows`
// rows and kBoxColumns columns of one head. Rows past the end are zeros, never another head's.
// Aligned as CUDA 13 has it; 12 asks for 64. Parameters lie alike on every target.
struct alignas(128) TensorMap {
  uint64_t words[16];
};

// How many rows and heads there are, and how many rows a box has.
struct MapSizes {
  int64_t batch, rows, heads, head_dim;
  int box_rows;
};

// Whether the TMA takes a tensor: 16 bytes divide its address and strides, which are positive and
// below 2^40 bytes.
inline bool can_map(const TensorView& x, int64_t batch, int64_t rows, int64_t heads) {
  const auto takes = [](int64_t stride, int64_t count) {
    return count == 1 || (stride > 0 && stride % 8 == 0 && stride < int64_t{1} << 39);
  };
  return reinterpret_cast<uintptr_t>(x.data) % 16 == 0 && takes(x.row_stride, rows) &&
         takes(x.head_stride, heads) && takes(x.batch_stride, batch);
}

#if defined(USP_GPU_CUDA)
// Of the driver, which is not linked: a library built for a GPU loads without one. Null: not there.
inline decltype(&cuTensorMapEncodeTiled) find_encoder() {
  void* found = nullptr;
  cudaDriverEntryPointQueryResult status;
#if CUDART_VERSION >= 12050
  cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault,
                                   &status);
#else
  cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &found, cudaEnableDefault, &status);
#endif
  return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(found);
}
#endif

// Fills `map`; returns null, or what went wrong. `x` can_map.
inline const char* make_map(TensorMap& map, const TensorView& x, const MapSizes& sizes) {
  // a dim of one element is never stepped along, but its stride must be legal
  const auto bytes = [](int64_t stride, int64_t count) {
    return static_cast<uint64_t>(count == 1 ? 16 : stride * 2);
  };
  const uint64_t dims[] = {static_cast<uint64_t>(sizes.head_dim), static_cast<uint64_t>(sizes.rows),
                           static_cast<uint64_t>(sizes.heads), static_cast<uint64_t>(sizes.batch)};
  const uint64_t strides[] = {bytes(x.row_stride, sizes.rows), bytes(x.head_stride, sizes.heads),
                              bytes(x.batch_stride, sizes.batch)};
  const uint32_t box[] = {kBoxColumns, static_cast<uint32_t>(sizes.box_rows), 1, 1};
#if defined(USP_GPU_CUDA)
  static_assert(sizeof(TensorMap) == sizeof(CUtensorMap));
  static_assert(alignof(TensorMap) % alignof(CUtensorMap) == 0);
  static const auto encode = find_encoder();
  if (encode == nullptr) return "the CUDA driver has no cuTensorMapEncodeTiled";
  const auto dtype = x.dtype == DType::kBFloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                                                 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  const uint32_t every[] = {1, 1, 1, 1};
  const CUresult result =
      encode(reinterpret_cast<CUtensorMap*>(&map), dtype, 4, const_cast<void*>(x.data), dims,
             strides, box, every, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
             CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? nullptr : "cuTensorMapEncodeTiled refused a tensor";
#else
  host::encode_map(map.words, x.data, dims, strides, box);
  return nullptr;
#endif
}

// Where a box begins.
struct BoxPlace {
  int column, row, head, batch;
};

// Starts the copy of a box to `to`, aligned to 1024 bytes; `barrier` counts its bytes. The sixteen
// bytes c of row r come to place c ^ (r % 8) of that row, of 128 bytes.
USP_DEVICE void load_box(char* to, const TensorMap& map, Barrier& barrier, BoxPlace at) {
#if defined(USP_GPU_CUDA)
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%2, %3, %4, %5}], [%6];" ::"r"(shared_address(to)),
      "l"(&map), "r"(at.column), "r"(at.row), "r"(at.head), "r"(at.batch),
      "r"(shared_address(&barrier))
      : "memory");
#else
  const int first[] = {at.column, at.row, at.head, at.batch};
  host::load_box(to, map.words, &barrier, first);
#endif
}

}  // namespace usp::gpu::hopper
