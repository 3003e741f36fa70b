// The products of one tile of attention by usp's kernels and by torch's brgemm, and the machine's
// peak: what cpu_gemm.py times. Built by that program together with csrc/cpu/kernels*.cpp.
//
// torch's function comes as a pointer, found by name in the installed libtorch_cpu: its C++
// interface is no promise, and nothing of torch is needed to build this.

#include <cstdint>
#include <cstring>
#include <exception>
#include <memory>
#include <vector>

#include "cpu/kernels.h"

#if USP_CPU_X86
#include <immintrin.h>
#endif

namespace {

using usp::DType;
using usp::cpu::Matrix;

constexpr int64_t kQueries = 64, kKeys = 128;

enum class Product { kScores, kValues, kKeyGradients };

struct Room {
  explicit Room(int64_t count) : memory(static_cast<size_t>(count) + 16, 0.0f) {}

  // 64-byte aligned, like the kernels' own scratch memory.
  float* data() {
    const auto address = reinterpret_cast<uintptr_t>(memory.data());
    return memory.data() + (64 - address % 64) % 64 / sizeof(float);
  }

  std::vector<float> memory;
};

int64_t padded(int64_t n) { return (n + usp::cpu::kPad - 1) / usp::cpu::kPad * usp::cpu::kPad; }

// An operand as both libraries are given it: row-major (rows, cols), fp32 or bf16.
struct Operand {
  const void* data;
  int64_t rows, cols;
};

// usp's operands, laid out as its algorithms hold them (csrc/cpu/attention_forward.cpp): scores
// are (keys, queries), weights are read transposed.
class Ours {
 public:
  Ours(Product product, DType dtype, int64_t head_dim, Operand left, Operand right)
      : kernels_(usp::cpu::kernels<float>(dtype)),
        left_room_(left.rows * padded(left.cols)),
        right_room_(padded(right.rows) * padded(right.cols)) {
    const auto rows = [&](Operand x, Room& room) {
      return kernels_.left_rows(dtype, x.data, x.cols, x.rows, x.cols,
                                Matrix<float>{room.data(), padded(x.cols)});
    };
    if (product == Product::kScores) {  // left: K, right: Q
      m_ = kKeys, n_ = kQueries, k_ = head_dim;
      a_ = rows(left, left_room_);
      Room queries(right.rows * padded(right.cols));
      b_ = {right_room_.data(), kQueries};
      kernels_.right_transpose(rows(right, queries), kQueries, head_dim, b_);
    } else {
      n_ = padded(head_dim);
      b_ = {right_room_.data(), n_};
      kernels_.right_rows(dtype, right.data, right.cols, right.rows, right.cols, b_);
      if (product == Product::kValues) {  // left: weights (keys, queries), right: V
        m_ = kQueries, k_ = kKeys;
        const Matrix<float> words{left_room_.data(), kQueries};
        kernels_.right_rows(dtype, left.data, left.cols, left.rows, left.cols, words);
        a_ = {words.data, words.ld, true};
      } else {  // left: gradients of scores (keys, queries), right: Q
        m_ = kKeys, k_ = kQueries;
        a_ = rows(left, left_room_);
      }
    }
    adds_ = product != Product::kScores;
    c_ = Room(m_ * n_);
  }

  void run(int64_t repeats) {
    const Matrix<float> c{c_.data(), n_};
    const Matrix<const float> b{b_.data, b_.ld};
    for (int64_t i = 0; i < repeats; ++i) kernels_.gemm({m_, n_, k_, a_, b, c, {1.0f, adds_}});
  }

  void clear() { std::memset(c_.data(), 0, static_cast<size_t>(m_ * n_) * sizeof(float)); }
  const float* result() { return c_.data(); }
  int64_t columns() const { return n_; }

 private:
  const usp::cpu::Kernels<float>& kernels_;
  int64_t m_ = 0, n_ = 0, k_ = 0;
  bool adds_ = false;
  Room left_room_, right_room_, c_{0};
  Matrix<const float> a_{};
  Matrix<float> b_{};
};

// M, N, K, ld_a, ld_b, ld_c, add_C, A, B, C, is_vnni
using Brgemm = void (*)(int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, bool, const void*,
                        const void*, float*, bool);

// c (m, n) = or += a (m, k) b (k, n); b of bf16 is held as words of two rows.
class Theirs {
 public:
  Theirs(Brgemm brgemm, DType dtype, Operand a, Operand b, bool adds)
      : brgemm_(brgemm),
        a_(a),
        b_(b),
        adds_(adds),
        in_words_(dtype == DType::kBFloat16),
        b_room_(padded(b.rows) * b.cols),
        c_(a.rows * b.cols) {
    if (!in_words_) {
      std::memcpy(b_room_.data(), b.data, static_cast<size_t>(b.rows * b.cols) * sizeof(float));
      return;
    }
    const auto* from = static_cast<const uint16_t*>(b.data);
    auto* to = reinterpret_cast<uint16_t*>(b_room_.data());
    for (int64_t i = 0; i < b.rows; ++i) {
      for (int64_t j = 0; j < b.cols; ++j) {
        to[(i / 2 * b.cols + j) * 2 + i % 2] = from[i * b.cols + j];
      }
    }
  }

