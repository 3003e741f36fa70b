#pragma once

// Matrix tiles of 16 rows of 16 words, a word two bf16: AMX, or what stands in for it.
//
// c += a b needs a's words along its rows and b's along its columns, which is how they lie
// (kernels.h), and whole tiles: ends that fill none are copied first. Sums are fp32. Whole tiles of
// c are sums in place; else, and where the product is scaled, they pass through memory of their
// own. `Tiles` are the instructions.

#include <algorithm>
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

// A row of an operand's tiles: those of whole words lie where the operand does, the last may be a
// copy with zeros in it.
struct TileRow {
  const float* first;
  int64_t ld, step;  // from one row to the next, from one tile to the next
  Matrix<const float> last;

  Matrix<const float> at(int64_t tile, bool whole) const {
    return whole ? Matrix<const float>{first + tile * step, ld} : last;
  }
};

// The left operand, (m, words).
class LeftTiles {
 public:
  static int64_t room(int64_t m, int64_t words) {
    return whole_tiles(m) * kTileWords + kTileRows * whole_tiles(words);
  }

  LeftTiles(int64_t m, int64_t words, Matrix<const float> a, float* room)
      : a_(a), last_words_(room), last_row_(m / kTileRows * kTileRows) {
    const int64_t ragged = words % kTileWords;
    if (ragged > 0) copy(m, ragged, {a.data + words - ragged, a.ld}, {room, kTileWords});
    // What the last rows hold beyond m goes into no result.
    last_rows_ = {room + whole_tiles(m) * kTileWords, whole_tiles(words)};
    for (int64_t p = 0; p < words && last_row_ < m; p += kTileWords) {
      copy(m - last_row_, std::min(words - p, kTileWords), {a.data + last_row_ * a.ld + p, a.ld},
           {last_rows_.data + p, last_rows_.ld});
    }
  }

  TileRow row(int64_t i) const {
    const bool whole = i < last_row_;
    return {whole ? a_.data + i * a_.ld : last_rows_.data,
            whole ? a_.ld : last_rows_.ld,
            kTileWords,
            {last_words_ + i * kTileWords, kTileWords}};
  }

 private:
  static void copy(int64_t rows, int64_t words, Matrix<const float> from, Matrix<float> to) {
    const auto some = static_cast<__mmask16>((1u << words) - 1);
    for (int64_t i = 0; i < rows; ++i) {
      store<float>(to.data + i * to.ld,
                   (Vec<float>)_mm512_maskz_loadu_ps(some, from.data + i * from.ld));
    }
  }

  Matrix<const float> a_;
  const float* last_words_;
  Matrix<float> last_rows_{};
  int64_t last_row_;
};

// The right operand, (words, n).
class RightTiles {
 public:
  static int64_t room(int64_t n) { return kTileWords * n; }

  RightTiles(int64_t n, int64_t words, Matrix<const float> b, float* room)
      : b_(b), last_words_{room, n} {
    const int64_t ragged = words % kTileWords;
    for (int64_t p = 0; ragged > 0 && p < kTileWords; ++p) {
      const float* from = b.data + (words - ragged + p) * b.ld;
      for (int64_t j = 0; j < n; j += kLanes<float>) {
        store<float>(room + p * n + j, p < ragged ? load(from + j) : Vec<float>{});
      }
    }
  }

  TileRow column(int64_t j) const {
    return {b_.data + j, b_.ld, kTileWords * b_.ld, {last_words_.data + j, last_words_.ld}};
  }

 private:
  Matrix<const float> b_, last_words_;
};

// A tile of c, of which `rows` rows are there.
struct SumTile {
  float* c;
  int64_t ld, rows;
  float alpha;
  bool adds;

  bool in_place() const { return alpha == 1 && rows >= kTileRows; }
};

template <typename Tiles, int kTile>
USP_SIMD void begin_sums(const SumTile& to) {
  if (to.adds && to.in_place()) {
    Tiles::template load<kTile>(to.c, to.ld);
  } else {
    Tiles::template zero<kTile>();
  }
}

template <typename Tiles, int kTile>
USP_SIMD void end_sums(const SumTile& to) {
  if (to.in_place()) return Tiles::template store<kTile>(to.c, to.ld);
  alignas(64) float sums[kTileRows * kTileWords];
  Tiles::template store<kTile>(sums, kTileWords);
  for (int64_t r = 0; r < to.rows && r < kTileRows; ++r) {
    const Vec<float> sum = to.alpha * load(sums + r * kTileWords);
    float* at = to.c + r * to.ld;
    store<float>(at, to.adds ? load(at) + sum : sum);
  }
}

// kRows by kColumns tiles of c, at most two each: tiles 0 to 3 are sums, 4 and 5 of a, 6 and 7 of
// b. The operands' second rows of tiles count only where there are two. Some of the tiles that are
// summed: what the first leave in the registers is there for the next.
template <typename Tiles, int kRows, int kColumns>
void tile_block(int64_t words, Range tiles, const TileRow (&a)[2], const TileRow (&b)[2],
                const SumTile& to) {
  const SumTile right{to.c + kTileWords, to.ld, to.rows, to.alpha, to.adds};
  const SumTile below{to.c + kTileRows * to.ld, to.ld, to.rows - kTileRows, to.alpha, to.adds};
  const SumTile beyond{below.c + kTileWords, to.ld, below.rows, to.alpha, to.adds};
  if (tiles.begin == 0) {
    begin_sums<Tiles, 0>(to);
    if constexpr (kColumns > 1) begin_sums<Tiles, 1>(right);
    if constexpr (kRows > 1) begin_sums<Tiles, 2>(below);
    if constexpr (kRows > 1 && kColumns > 1) begin_sums<Tiles, 3>(beyond);
  }
  for (int64_t tile = tiles.begin; tile < tiles.end; ++tile) {
    const bool whole = (tile + 1) * kTileWords <= words;
    const auto load_from = [&]<int kTile>(const TileRow& row) {
      const Matrix<const float> from = row.at(tile, whole);
      Tiles::template load<kTile>(from.data, from.ld);
    };
    load_from.template operator()<4>(a[0]);
    load_from.template operator()<6>(b[0]);
    Tiles::template multiply<0, 4, 6>();
    if constexpr (kColumns > 1) {
      load_from.template operator()<7>(b[1]);
      Tiles::template multiply<1, 4, 7>();
    }
    if constexpr (kRows > 1) {
      load_from.template operator()<5>(a[1]);
      Tiles::template multiply<2, 5, 6>();
    }
    if constexpr (kRows > 1 && kColumns > 1) Tiles::template multiply<3, 5, 7>();
  }
  if (tiles.end * kTileWords < words) return;
  end_sums<Tiles, 0>(to);
  if constexpr (kColumns > 1) end_sums<Tiles, 1>(right);
  if constexpr (kRows > 1) end_sums<Tiles, 2>(below);
  if constexpr (kRows > 1 && kColumns > 1) end_sums<Tiles, 3>(beyond);
}

// Column j of m (rows, cols) times factor[j]; most often whole vectors of factors are 1.
inline void scale_columns(Matrix<float> m, int64_t rows, int64_t cols, const float* factor) {
  for (int64_t j = 0; j < cols; j += kLanes<float>) {
    const Vec<float> f = load(factor + j);
    if (_mm512_cmpneq_ps_mask((__m512)f, _mm512_set1_ps(1)) == 0) continue;
    for (int64_t i = 0; i < rows; ++i) {
      float* at = m.data + i * m.ld + j;
      store<float>(at, f * load(at));
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

  static void configure() { registers().configured = true; }
  static void release() { registers().configured = false; }

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
