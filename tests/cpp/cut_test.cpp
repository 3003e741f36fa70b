// Tiles that an edge of the mask cuts: all that is seen is in them once, and the kernels read
// nothing else.

#include "cpu/cut.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <random>
#include <vector>

#include "cpu/kernels.h"

namespace usp::cpu {
namespace {

struct Ends {
  std::vector<int32_t> first, stop;
  Span span;

  // Rows that see nothing, few keys or all of `keys`.
  Ends(std::mt19937& random, int64_t rows, int64_t keys) {
    const auto up_to = [&](int64_t most) {
      return static_cast<int32_t>(std::uniform_int_distribution<int64_t>(0, most)(random));
    };
    const int64_t step = up_to(6), wide = up_to(2 * step + 1);
    int32_t low = up_to(keys) - up_to(keys), high = low + up_to(keys);
    for (int64_t i = 0; i < rows; ++i) {
      low += up_to(step);
      high = std::max(low, high + up_to(wide));
      first.push_back(std::clamp<int32_t>(low, 0, static_cast<int32_t>(keys)));
      stop.push_back(std::clamp<int32_t>(high, 0, static_cast<int32_t>(keys)));
    }
    span = {first.data(), stop.data(), rows, keys};
  }

  bool sees(int64_t row, int64_t key) const {
    return span.first[row] <= key && key < span.stop[row];
  }
};

bool holds(const Strip& strip, int64_t column, int64_t key) {
  return strip.columns.contains({column, column + 1}) && strip.keys.contains({key, key + 1});
}

// How many strips, and how many blocks, hold a cell.
std::pair<int, int> holders(const Cut& cut, int64_t column, int64_t key) {
  int strips = 0, blocks = 0;
  cut.for_each_strip([&](const Strip& strip) { strips += holds(strip, column, key); });
  cut.for_each_block([&](const Strip& block) { blocks += holds(block, column, key); });
  return {strips, blocks};
}

TEST(Cut, HoldsWhatIsSeenOnce) {
  std::mt19937 random(1);
  for (int round = 0; round < 3000; ++round) {
    const int64_t rows = 1 + random() % 64, behind = random() % 3, count = 1 + random() % 128;
    const int64_t columns = (rows + 15) / 16 * 16, unit = int64_t{1} << (random() % 5);
    const Ends ends(random, rows, behind + count);
    const Range keys{behind, behind + count};
    Cut cut;
    cut.set(ends.span, {0, rows}, keys, columns, unit);
    bool any = false;
    for (int64_t i = 0; i < columns; ++i) {
      bool some = false;
      for (int64_t j = 0; j < count; ++j) {
        const auto [strips, blocks] = holders(cut, i, j);
        const bool seen = i < rows && ends.sees(i, behind + j);
        some |= seen;
        ASSERT_LE(strips, 1);
        ASSERT_LE(blocks, 1);
        ASSERT_LE(strips, blocks);
        if (seen) ASSERT_EQ(strips, 1);
        if (unit == Cut::kRows) ASSERT_EQ(strips, blocks);  // gradients: products read whole blocks
      }
      any |= some;
      if (i < rows && cut.covers(rows)) {
        bool held = false;
        cut.for_each_strip([&](const Strip& s) { held |= s.rows.contains({i, i + 1}); });
        ASSERT_TRUE(held);
      }
    }
    ASSERT_EQ(any, !cut.empty());
    cut.for_each_strip([&](const Strip& strip) {
      ASSERT_EQ(strip.columns.begin % Cut::kRows, 0);
      ASSERT_TRUE(strip.keys.begin % unit == 0);
      ASSERT_TRUE(strip.keys.end % unit == 0 || strip.keys.end == count);
      ASSERT_TRUE(strip.columns.contains(strip.rows));
    });
  }
}

template <typename T>
class CutTiles : public testing::Test {
 protected:
  // Calls body(table, ends, tile) for cut tiles of numbers, NaN in no strip, at each level.
  template <typename Body>
  void on_cut_tiles(const Body& body) {
    std::mt19937 random(2);
    for (const Capability capability : capabilities_built()) {
      if (!has(capability)) continue;
      SCOPED_TRACE(name(capability));
      for (int round = 0; round < 100; ++round) {
        const int64_t rows = 17 + random() % 48, keys = 1 + random() % 128;
        const Ends ends(random, rows, keys);
        Cut cut;
        cut.set(ends.span, {0, rows}, {0, keys}, columns(rows), 1);
        cut_ = &cut;
        body(kernels_of<T>(capability, DType::kFloat32), ends,
             Tile<T>{nullptr, keys, columns(rows), T(1), &cut});
      }
    }
  }

