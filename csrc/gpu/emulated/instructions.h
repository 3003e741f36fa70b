#pragma once

// The matrix instructions on the CPU: the last lane of a wave to come gathers the operands of all
// lanes by the instruction's documented layout, multiplies in fp32 and scatters the sums.

#include "gpu/emulated/simt.h"
#include "gpu/half.h"
#include "gpu/layouts.h"

namespace usp::gpu::emulated {

// One lane's part of one instruction.
struct MatrixOperands {
  float* d;
  const uint32_t* a;
  const uint32_t* b;
};

using Layout = Position (*)(int lane, int element);

template <typename T>
float element_of(const uint32_t* registers, int element) {
  return to_float(T{static_cast<uint16_t>(registers[element / 2] >> (element % 2 * 16))});
}

template <typename T, int kM, int kN, int kK, Layout kA, Layout kB, Layout kC>
void multiply_wave(void* const* lanes, int wave_size) {
  float a[kM][kK], b[kK][kN];
  for (int lane = 0; lane < wave_size; ++lane) {
    const auto* mine = static_cast<const MatrixOperands*>(lanes[lane]);
    for (int i = 0; i < kM * kK / wave_size; ++i) {
      const Position at = kA(lane, i);
      a[at.row][at.column] = element_of<T>(mine->a, i);
    }
    for (int i = 0; i < kK * kN / wave_size; ++i) {
      const Position at = kB(lane, i);
      b[at.row][at.column] = element_of<T>(mine->b, i);
    }
  }
  float product[kM][kN] = {};
  for (int m = 0; m < kM; ++m) {
    for (int k = 0; k < kK; ++k) {
      for (int n = 0; n < kN; ++n) product[m][n] += a[m][k] * b[k][n];
    }
  }
  for (int lane = 0; lane < wave_size; ++lane) {
    for (int i = 0; i < kM * kN / wave_size; ++i) {
      const Position at = kC(lane, i);
      static_cast<MatrixOperands*>(lanes[lane])->d[i] += product[at.row][at.column];
    }
  }
}

template <typename T>
void mma_m16n8k16(float* d, const uint32_t* a, const uint32_t* b) {
  MatrixOperands mine{d, a, b};
  meet_wave(multiply_wave<T, 16, 8, 16, m16n8k16::a, m16n8k16::b, m16n8k16::c>, &mine);
}

template <typename T>
void mfma_16x16x16(float* d, const uint32_t* a, const uint32_t* b) {
  MatrixOperands mine{d, a, b};
  meet_wave(multiply_wave<T, 16, 16, 16, mfma16x16x16::a, mfma16x16x16::b, mfma16x16x16::c>, &mine);
}

template <typename T>
void mfma_32x32x8(float* d, const uint32_t* a, const uint32_t* b) {
  MatrixOperands mine{d, a, b};
  meet_wave(multiply_wave<T, 32, 32, 8, mfma32x32x8::a, mfma32x32x8::b, mfma32x32x8::c>, &mine);
}

struct MatrixLoad {
  uint32_t* d;
  const void* row;
  bool transposed;
};

inline void load_wave(void* const* lanes, int wave_size) {
  const auto number = [&](int matrix, int row, int column) -> uint32_t {
    const auto* giver = static_cast<const MatrixLoad*>(lanes[matrix * 8 + row]);
    return static_cast<const uint16_t*>(giver->row)[column];
  };
  for (int lane = 0; lane < wave_size; ++lane) {
    auto* mine = static_cast<MatrixLoad*>(lanes[lane]);
    const Position at = m8n8x4::received(lane);
    for (int matrix = 0; matrix < 4; ++matrix) {
      const uint32_t low =
          mine->transposed ? number(matrix, at.column, at.row) : number(matrix, at.row, at.column);
      const uint32_t high = mine->transposed ? number(matrix, at.column + 1, at.row)
                                             : number(matrix, at.row, at.column + 1);
      mine->d[matrix] = high << 16 | low;
    }
  }
}

inline void load_m8n8x4(uint32_t* d, const void* row, bool transposed) {
  if (reinterpret_cast<uintptr_t>(row) % 16 != 0) fail("a row of ldmatrix is not aligned to 16");
  MatrixLoad mine{d, row, transposed};
  meet_wave(load_wave, &mine);
}

}  // namespace usp::gpu::emulated
