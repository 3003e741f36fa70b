#!/usr/bin/env bash
# The C++ unit tests, by CMake and GoogleTest; says so where one of them is missing.
set -euo pipefail
cd "$(dirname "$0")/.."
build=build/cpp-tests

for tool in cmake "${CXX:-c++}"; do
  if ! command -v "$tool" >/dev/null; then
    echo "[usp] C++ unit tests left out: $tool is not installed"
    exit 0
  fi
done
# The unit tests need no torch: the extension is built, with -O3, and tested from Python. -O1: most of
# the time goes into compiling.
options=(-DUSP_TESTS=ON -DCMAKE_DISABLE_FIND_PACKAGE_Torch=ON -DCMAKE_DISABLE_FIND_PACKAGE_Python3=ON
  -DCMAKE_BUILD_TYPE=None -DCMAKE_CXX_FLAGS=-O1)
generator=()
if command -v ninja >/dev/null; then generator=(-G Ninja); fi
log=$(mktemp)
trap 'rm -f "$log"' EXIT
if ! cmake -S . -B "$build" "${generator[@]}" "${options[@]}" >"$log" 2>&1; then
  cat "$log"
  exit 1
fi
if ! cmake --build "$build" --parallel "${MAX_JOBS:-2}" >"$log" 2>&1; then
  cat "$log"
  exit 1
fi
if [ "$(ctest --test-dir "$build" -N | sed -n 's/^Total Tests: //p')" = 0 ]; then
  echo "[usp] C++ unit tests left out: GoogleTest is not installed (Debian: libgtest-dev)"
  exit 0
fi
if ! ctest --test-dir "$build" --output-on-failure >"$log" 2>&1; then
  cat "$log"
  exit 1
fi
echo "[usp] C++ unit tests: $(sed -n 's/^100% tests passed, .* out of \([0-9]*\)$/\1 passed/p' "$log")"