  static int64_t columns(int64_t rows) { return (rows + 15) / 16 * 16; }

  bool held(int64_t column, int64_t key) const { return holders(*cut_, column, key).first == 1; }

  std::vector<T> numbers(const Tile<T>& tile) {
    std::uniform_real_distribution<double> number(-3, 3);
    std::vector<T> result;
    for (int64_t j = 0; j < tile.keys; ++j) {
      for (int64_t i = 0; i < tile.queries; ++i) {
        result.push_back(held(i, j) ? static_cast<T>(number(random_)) : std::nan(""));
      }
    }
    return result;
  }

 private:
  const Cut* cut_ = nullptr;
  std::mt19937 random_{3};
};
using Arithmetic = testing::Types<float, double>;
TYPED_TEST_SUITE(CutTiles, Arithmetic);

// Weights in the strips are those of the whole tile, masked.
TYPED_TEST(CutTiles, SoftmaxReadsTheStripsAlone) {
  using T = TypeParam;
  this->on_cut_tiles([&](const Kernels<T>& table, const Ends& ends, Tile<T> tile) {
    const int64_t columns = tile.queries, rows = ends.span.num_queries;
    const auto scores = this->numbers(tile);
    std::vector<T> s = scores, max(columns, -INFINITY), sum(columns), factor(columns);
    tile.data = s.data();
    table.mask(tile, {ends.first.data(), ends.stop.data(), rows, 0});
    table.softmax_update(tile, {max.data(), sum.data(), factor.data()}, nullptr, nullptr);
    for (int64_t i = 0; i < rows; ++i) {
      double largest = -INFINITY, total = 0;
      for (int64_t j = 0; j < tile.keys; ++j) {
        if (ends.sees(i, j)) largest = std::max<double>(largest, scores[j * columns + i]);
      }
      for (int64_t j = 0; j < tile.keys; ++j) {
        if (!this->held(i, j)) continue;
        const double expected = ends.sees(i, j) ? std::exp(scores[j * columns + i] - largest) : 0.0;
        ASSERT_NEAR(s[j * columns + i], expected, 1e-6);
        total += expected;
      }
      if (largest > -INFINITY) ASSERT_EQ(max[i], static_cast<T>(largest));
      ASSERT_NEAR(sum[i], total, 1e-5 * (1 + total));
    }
  });
}

// Gradients are written in the strips, and nowhere else.
TYPED_TEST(CutTiles, GradientsKeepToTheStrips) {
  using T = TypeParam;
  this->on_cut_tiles([&](const Kernels<T>& table, const Ends& ends, Tile<T> tile) {
    const int64_t columns = tile.queries, rows = ends.span.num_queries;
    const auto scores = this->numbers(tile), gradients = this->numbers(tile);
    std::vector<T> s = scores, dp = gradients, ds(scores.size(), T(7)), rooms[3];
    std::vector<T> lse(columns, T(2)), delta(columns, T(0.25));
    for (auto& room : rooms) room.resize(scores.size() + columns);
    tile.data = s.data();
    table.mask(tile, {ends.first.data(), ends.stop.data(), rows, 0});
    table.gradients({tile,
                     {dp.data(), tile.keys, columns, T(1), tile.cut},
                     lse.data(),
                     delta.data(),
                     nullptr,
                     nullptr,
                     ds.data(),
                     {rooms[0].data(), rooms[1].data(), rooms[2].data()}});
    for (int64_t j = 0; j < tile.keys; ++j) {
      for (int64_t i = 0; i < rows; ++i) {
        const int64_t at = j * columns + i;
        const double p = ends.sees(i, j) ? std::exp(scores[at] - 2.0) : 0.0;
        const double expected = this->held(i, j) ? p * (gradients[at] - 0.25) : 7.0;
        ASSERT_NEAR(ds[at], expected, 1e-5);
      }
    }
  });
}

}  // namespace
}  // namespace usp::cpu
