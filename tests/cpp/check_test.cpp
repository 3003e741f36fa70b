#include "common/check.h"

#include <gtest/gtest.h>

namespace usp {
namespace {

std::string message_of(const std::function<void()>& act) {
  try {
    act();
  } catch (const std::runtime_error& error) {
    return error.what();
  }
  return "nothing was refused";
}

TEST(ShapeChecker, BindsNamesAndRefusesWithBothNumbers) {
  ShapeChecker shapes;
  const int64_t q[] = {2, 7, 4}, k[] = {2, 5, 3}, ones[] = {1, 7, 1};
  shapes.check_shape("q", q, 3, {"B", "Lq", "H"});
  EXPECT_EQ(shapes["H"], 4);
  EXPECT_EQ(message_of([&] { shapes.check_shape("k", k, 3, {"B", "Lk", "H"}); }),
            "k: dim 2 (H) is 3, but q has H = 4");
  EXPECT_EQ(message_of([&] { shapes.check_shape("k", k, 2, {"B", "Lk", "H"}); }),
            "k has 2 dims, expected 3 (B, Lk, H)");
  EXPECT_NO_THROW(shapes.check_shape("ones", ones, 3, {"B|1", "Lq|1", "H|1"}));
  EXPECT_EQ(message_of([&] { shapes.check_shape("k", k, 3, {"B|1", "Lq|1", "H|1"}); }),
            "k: dim 1 (Lq) is 5, but q has Lq = 7 (or 1 to broadcast)");
}

}  // namespace
}  // namespace usp
