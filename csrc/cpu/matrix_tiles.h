#pragma once

// gemm on matrix tiles of 16 rows of 16 words, a word two bf16: AMX, or what stands in for it.
//
// c += a b needs a's words along its rows and b's along its columns, which is how they lie
// (kernels.h), and whole tiles: a transposed a, and ends that fill no tile, are copied first. Sums
// are fp32. `Tiles` are the instructions.

#include <vector>

#include "cpu/kernels.h"
#include "cpu/rows.h"
#include "cpu/simd.h"

namespace usp::cpu {
namespace {

inline constexpr int64_t kTileRows = 16, kTileWords = 16;

USP_SIMD int64_t whole_tiles(int64_t count) {
  return (count + kTileRows - 1) / kTileRows * kTileRows;
}

// Memory of this thread for `count` floats on a cache line; what was there is lost.
inline float* tile_room(int64_t count) {
  static thread_local std::vector<float> memory;
  constexpr int64_t kLine = 64;
  const auto needed = static_cast<size_t>(count) + kLine / sizeof(float);
  if (memory.size() < needed) memory.resize(needed);
  const auto address = reinterpret_cast<uintptr_t>(memory.data());
  return reinterpret_cast<float*>((address + kLine - 1) / kLine * kLine);
}

// Rows and words up to whole tiles; what the last rows hold beyond m goes into no result.
inline Matrix<const float> left_tiles(int64_t m, int64_t words, Matrix<const float> a,
                                      float* room) {
  const int64_t width = whole_tiles(words);
  if (a.transposed) {
    right_transpose<float>({a.data, a.ld}, words, m, {room, width});
    return {room, width};
  }
  if (m % kTileRows == 0 && words % kTileWords == 0) return a;
  for (int64_t i = 0; i < m; ++i) {
    __builtin_memcpy(room + i * width, a.data + i * a.ld,
                     static_cast<size_t>(words) * sizeof(float));
    for (int64_t p = words; p < width; ++p) room[i * width + p] = 0;
  }
  return {room, width};
}

// One tile of c, of which `rows` rows are there.
template <typename Tiles, int kTile>
USP_SIMD void store_tile(int64_t rows, float* c, int64_t ldc, Update<float> update) {
  alignas(64) float sums[kTileRows * kTileWords];
  Tiles::template store<kTile>(sums, kTileWords);
  for (int64_t r = 0; r < rows; ++r) {
    const float kept = update.factor == nullptr ? 1.0f : update.factor[r];
    for (int64_t i = 0; i < kTileWords; i += kLanes<float>) {
      const Vec<float> sum = update.alpha * load(sums + r * kTileWords + i);
      float* at = c + r * ldc + i;
      store<float>(at, update.adds ? kept * load(at) + sum : sum);
    }
  }
}

// kRows by kColumns tiles of c, at most two each: tiles 0 to 3 are sums, 4 and 5 of a, 6 and 7 of
// b.
template <typename Tiles, int kRows, int kColumns>
void tile_block(int64_t m, int64_t words, Matrix<const float> a, Matrix<const float> b,
                const float* last_b, int64_t last_ld, Matrix<float> c, Update<float> update) {
  Tiles::template zero<0>();
  if constexpr (kColumns > 1) Tiles::template zero<1>();
  if constexpr (kRows > 1) Tiles::template zero<2>();
  if constexpr (kRows > 1 && kColumns > 1) Tiles::template zero<3>();
  for (int64_t p = 0; p < words; p += kTileWords) {
    const bool whole = p + kTileWords <= words;
    const float* right = whole ? b.data + p * b.ld : last_b;
    const int64_t ld = whole ? b.ld : last_ld;
    Tiles::template load<4>(a.data + p, a.ld);
    Tiles::template load<6>(right, ld);
    Tiles::template multiply<0, 4, 6>();
    if constexpr (kColumns > 1) {
      Tiles::template load<7>(right + kTileWords, ld);
      Tiles::template multiply<1, 4, 7>();
    }
    if constexpr (kRows > 1) {
      Tiles::template load<5>(a.data + kTileRows * a.ld + p, a.ld);
      Tiles::template multiply<2, 5, 6>();
    }
    if constexpr (kRows > 1 && kColumns > 1) Tiles::template multiply<3, 5, 7>();
  }
  const int64_t upper = m < kTileRows ? m : kTileRows, lower = m - kTileRows;
  float* below = c.data + kTileRows * c.ld;
  const Update<float> update_below = update.from(kTileRows);
  store_tile<Tiles, 0>(upper, c.data, c.ld, update);
  if constexpr (kColumns > 1) store_tile<Tiles, 1>(upper, c.data + kTileWords, c.ld, update);
  if constexpr (kRows > 1) store_tile<Tiles, 2>(lower, below, c.ld, update_below);
  if constexpr (kRows > 1 && kColumns > 1) {
    store_tile<Tiles, 3>(lower, below + kTileWords, c.ld, update_below);
  }
}

template <typename Tiles>
void gemm_on_tiles(int64_t m, int64_t n, int64_t k, Matrix<const float> a, Matrix<const float> b,
                   Matrix<float> c, Update<float> update) {
  const int64_t words = (k + 1) / 2, ragged = words % kTileWords;
  const int64_t of_left = whole_tiles(m) * whole_tiles(words);
  float* room = tile_room(of_left + kTileWords * n);
  a = left_tiles(m, words, a, room);
  float* last_b = room + of_left;  // the words that fill no tile, and zeros
  for (int64_t p = 0; ragged > 0 && p < kTileWords; ++p) {
    float* to = last_b + p * n;
    const float* from = b.data + (words - ragged + p) * b.ld;
    for (int64_t j = 0; j < n; ++j) to[j] = p < ragged ? from[j] : 0;
  }
  const typename Tiles::Configured configured;
  for (int64_t i = 0; i < m; i += 2 * kTileRows) {
    const bool two_rows = m - i > kTileRows;
    for (int64_t j = 0; j < n; j += 2 * kTileWords) {
      const bool two_columns = n - j > kTileWords;
      const auto block = two_rows
                             ? (two_columns ? tile_block<Tiles, 2, 2> : tile_block<Tiles, 2, 1>)
                             : (two_columns ? tile_block<Tiles, 1, 2> : tile_block<Tiles, 1, 1>);
      update.look_ahead();
      block(m - i < 2 * kTileRows ? m - i : 2 * kTileRows, words, {a.data + i * a.ld, a.ld},
            {b.data + j, b.ld}, last_b + j, n, {c.data + i * c.ld + j, c.ld}, update.from(i));
    }
  }
}

// The instructions in plain C++, for machines that lack them. As they do, a load reads whole tiles.
struct EmulatedTiles {
  struct Registers {
    bool configured = false;
    float tile[8][kTileRows][kTileWords];
  };

