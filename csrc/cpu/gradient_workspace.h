#pragma once

// The memory of a walk of the backward pass.

#include "cpu/tiles.h"

namespace usp::cpu {

// Where the tiles of keys that a walk holds lie in its memory. The first `pinned` tiles have their
// own places, the others share the rest, going round.
struct Places {
  int64_t pinned, count;

  int64_t of(int64_t tile) const {
    return tile < pinned ? tile : pinned + (tile - pinned) % (count - pinned);
  }
};

template <typename T>
struct GradientWorkspace {
  Matrix<T> q_left, q;          // (rows, D)
  Matrix<T> dout_left, dout;    // (rows, Dv)
  QueryOperand<T> q_t, dout_t;  // (D, rows), (Dv, rows)
  Matrix<T> k_left, v_left;     // (keys held, D) (keys held, Dv)
  Matrix<T> k;                  // (keys held, D), or a transpose for each tile
  Matrix<T> dq;                 // (rows, D), or its transpose
  T* wide_dq;                   // (heads of a group, rows, D), with a wide tile only
  Matrix<T> dk, dv;             // (keys held, D) (keys held, Dv)
  T *s, *dp;                    // (keys, rows)
  T* operands[3];               // (keys, rows), see GradientOperands
  T* derivative;                // (keys, rows), softcap only
  T* multiplier;                // (keys, rows), dropout only
  T* ds;                        // (keys, rows), with a gradient of the bias only
  T *lse, *delta;               // (rows,)
  QueryPositions positions;

  GradientWorkspace(const Attention<T>& a, const Kernels<T>& kernels, int64_t tiles_held,
                    bool with_dbias, bool with_wide, Carver& carver) {
    const auto matrix = [&](int64_t rows, int64_t ld) {
      return Matrix<T>{carver.take<T>(rows * ld), ld};
    };
    constexpr int64_t kTile = kKeyTile * kQueryTile;
    const int64_t keys_held = tiles_held * kKeyTile;
    q_left = matrix(kQueryTile, padded(a.D));
    q = matrix(kQueryTile, padded(a.D));
    q_t.transposed = matrix(a.D, kQueryTile);
    dout_left = matrix(kQueryTile, padded(a.Dv));
    dout = matrix(kQueryTile, padded(a.Dv));
    dout_t.transposed = matrix(a.Dv, kQueryTile);
    k_left = matrix(keys_held, padded(a.D));
    v_left = matrix(keys_held, padded(a.Dv));
    k = matrix(keys_held, padded(a.D));
    dq = by_query_sums(kernels, carver.take<T>(kQueryTile * padded(a.D)), kQueryTile, padded(a.D));
    wide_dq = with_wide ? carver.take<T>(std::min(a.group_size, a.H) * kQueryTile * padded(a.D))
                        : nullptr;
    dk = matrix(keys_held, padded(a.D));
    dv = matrix(keys_held, padded(a.Dv));
    s = carver.take<T>(kTile);
    dp = carver.take<T>(kTile);
    for (T*& operand : operands) operand = carver.take<T>(kTile);
    derivative = a.softcap > 0 ? carver.take<T>(kTile) : nullptr;
    multiplier = a.dropout_p > 0 ? carver.take<T>(kTile) : nullptr;
    ds = with_dbias ? carver.take<T>(kTile) : nullptr;
    lse = carver.take<T>(kQueryTile);
    delta = carver.take<T>(kQueryTile);
    positions.carve(carver);
  }
};

}  // namespace usp::cpu
