#!/usr/bin/env bash
# The C++ unit tests, by CMake and GoogleTest; says so where one of them is missing.
set -euo pipefail
cd "$(dirname "$0")/.."
build=build/cpp-tests

if ! command -v cmake >/dev/null; then
  echo "[usp] C++ unit tests left out: cmake is not installed"
  exit 0
fi
generator=()
if command -v ninja >/dev/null; then generator=(-G Ninja); fi
log=$(mktemp)
trap 'rm -f "$log"' EXIT
if ! cmake -S . -B "$build" "${generator[@]}" -DCMAKE_BUILD_TYPE=Release -DUSP_TESTS=ON >"$log" 2>&1; then
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
ctest --test-dir "$build" --output-on-failure
