#!/usr/bin/env bash
# The C++ unit tests and the compiled ops' tests under AddressSanitizer and UBSan, with all scratch
# memory filled with NaN first. Runs the python and pytest of PATH; needs g++ or clang++ and cmake.
# usage: scripts/sanitize.sh [pytest arguments]
set -euo pipefail
cd "$(dirname "$0")/.."
build=build/sanitize
cxx=${CXX:-g++}

for tool in "$cxx" cmake pytest; do
  command -v "$tool" >/dev/null || { echo "[usp] sanitize: $tool is missing" >&2; exit 1; }
done
log=$(mktemp)
trap 'rm -f "$log"' EXIT
quietly() { "$@" >"$log" 2>&1 || { cat "$log" >&2; exit 1; }; }

quietly cmake -S . -B "$build" -DUSP_SANITIZE=ON -DCMAKE_CXX_COMPILER="$cxx" \
  -DPython3_EXECUTABLE="$(command -v python)"
quietly cmake --build "$build" --parallel "${MAX_JOBS:-2}"
library=$PWD/$build/_ops.so
[ -e "$library" ] || { echo "[usp] sanitize: $library was not built: is torch there?" >&2; exit 1; }

# Python, torch and the allocator of both keep what they allocate: leaks are not ours to find.
export ASAN_OPTIONS=detect_leaks=0:abort_on_error=0
export UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1
ctest --test-dir "$build" --output-on-failure

# The runtime must come first; libstdc++ with it, because it intercepts what that throws.
runtime="$("$cxx" -print-file-name=libasan.so) $("$cxx" -print-file-name=libstdc++.so)"
USP_OPS_LIBRARY=$library LD_PRELOAD=$runtime OMP_NUM_THREADS=2 \
  pytest -p no:cacheprovider tests/contract -m 'not device_code' "$@"
