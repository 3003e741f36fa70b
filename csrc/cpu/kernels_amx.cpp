// AMX: the products of bf16 inputs in matrix tiles. Everything else is AVX-512's, with BF16.

#include "cpu/kernels.h"
#include "cpu/tiles.h"

#if USP_CPU_AMX

#include <immintrin.h>

// The target is set in the source, after every header that other objects share, so that no build
// system has to know it and no shared inline function is compiled for it.
#include <algorithm>
#include <optional>
#include <vector>
#if defined(__clang__)
#pragma clang attribute push(                                                                 \
    __attribute__((                                                                           \
        target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,amx-tile,amx-bf16,avx2,fma"))), \
    apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,amx-tile,amx-bf16,avx2,fma")
#endif

#define USP_VECTOR_BYTES 64
#define USP_GEMM_ROWS 6
#define USP_GEMM_VECTORS 4
#include "cpu/pairs.h"
#include "cpu/scores_late.h"
#include "cpu/tile_products.h"

namespace usp::cpu {
namespace {

// All eight tiles of 16 rows of 64 bytes.
struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
static_assert(sizeof(TileConfig) == 64);

// Assembly, for gcc's intrinsics are macros that take no template's number.
struct AmxTiles {
  static void configure() {
    static constexpr TileConfig config;
    __asm__ volatile("ldtilecfg %0" ::"m"(config));
  }

  // Others may use the tiles before and after, and a thread that holds none has less to save.
  static void release() { __asm__ volatile("tilerelease" ::); }

  template <int kTile>
  static USP_SIMD_MEMBER void zero() {
    __asm__ volatile("tilezero %%tmm%c0" ::"i"(kTile));
  }

  template <int kTile>
  static USP_SIMD_MEMBER void load(const float* from, int64_t ld) {
    const int64_t bytes = ld * static_cast<int64_t>(sizeof(float));
    __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(bytes), "i"(kTile)
                     : "memory");
  }

  template <int kTile>
  static USP_SIMD_MEMBER void store(float* to, int64_t ld) {
    const int64_t bytes = ld * static_cast<int64_t>(sizeof(float));
    __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(bytes), "i"(kTile) : "memory");
  }

  template <int kSum, int kLeft, int kRight>
  static USP_SIMD_MEMBER void multiply() {
    __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kSum), "i"(kLeft), "i"(kRight));
  }
};

template <typename Tiles>
constexpr Kernels<float> make_tile_kernels() {
  Kernels<float> table = make_bf16_kernels();
  table.block_rows = table.block_columns = 2 * kTileRows;
  table.transposes_sums = table.scales_late = true;
  table.begin = Tiles::configure;
  table.end = end_products<Tiles>;
  table.gemm = gemm_on_tiles<Tiles>;
  table.weighted_rows = weighted_columns<Tiles>;
  table.softmax_update = softmax_update_late<Tiles>;
  table.gradients = gradients_late<Tiles>;
  return table;
}

}  // namespace

const Kernels<float>& amx_kernels() {
  static constexpr Kernels<float> table = make_tile_kernels<AmxTiles>();
  return table;
}

const Kernels<float>& amx_emulated_kernels() {
  static constexpr Kernels<float> table = make_tile_kernels<EmulatedTiles>();
  return table;
}

}  // namespace usp::cpu

#if defined(__clang__)
#pragma clang attribute pop
#endif

#endif  // USP_CPU_AMX
