#include "common/philox.h"

#include <gtest/gtest.h>

namespace usp {
namespace {

void expect_words(PhiloxWords counter, PhiloxKey key, PhiloxWords expected) {
  const PhiloxWords words = philox4x32_10(counter, key);
  for (int i = 0; i < 4; ++i) EXPECT_EQ(words.word[i], expected.word[i]) << "word " << i;
}

// The known answers that Random123 publishes for philox4x32 with 10 rounds.
TEST(Philox, KnownAnswers) {
  expect_words({{0, 0, 0, 0}}, {0, 0}, {{0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}});
  expect_words({{0xffffffff, 0xffffffff, 0xffffffff, 0xffffffff}}, {0xffffffff, 0xffffffff},
               {{0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}});
  expect_words({{0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344}}, {0xa4093822, 0x299f31d0},
               {{0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}});
}

TEST(Philox, KeyIsTheSeedLowWordFirst) {
  const PhiloxKey key = philox_key(0x0123456789abcdefu);
  EXPECT_EQ(key.low, 0x89abcdefu);
  EXPECT_EQ(key.high, 0x01234567u);
}

TEST(Philox, ThresholdDropsTheWantedShare) {
  EXPECT_EQ(dropout_threshold(0.0), 0u);
  EXPECT_EQ(dropout_threshold(0.5), 0x80000000u);
  EXPECT_EQ(dropout_threshold(0.999999999999), 0xffffffffu);
}

}  // namespace
}  // namespace usp
