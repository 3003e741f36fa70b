// The Python module usp._C: what was built, and what of it this machine uses.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <iterator>
#include <sstream>

#include "cpu/capability.h"

#ifndef USP_VERSION
#define USP_VERSION "unknown"
#endif

namespace {

namespace py = pybind11;

constexpr bool kWithCuda =
#ifdef USP_WITH_CUDA
    true;
#else
    false;
#endif

constexpr bool kWithHip =
#ifdef USP_WITH_HIP
    true;
#else
    false;
#endif

#ifndef USP_GPU_ARCHITECTURES
#define USP_GPU_ARCHITECTURES ""
#endif

std::string compiler() {
#if defined(__clang__)
  return "clang " __clang_version__;
#elif defined(__GNUC__)
  return "gcc " __VERSION__;
#else
  return "unknown";
#endif
}

std::vector<std::string> words(const std::string& text) {
  std::istringstream stream(text);
  return {std::istream_iterator<std::string>(stream), {}};
}

py::dict build_info() {
  py::dict targets;
  targets["cpu"] = true;
  targets["cuda"] = kWithCuda;
  targets["hip"] = kWithHip;
  py::dict info;
  info["version"] = USP_VERSION;
  info["compiler"] = compiler();
  info["targets"] = targets;
  info["architectures"] = words(USP_GPU_ARCHITECTURES);
  return info;
}

std::vector<std::string> cpu_capabilities_built() {
  std::vector<std::string> names;
  for (const auto capability : usp::cpu::capabilities_built()) {
    names.emplace_back(usp::cpu::name(capability));
  }
  return names;
}

std::string cpu_capability() { return usp::cpu::name(usp::cpu::capability_in_use()); }

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "What usp's compiled extension was built with.";
  m.def("build_info", &build_info,
        "{'version': str, 'compiler': str, 'targets': {'cpu': bool, 'cuda': bool, 'hip': bool}, "
        "'architectures': list of str, what GPU kernels were compiled for, e.g. sm_90}");
  m.def("cpu_capability", &cpu_capability,
        "The highest instruction set that the CPU kernels have here: default, avx2, avx512, "
        "avx512_bf16 or amx; or the one that USP_CPU_CAPABILITY says.");
  m.def("cpu_capabilities_built", &cpu_capabilities_built,
        "Every instruction set that the CPU kernels were built for.");
}
