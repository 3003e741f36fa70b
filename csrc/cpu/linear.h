#pragma once

// Linear attention of one rank's tokens on the CPU (docs/linear_attention.md). Free of torch.
//
// B batch, L tokens, H heads of states, D key and Dv value channels. q, k and v have H heads or a
// divisor of it, each standing for as many neighbours. T is the dtype of states and arithmetic.

#include "common/attention.h"
#include "cpu/parallel.h"

namespace usp::cpu {

// Tokens that are computed together.
inline constexpr int64_t kChunk = 32;

// (B|1, L, H|1) logs of decays, or with channels (B|1, L, H|1, D), the last dim contiguous; stride
// 0 where broadcast; data null: nothing decays.
template <typename T>
struct LogDecays {
  const T* data = nullptr;
  int64_t batch_stride = 0, row_stride = 0, head_stride = 0;
  bool has_channels = false;

  const T* at(int64_t b, int64_t row, int64_t h) const {
    return data + b * batch_stride + row * row_stride + h * head_stride;
  }
  // Whether all chunks of a head decay alike.
  bool is_constant() const { return data == nullptr || row_stride == 0; }
};

// Whose heads each of H stands for `head`s of.
struct HeadsView : TensorView {
  int64_t heads = 0;

  int64_t head(int64_t h, int64_t of) const { return h / (of / heads); }
};

template <typename T>
struct LinearAttention {
  int64_t B = 0, L = 0, H = 0, D = 0, Dv = 0;
  HeadsView q, k, v;  // data null: not given
  LogDecays<T> g;
  int64_t segment = kChunk;  // tokens between two states that are kept, a multiple of kChunk
  int64_t parts = 1;         // of whole segments, each walked by itself

  int64_t segments() const { return (L + segment - 1) / segment; }
  // Of part p the tokens; the last parts may have none.
  Range tokens(int64_t part) const {
    const int64_t each = (segments() + parts - 1) / parts * segment;
    return {part * each < L ? part * each : L, (part + 1) * each < L ? (part + 1) * each : L};
  }
};

// Where results go; (B, L, H, Dv), contiguous.
struct LinearResult {
  void* data = nullptr;  // null: states alone are asked for
  DType dtype = DType::kFloat32;
};

// Walks the tokens of each part.
//   states (parts, B, H, D, Dv): before each part; on return behind it.
//   kept (segments, B, H, D, Dv) or null: the state before each segment.
template <typename T>
void linear_forward(const LinearAttention<T>& a, T* states, T* kept, LinearResult out,
                    const ParallelFor& parallel);

// What the backward is given and gives, all contiguous.
template <typename T>
struct LinearGradients {
  TensorView dout;          // (B, L, H, Dv)
  const T* kept = nullptr;  // of the forward
  T* states = nullptr;      // (parts, B, H, D, Dv): gradient behind each part; on return before it
  // (B, L, H, D | D | Dv), each in its dtype; data null: the gradient of states alone.
  LinearResult dq, dk, dv;
  T* dg = nullptr;  // (B, L, H), with channels (B, L, H, D); null: not wanted
};

// Walks the tokens of each part the other way.
template <typename T>
void linear_backward(const LinearAttention<T>& a, const LinearGradients<T>& gradients,
                     const ParallelFor& parallel);

}  // namespace usp::cpu
