// Whole calls of the CPU's attention, forward and backward in two blocks of keys, against plain
// loops in fp64. The contract's table (tests/contract) has every option; this runs where Python
// does not, as under the emulator of another CPU.

#include "cpu/attention.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <limits>
#include <random>
#include <thread>
#include <vector>

#include "cpu/capability.h"

namespace usp::cpu {
namespace {

struct Case {
  int64_t B = 2, Lq = 37, Lk = 83, H = 4, D = 24, Dv = 40, group = 2;
  int64_t offset = 0, window = 0;  // keys that the last query sees; 0: every query sees all
  double softcap = 0;
  bool alibi = false, bias = false;
  DType dtype = DType::kFloat32;

  int64_t G() const { return (H - 1 + offset) / group - offset / group + 1; }
};

struct Numbers {
  std::vector<double> q, k, v, dout, bias, slopes;
  std::vector<int32_t> first, stop, q_pos, k_pos;
};

struct Results {
  std::vector<double> out, lse, dq, dk, dv, dbias;
};

uint16_t to_bf16(double x) {
  const auto value = static_cast<float>(x);
  uint32_t bits;
  __builtin_memcpy(&bits, &value, sizeof(bits));
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

double rounded(double x, DType dtype) {
  if (dtype == DType::kFloat64) return x;
  if (dtype == DType::kFloat32) return static_cast<float>(x);
  const uint32_t bits = static_cast<uint32_t>(to_bf16(x)) << 16;
  float value;
  __builtin_memcpy(&value, &bits, sizeof(value));
  return value;
}

Numbers numbers(const Case& c) {
  std::mt19937 random{7};
  std::normal_distribution<double> normal;
  const auto some = [&](int64_t count, DType dtype) {
    std::vector<double> found(static_cast<size_t>(count));
    for (double& x : found) x = rounded(normal(random), dtype);
    return found;
  };
  Numbers x;
  x.q = some(c.B * c.Lq * c.H * c.D, c.dtype), x.k = some(c.B * c.Lk * c.G() * c.D, c.dtype);
  x.v = some(c.B * c.Lk * c.G() * c.Dv, c.dtype), x.dout = some(c.B * c.Lq * c.H * c.Dv, c.dtype);
  x.bias = some(c.H * c.Lk, DType::kFloat32);  // one for all samples and queries
  x.slopes = some(c.H, DType::kFloat32);
  for (int64_t i = 0; i < c.Lq; ++i) {
    const int64_t last = c.Lk - c.Lq + i + 1;
    x.first.push_back(static_cast<int32_t>(std::max<int64_t>(0, last - c.window)));
    x.stop.push_back(static_cast<int32_t>(last));
    x.q_pos.push_back(static_cast<int32_t>(3 * i + 50));
  }
  for (int64_t j = 0; j < c.Lk; ++j) x.k_pos.push_back(static_cast<int32_t>(2 * j));
  return x;
}

double product(const double* a, const double* b, int64_t count) {
  double sum = 0;
  for (int64_t d = 0; d < count; ++d) sum += a[d] * b[d];
  return sum;
}

void add(double factor, const double* from, int64_t count, double* to) {
  for (int64_t d = 0; d < count; ++d) to[d] += factor * from[d];
}

Results expected(const Case& c, const Numbers& x) {
  const double scale = 1 / std::sqrt(static_cast<double>(c.D));
  Results r{std::vector<double>(x.dout.size()),
            std::vector<double>(static_cast<size_t>(c.B * c.H * c.Lq)),
            std::vector<double>(x.q.size()),
            std::vector<double>(x.k.size()),
            std::vector<double>(x.v.size()),
            std::vector<double>(x.bias.size())};
  std::vector<double> s(static_cast<size_t>(c.Lk)), slope = s;
  for (int64_t row = 0; row < c.B * c.Lq * c.H; ++row) {
    const int64_t b = row / (c.Lq * c.H), i = row / c.H % c.Lq, h = row % c.H;
    const int64_t g = (h + c.offset) / c.group - c.offset / c.group;
    const auto key = [&](int64_t j) { return (b * c.Lk + j) * c.G() + g; };
    const int64_t begin = c.window ? x.first[i] : 0, end = c.window ? x.stop[i] : c.Lk;
    double sum = 0;
    for (int64_t j = begin; j < end; ++j) {
      const double raw = scale * product(&x.q[row * c.D], &x.k[key(j) * c.D], c.D);
      const double capped = c.softcap ? std::tanh(raw / c.softcap) : 0;
      s[j] = c.softcap ? c.softcap * capped : raw;
      slope[j] = scale * (1 - capped * capped);
      if (c.bias) s[j] += x.bias[h * c.Lk + j];
      if (c.alibi) s[j] -= x.slopes[h] * std::abs(x.q_pos[i] - x.k_pos[j]);
      sum += std::exp(s[j]);
    }
    const double lse = r.lse[(b * c.H + h) * c.Lq + i] = std::log(sum);
    double* out = &r.out[row * c.Dv];
    const double* dout = &x.dout[row * c.Dv];
    for (int64_t j = begin; j < end; ++j) add(std::exp(s[j] - lse), &x.v[key(j) * c.Dv], c.Dv, out);
    const double delta = product(out, dout, c.Dv);
    for (int64_t j = begin; j < end; ++j) {
      const double p = std::exp(s[j] - lse);
      const double ds = p * (product(dout, &x.v[key(j) * c.Dv], c.Dv) - delta);
      add(p, dout, c.Dv, &r.dv[key(j) * c.Dv]);
      add(ds * slope[j], &x.q[row * c.D], c.D, &r.dk[key(j) * c.D]);
      add(ds * slope[j], &x.k[key(j) * c.D], c.D, &r.dq[row * c.D]);
      r.dbias[h * c.Lk + j] += ds;
    }
  }
  return r;
}

// A tensor in the dtype of a case.
class Held {
 public:
  Held(const std::vector<double>& x, DType dtype) : dtype_(dtype) {
    const size_t size = dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2;
    bytes_.resize(x.size() * size);
    for (size_t i = 0; i < x.size(); ++i) {
      const auto single = static_cast<float>(x[i]);
      const uint16_t half = to_bf16(x[i]);
      const void* from = size == 8   ? static_cast<const void*>(&x[i])
                         : size == 4 ? static_cast<const void*>(&single)
                                     : static_cast<const void*>(&half);
      __builtin_memcpy(bytes_.data() + i * size, from, size);
    }
  }

  // Its rows from `row` on, of (B, length, heads, width).
  TensorView view(int64_t length, int64_t heads, int64_t width, int64_t row = 0) const {
    const size_t size = dtype_ == DType::kFloat64 ? 8 : dtype_ == DType::kFloat32 ? 4 : 2;
    const int64_t skipped = row * heads * width * static_cast<int64_t>(size);
    return {bytes_.data() + skipped, dtype_, length * heads * width, heads * width, width};
  }

 private:
  DType dtype_;
  std::vector<unsigned char> bytes_;
};

ParallelFor threads(int64_t number) {
  return {number, [](int64_t workers, const std::function<void(int64_t)>& body) {
            std::vector<std::thread> others;
            for (int64_t w = 1; w < workers; ++w) others.emplace_back(body, w);
            body(0);
            for (std::thread& other : others) other.join();
          }};
}

// Keys [0, split) are one block, the others the next. Each has contiguous gradients of its own.
template <typename T>
Results computed(const Case& c, const Numbers& x, int64_t split) {
  const Held q(x.q, c.dtype), k(x.k, c.dtype), v(x.v, c.dtype), dout(x.dout, c.dtype);
  const std::vector<T> bias(x.bias.begin(), x.bias.end()), slopes(x.slopes.begin(), x.slopes.end());
  std::vector<T> out(x.dout.size()), delta(static_cast<size_t>(c.B * c.H * c.Lq)), dq(x.q.size());
  std::vector<T> lse(delta.size(), -std::numeric_limits<T>::infinity());
  std::vector<T> dbias(x.bias.size());
  Results r{{}, {}, {}, std::vector<double>(x.k.size()), std::vector<double>(x.v.size()), {}};
  const ParallelFor parallel = threads(2);
  std::vector<int32_t> first, stop;
  const auto block = [&](int64_t begin, int64_t end) {
    Attention<T> a;
    a.B = c.B, a.Lq = c.Lq, a.Lk = end - begin, a.H = c.H, a.G = c.G(), a.D = c.D, a.Dv = c.Dv;
    a.q = q.view(c.Lq, c.H, c.D);
    a.k = k.view(c.Lk, c.G(), c.D, begin), a.v = v.view(c.Lk, c.G(), c.Dv, begin);
    a.span = {nullptr, nullptr, c.Lq, end - begin};
    if (c.window) {
      const auto here = [&](int32_t at) {
        return static_cast<int32_t>(std::clamp<int64_t>(at, begin, end) - begin);
      };
      first.clear(), stop.clear();
      for (const int32_t at : x.first) first.push_back(here(at));
      for (const int32_t at : x.stop) stop.push_back(here(at));
      a.span.first = first.data(), a.span.stop = stop.data();
    }
    if (c.bias) a.bias = {bias.data() + begin, 0, c.Lk, 0, 1};
    if (c.alibi) a.alibi_slopes = slopes.data(), a.alibi_head_stride = 1;
    a.q_pos = x.q_pos.data(), a.k_pos = x.k_pos.data() + begin;
    a.head_offset = c.offset, a.num_heads = c.H + c.offset, a.group_size = c.group;
    a.softmax_scale = 1 / std::sqrt(static_cast<double>(c.D)), a.softcap = c.softcap;
    return a;
  };
  const std::vector<Range> blocks{{0, split}, {split, c.Lk}};
  for (const Range keys : blocks) {
    attention_forward<T>(block(keys.begin, keys.end), {out.data(), lse.data()}, parallel);
  }
  const std::vector<double> found_out(out.begin(), out.end());
  const Held held(found_out, c.dtype);
  const TensorView given = dout.view(c.Lq, c.H, c.Dv);
  attention_delta<T>({c.B, c.Lq, c.H, c.Dv, given, held.view(c.Lq, c.H, c.Dv), delta.data()},
                     parallel);
  for (const Range keys : blocks) {
    const int64_t of_k = c.G() * c.D, of_v = c.G() * c.Dv, length = keys.size();
    std::vector<T> dk(static_cast<size_t>(c.B * length * of_k)),
        dv(static_cast<size_t>(c.B * length * of_v));
    AttentionGradients<T> grads{};
    grads.dout = given, grads.delta = delta.data(), grads.lse = lse.data();
    grads.dq = dq.data(), grads.dk = dk.data(), grads.dv = dv.data();
    if (c.bias) grads.dbias = {dbias.data() + keys.begin, 0, c.Lk, 0, 1};
    attention_backward<T>(block(keys.begin, keys.end), grads, parallel);
    for (int64_t b = 0; b < c.B; ++b) {
      std::copy_n(dk.begin() + b * length * of_k, length * of_k,
                  r.dk.begin() + (b * c.Lk + keys.begin) * of_k);
      std::copy_n(dv.begin() + b * length * of_v, length * of_v,
                  r.dv.begin() + (b * c.Lk + keys.begin) * of_v);
    }
  }
  r.out = found_out, r.lse.assign(lse.begin(), lse.end()), r.dq.assign(dq.begin(), dq.end());
  r.dbias.assign(dbias.begin(), dbias.end());
  return r;
}

void expect_near(const char* name, const std::vector<double>& found,
                 const std::vector<double>& wanted, double allowed) {
  double error = 0, largest = 0;
  ASSERT_EQ(found.size(), wanted.size()) << name;
  for (size_t i = 0; i < found.size(); ++i) {
    const double off = std::abs(found[i] - wanted[i]);
    if (!(off <= error)) error = off;  // NaN too
    largest = std::max(largest, std::abs(wanted[i]));
  }
  EXPECT_LE(error, allowed * largest) << name;
}

void expect_right(const Case& c) {
  const Numbers x = numbers(c);
  const Results wanted = expected(c, x);
  for (const int64_t split : {int64_t{0}, int64_t{53}}) {
    const bool doubles = c.dtype == DType::kFloat64;
    const Results found = doubles ? computed<double>(c, x, split) : computed<float>(c, x, split);
    const double allowed = doubles ? 1e-12 : c.dtype == DType::kFloat32 ? 2e-5 : 2e-2;
    expect_near("out", found.out, wanted.out, allowed);
    expect_near("lse", found.lse, wanted.lse, allowed);
    expect_near("dq", found.dq, wanted.dq, allowed);
    expect_near("dk", found.dk, wanted.dk, allowed);
    expect_near("dv", found.dv, wanted.dv, allowed);
    if (c.bias) expect_near("dbias", found.dbias, wanted.dbias, allowed);
  }
}

// At every level that this machine has.
class Attentions : public testing::TestWithParam<Capability> {};

TEST_P(Attentions, AreWhatPlainLoopsFind) {
  if (!has(GetParam())) GTEST_SKIP() << "this machine has no " << name(GetParam());
  setenv("USP_CPU_CAPABILITY", name(GetParam()), 1);
  for (const DType dtype : {DType::kFloat32, DType::kFloat64, DType::kBFloat16}) {
    SCOPED_TRACE(static_cast<int>(dtype));
    Case plain;
    plain.dtype = dtype;
    expect_right(plain);
    Case causal = plain;
    causal.window = causal.Lk, causal.offset = 1, causal.H = 3;
    expect_right(causal);
    Case window = plain;
    window.window = 19, window.alibi = true, window.group = 1;
    expect_right(window);
    Case capped = plain;
    capped.softcap = 1.5, capped.bias = true, capped.D = 64, capped.Dv = 17;
    expect_right(capped);
    Case tiles = causal;  // more than one of rows and of keys
    tiles.B = 1, tiles.Lq = 131, tiles.Lk = 313, tiles.window = 290, tiles.D = 80, tiles.Dv = 64;
    expect_right(tiles);
  }
  unsetenv("USP_CPU_CAPABILITY");
}

INSTANTIATE_TEST_SUITE_P(Levels, Attentions, testing::ValuesIn(capabilities_built()),
                         [](const auto& info) { return std::string(name(info.param)); });

}  // namespace
}  // namespace usp::cpu
