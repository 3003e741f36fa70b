#include "cpu/fastest.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>

#include "cpu/tiles.h"

namespace usp::cpu {
namespace {

constexpr int64_t kKeys = 128, kQueries = 64, kDim = 64, kTiles = 4;
constexpr int kRounds = 5;
constexpr float kScale = 0.125f;
constexpr double kAllowed = 0.02;  // of bf16 weights

// bf16 of 1/8 steps in [-1, 1], the same at every level.
std::vector<uint16_t> numbers(int64_t count, uint32_t seed) {
  std::vector<uint16_t> halves(static_cast<size_t>(count));
  for (uint16_t& half : halves) {
    seed = seed * 1664525u + 1013904223u;
    const float x = static_cast<float>(static_cast<int32_t>(seed >> 28) - 8) / 8;
    uint32_t bits;
    __builtin_memcpy(&bits, &x, sizeof(bits));
    half = static_cast<uint16_t>(bits >> 16);
  }
  return halves;
}

// What a task of the forward does with keys: a few tiles of query rows meet them.
class Tiles {
 public:
  explicit Tiles(const Kernels<float>& table) : table_(table) {}

  void run() {
    const Products<float> products(table_);
    const auto bf16 = DType::kBFloat16;
    const auto k = table_.left_rows(bf16, k_in_.data(), kDim, kKeys, kDim, {k_.data(), kDim});
    const auto v = by_query_sums(table_, v_.data(), table_.in_words(kKeys), kDim);
    table_.weighted_rows(bf16, v_in_.data(), kDim, kKeys, kDim, v);
    const auto q = table_.left_rows(bf16, q_in_.data(), kDim, kQueries, kDim, {q_.data(), kDim});
    table_.right_transpose(q, kQueries, kDim, {q_t_.data(), kQueries});
    for (int64_t tile = 0; tile < kTiles; ++tile) {
      std::fill(max_.begin(), max_.end(), -INFINITY);
      std::fill(sum_.begin(), sum_.end(), 0.0f);
      table_.gemm({kKeys,
                   kQueries,
                   kDim,
                   k,
                   {q_t_.data(), kQueries},
                   {s_.data(), kQueries},
                   {table_.scales_late ? 1.0f : kScale, false}});
      const auto weights =
          table_.softmax_update({s_.data(), kKeys, kQueries, table_.scales_late ? kScale : 1.0f},
                                {max_.data(), sum_.data(), factor_.data()}, nullptr, p_.data());
      const auto sums = by_query_sums(table_, out_.data(), kQueries, kDim);
      table_.gemm({kQueries, kDim, kKeys, weights, as_const(v), sums, {1.0f, false}});
      const auto rows = as_rows(table_, sums, kQueries, kDim, rows_.data());
      std::copy_n(rows.data, kQueries * kDim, out.data());
    }
  }

  std::vector<float> out = std::vector<float>(kQueries * kDim);

 private:
  const Kernels<float>& table_;
  std::vector<uint16_t> q_in_ = numbers(kQueries * kDim, 1), k_in_ = numbers(kKeys * kDim, 2),
                        v_in_ = numbers(kKeys * kDim, 3);
  std::vector<float> q_ = std::vector<float>(kQueries * kDim), q_t_ = q_,
                     k_ = std::vector<float>(kKeys * kDim), v_ = k_,
                     s_ = std::vector<float>(kKeys * kQueries), p_ = s_, out_ = out, rows_ = out,
                     max_ = std::vector<float>(kQueries), sum_ = max_, factor_ = max_;
};

double error_of(const std::vector<float>& found, const std::vector<float>& expected) {
  double error = 0, largest = 0;
  for (size_t i = 0; i < found.size(); ++i) {
    const double off = std::abs(static_cast<double>(found[i]) - expected[i]);
    if (!(off <= error)) error = off;  // NaN too
    largest = std::max(largest, std::abs(static_cast<double>(expected[i])));
  }
  return error / largest;
}

Capability fastest_here() {
  std::vector<Capability> levels;
#if USP_CPU_X86
  constexpr Capability kRivals[] = {Capability::kAvx512, Capability::kAvx512Bf16, Capability::kAmx};
#else
  constexpr Capability kRivals[] = {Capability::kDefault, Capability::kNeonBf16};
#endif
  for (const Capability level : kRivals) {
    if (has(level)) levels.push_back(level);
  }
  if (levels.size() < 2) return capability_of_machine();
  return choose(try_levels(levels));
}

}  // namespace

std::vector<Trial> try_levels(const std::vector<Capability>& levels) {
  std::vector<Tiles> tiles;
  std::vector<Trial> trials;
  for (const Capability level : levels) {
    tiles.emplace_back(kernels_of<float>(level, DType::kBFloat16));
    tiles.back().run();
    trials.push_back({level, INFINITY, error_of(tiles.back().out, tiles.front().out)});
  }
  using Clock = std::chrono::steady_clock;
  for (int round = 0; round < kRounds; ++round) {
    for (size_t i = 0; i < tiles.size(); ++i) {
      const auto start = Clock::now();
      tiles[i].run();
      const std::chrono::duration<double> taken = Clock::now() - start;
      trials[i].seconds = std::min(trials[i].seconds, taken.count());
    }
  }
  return trials;
}

Capability choose(const std::vector<Trial>& trials) {
  Trial best = trials.front();
  for (const Trial& trial : trials) {
    if (!(trial.error <= kAllowed)) {
      std::fprintf(stderr,
                   "usp: CPU level %s is off by %.2g of the largest value, more than %.2g, and is "
                   "left out; please report it with your CPU's name\n",
                   name(trial.capability), trial.error, kAllowed);
      continue;
    }
    if (trial.seconds < best.seconds) best = trial;
  }
  return best.capability;
}

Capability capability_for(DType inputs) {
  const char* wanted = std::getenv("USP_CPU_CAPABILITY");
  const bool forced = wanted != nullptr && *wanted != '\0';
  if (forced || inputs != DType::kBFloat16) return capability_in_use();
  static const Capability fastest = fastest_here();
  return fastest;
}

}  // namespace usp::cpu