  void run(int64_t repeats) {
    for (int64_t i = 0; i < repeats; ++i) {
      brgemm_(a_.rows, b_.cols, a_.cols, a_.cols, b_.cols, b_.cols, adds_, a_.data, b_room_.data(),
              c_.data(), in_words_);
    }
  }

  void clear() {
    std::memset(c_.data(), 0, static_cast<size_t>(a_.rows * b_.cols) * sizeof(float));
  }
  const float* result() { return c_.data(); }

 private:
  Brgemm brgemm_;
  Operand a_, b_;
  bool adds_, in_words_;
  Room b_room_, c_;
};

DType dtype_of(bool bf16) { return bf16 ? DType::kBFloat16 : DType::kFloat32; }

#if USP_CPU_X86
// Independent chains in registers, more than latency times width asks for. The empty assembly
// keeps each step where it is, in a register.
constexpr int kChains = 16;

#define USP_PEAK(name, isa, vector, flops_each, step)                          \
  __attribute__((target(isa))) double name(int64_t repeats, float* sink) {     \
    vector sum[kChains] = {};                                                  \
    for (int64_t i = 0; i < repeats; ++i) {                                    \
      _Pragma("GCC unroll 16") for (int chain = 0; chain < kChains; ++chain) { \
        vector x = sum[chain];                                                 \
        x = step;                                                              \
        __asm__("" : "+v"(x));                                                 \
        sum[chain] = x;                                                        \
      }                                                                        \
    }                                                                          \
    _Pragma("GCC unroll 16") for (int chain = 0; chain < kChains; ++chain) {   \
      *sink += sum[chain][0];                                                  \
    }                                                                          \
    return double(flops_each) * kChains * double(repeats);                     \
  }

USP_PEAK(peak_avx2, "avx2,fma", __m256, 16, _mm256_fmadd_ps(x, x, x))
USP_PEAK(peak_avx512, "avx512f", __m512, 32, _mm512_fmadd_ps(x, x, x))
USP_PEAK(peak_bf16, "avx512f,avx512bf16", __m512, 64, _mm512_dpbf16_ps(x, (__m512bh)x, (__m512bh)x))
#endif

}  // namespace

extern "C" {

Ours* usp_new(int product, bool bf16, int64_t head_dim, const void* left, int64_t left_rows,
              int64_t left_cols, const void* right, int64_t right_rows, int64_t right_cols) {
  return new Ours(static_cast<Product>(product), dtype_of(bf16), head_dim,
                  {left, left_rows, left_cols}, {right, right_rows, right_cols});
}
void usp_run(Ours* x, int64_t repeats) { x->run(repeats); }
void usp_clear(Ours* x) { x->clear(); }
const float* usp_result(Ours* x) { return x->result(); }
int64_t usp_columns(Ours* x) { return x->columns(); }
void usp_delete(Ours* x) { delete x; }

// Null where torch refuses these operands on this machine.
Theirs* torch_new(Brgemm brgemm, bool bf16, const void* a, int64_t m, int64_t k, const void* b,
                  int64_t n, bool adds) {
  auto theirs =
      std::make_unique<Theirs>(brgemm, dtype_of(bf16), Operand{a, m, k}, Operand{b, k, n}, adds);
  try {
    theirs->run(1);
  } catch (const std::exception&) {  // must not reach Python
    return nullptr;
  }
  return theirs.release();
}
void torch_run(Theirs* x, int64_t repeats) { x->run(repeats); }
void torch_clear(Theirs* x) { x->clear(); }
const float* torch_result(Theirs* x) { return x->result(); }
void torch_delete(Theirs* x) { delete x; }

const char* capability() { return usp::cpu::name(usp::cpu::capability_in_use()); }

// Floating point operations done, 0 where this machine has no loop.
double peak_run(bool bf16, int64_t repeats, float* sink) {
#if USP_CPU_X86
  using usp::cpu::Capability;
  const Capability machine = usp::cpu::capability_of_machine();
  if (bf16 && machine >= Capability::kAvx512Bf16) return peak_bf16(repeats, sink);
  if (machine >= Capability::kAvx512) return peak_avx512(repeats, sink);
  if (machine >= Capability::kAvx2) return peak_avx2(repeats, sink);
#endif
  (void)bf16, (void)repeats, (void)sink;
  return 0;
}

}  // extern "C"
