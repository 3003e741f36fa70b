#include <gtest/gtest.h>

#include <cstring>
#include <numeric>

#include "common/pack.h"

namespace usp {
namespace {

std::vector<char> numbered(size_t count) {
  std::vector<char> bytes(count);
  std::iota(bytes.begin(), bytes.end(), char{0});
  return bytes;
}

// Plainly, byte by byte.
void pack(const Piece& piece, char* message) {
  char* to = message + piece.offset;
  for (int64_t run = 0; run < piece.runs(); ++run) {
    const char* from = piece.data;
    int64_t index = run;
    for (int d = Piece::kDims - 1; d >= 0; --d) {
      from += index % piece.sizes[d] * piece.strides[d];
      index /= piece.sizes[d];
    }
    std::memcpy(to, from, piece.run);
    to += piece.run;
  }
}

TEST(Piece, JoinsWhatLiesOneBehindTheOther) {
  std::vector<char> data(1000);
  const int64_t sizes[] = {2, 3, 1, 4}, whole[] = {12, 4, 77, 1}, cut[] = {24, 4, 77, 1},
                transposed[] = {1, 2, 77, 6};
  const auto one = pieces_of({{data.data(), 2, 4, sizes, whole}});
  ASSERT_EQ(one.size(), 1);
  EXPECT_EQ(one[0].run, 48);
  EXPECT_EQ(one[0].runs(), 1);
  const auto two = pieces_of({{data.data(), 2, 4, sizes, cut}, {data.data(), 2, 4, sizes, whole}});
  EXPECT_EQ(two[0].run, 24);
  EXPECT_EQ(two[0].sizes[3], 2);
  EXPECT_EQ(two[0].strides[3], 48);
  EXPECT_EQ(two[1].offset, 48);
  EXPECT_EQ(pieces_of({{data.data(), 2, 4, sizes, transposed}})[0].run, 2);
}

TEST(Piece, CutIntoPartsItIsTheSameMessage) {
  std::vector<char> data = numbered(251);
  const Piece runs{data.data(), 3, 5, {1, 3, 2, 4}, {0, 70, 31, 6}};
  const Piece run{data.data() + 1, 3, 120, {1, 1, 1, 1}, {}};
  for (const Piece& piece : {runs, run}) {
    ASSERT_EQ(piece.bytes(), 120);
    std::vector<char> want(140), got(140);
    pack(piece, want.data());
    for (const int64_t most : {1000, 119, 64, 40, 16}) {
      std::vector<Piece> parts;
      cut(piece, most, 4, parts);
      EXPECT_EQ(parts.size() > 1, most < 120);
      std::fill(got.begin(), got.end(), char{0});
      for (const Piece& part : parts) {
        EXPECT_LE(part.bytes(), most);
        EXPECT_TRUE(part.run == piece.run || part.data == piece.data ||
                    (part.offset - piece.offset) % 4 == 0);
        pack(part, got.data());
      }
      EXPECT_EQ(got, want) << most;
    }
  }
}

}  // namespace
}  // namespace usp