  static Registers& registers() {
    static thread_local Registers mine;
    return mine;
  }

  struct Configured {
    Configured() { registers().configured = true; }
    ~Configured() { registers().configured = false; }
  };

  template <int kTile>
  static void zero() {
    __builtin_memset(checked(kTile), 0, sizeof(registers().tile[0]));
  }

  template <int kTile>
  static void load(const float* from, int64_t ld) {
    for (int64_t r = 0; r < kTileRows; ++r) {
      __builtin_memcpy(checked(kTile)[r], from + r * ld, kTileWords * sizeof(float));
    }
  }

  template <int kTile>
  static void store(float* to, int64_t ld) {
    for (int64_t r = 0; r < kTileRows; ++r) {
      __builtin_memcpy(to + r * ld, checked(kTile)[r], kTileWords * sizeof(float));
    }
  }

  template <int kSum, int kLeft, int kRight>
  static void multiply() {
    auto *sum = checked(kSum), *left = checked(kLeft), *right = checked(kRight);
    for (int64_t r = 0; r < kTileRows; ++r) {
      for (int64_t p = 0; p < kTileWords; ++p) {
        for (int64_t j = 0; j < kTileWords; ++j) {
          for (const bool second : {false, true}) {
            sum[r][j] += half(left[r][p], second) * half(right[p][j], second);
          }
        }
      }
    }
  }

 private:
  static float (*checked(int tile)) [kTileWords] {
    if (!registers().configured) __builtin_trap();
    return registers().tile[tile];
  }

  static float half(float word, bool second) {
    const uint32_t bits = bits_of_float(word);
    return float_of_bits(second ? bits & 0xFFFF0000u : bits << 16);
  }
};

}  // namespace
}  // namespace usp::cpu
