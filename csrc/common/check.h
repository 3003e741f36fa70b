#pragma once

// Refusals that carry both numbers, and shape checks that bind names.

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstdlib>
#include <initializer_list>
#include <sstream>
#include <stdexcept>
#include <string_view>

namespace usp {

template <typename... Parts>
void check(bool condition, const Parts&... parts) {
  if (condition) return;
  std::ostringstream message;
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

// One dimension of an expected shape: a name ("B"), or a name that may also be broadcast ("B|1").
struct DimName {
  std::string_view name;
  bool may_be_one;

  constexpr DimName(const char* text)  // NOLINT: implicit on purpose
      : name(text), may_be_one(name.ends_with("|1")) {
    if (may_be_one) name.remove_suffix(2);
  }
};

using DimNames = std::initializer_list<DimName>;

// Binds each name to the first size seen for it and refuses a later size that differs. Without
// memory of its own: the checks of a short sequence would take as long as its attention.
class ShapeChecker {
 public:
  void check_shape(const char* tensor, const int64_t* sizes, int64_t dim, DimNames expected) {
    const auto count = static_cast<int64_t>(expected.size());
    if (dim != count) refuse_dims(tensor, dim, expected);
    int64_t d = 0;
    for (const DimName& name : expected) {
      check_dim(tensor, d, sizes[d], name);
      ++d;
    }
  }

  int64_t operator[](std::string_view name) const {
    const Binding* found = find(name);
    check(found != nullptr, "no tensor has a dim ", name);
    return found->size;
  }

 private:
  struct Binding {
    std::string_view name;
    int64_t size;
    const char* tensor;
  };

  const Binding* find(std::string_view name) const {
    const Binding* end = bound_.data() + count_;
    const auto* found = std::find_if(bound_.data(), end, [&](auto& b) { return b.name == name; });
    return found == end ? nullptr : found;
  }

  void check_dim(const char* tensor, int64_t d, int64_t size, const DimName& expected) {
    if (expected.may_be_one && size == 1) return;
    const Binding* binding = find(expected.name);
    if (binding == nullptr) {
      check(count_ < bound_.size(), "more than ", bound_.size(), " names of dims");
      bound_[count_++] = {expected.name, size, tensor};
      return;
    }
    check(size == binding->size, tensor, ": dim ", d, " (", expected.name, ") is ", size, ", but ",
          binding->tensor, " has ", expected.name, " = ", binding->size,
          expected.may_be_one ? " (or 1 to broadcast)" : "");
  }

  [[noreturn]] static void refuse_dims(const char* tensor, int64_t dim, DimNames expected) {
    std::ostringstream names;
    for (const DimName& name : expected) {
      names << (names.tellp() > 0 ? ", " : "") << name.name << (name.may_be_one ? "|1" : "");
    }
    check(false, tensor, " has ", dim, " dims, expected ", expected.size(), " (", names.str(), ")");
    std::abort();
  }

  std::array<Binding, 16> bound_;
  size_t count_ = 0;
};

}  // namespace usp
