#pragma once

// Refusals that carry both numbers, and shape checks that bind names.

#include <cstdint>
#include <map>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

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
  std::string name;
  bool may_be_one;

  DimName(const char* text) : name(text), may_be_one(false) {  // NOLINT: implicit on purpose
    const auto bar = name.find('|');
    if (bar == std::string::npos) return;
    may_be_one = true;
    name.resize(bar);
  }
};

// Binds each name to the first size seen for it and refuses a later size that differs.
class ShapeChecker {
 public:
  void check_shape(const std::string& tensor, const int64_t* sizes, int64_t dim,
                   const std::vector<DimName>& expected) {
    const auto count = static_cast<int64_t>(expected.size());
    check(dim == count, tensor, " has ", dim, " dims, expected ", count, " ", describe(expected));
    for (int64_t d = 0; d < count; ++d) check_dim(tensor, d, sizes[d], expected[d]);
  }

  int64_t operator[](const std::string& name) const { return bound_.at(name).size; }

 private:
  struct Binding {
    int64_t size;
    std::string tensor;
  };

  void check_dim(const std::string& tensor, int64_t d, int64_t size, const DimName& expected) {
    if (expected.may_be_one && size == 1) return;
    const auto [binding, is_new] = bound_.try_emplace(expected.name, Binding{size, tensor});
    if (is_new) return;
    check(size == binding->second.size, tensor, ": dim ", d, " (", expected.name, ") is ", size,
          ", but ", binding->second.tensor, " has ", expected.name, " = ", binding->second.size,
          expected.may_be_one ? " (or 1 to broadcast)" : "");
  }

  static std::string describe(const std::vector<DimName>& expected) {
    std::string text = "(";
    for (const auto& dim : expected) {
      text += (text.size() > 1 ? ", " : "") + dim.name + (dim.may_be_one ? "|1" : "");
    }
    return text + ")";
  }

  std::map<std::string, Binding> bound_;
};

}  // namespace usp
