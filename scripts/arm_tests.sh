#!/usr/bin/env bash
# The C++ unit tests of the CPU kernels on 64-bit ARM: by a cross compiler, under user-mode
# emulation of a CPU with BF16 instructions and of one without, where the level that needs them is
# left out. Says so where a tool is missing.
# usage: scripts/arm_tests.sh
set -euo pipefail
cd "$(dirname "$0")/.."
compiler=${ARM_CXX:-aarch64-linux-gnu-g++}
emulator=${ARM_EMULATOR:-qemu-aarch64-static}
googletest=${GOOGLETEST:-/usr/src/googletest/googletest}

for tool in "$compiler" "$emulator"; do
  if ! command -v "$tool" >/dev/null; then
    echo "[usp] ARM unit tests left out: $tool is not installed (Debian: g++-aarch64-linux-gnu, qemu-user-static)"
    exit 0
  fi
done
if [ ! -e "$googletest/src/gtest-all.cc" ]; then
  echo "[usp] ARM unit tests left out: no sources of GoogleTest in $googletest (Debian: googletest)"
  exit 0
fi

build=build/arm-tests
mkdir -p "$build"
tests=(tests/cpp/{attention,check,cut,kernels,philox,piece,softmax,span}_test.cpp)
sources=("${tests[@]}" csrc/cpu/*.cpp "$googletest"/src/gtest-all.cc "$googletest"/src/gtest_main.cc)
objects=()
for source in "${sources[@]}"; do objects+=("$build/$(basename "$source").o"); done
# -O1: what is tested is emulated anyway.
compile='"$0" -std=c++20 -O1 -Wall -Wextra -Icsrc -isystem "$3"/include -isystem "$3" -c "$1" -o "$2/$(basename "$1").o"'
printf '%s\0' "${sources[@]}" |
  xargs -0 -P "${MAX_JOBS:-2}" -I{} bash -c "$compile" "$compiler" {} "$build" "$googletest"
"$compiler" -static "${objects[@]}" -o "$build/tests" 2>"$build/link.log" || { cat "$build/link.log"; exit 1; }

# run CPU LEVEL [FILTER]: LEVEL is the highest that the kernels must find on that CPU.
run() {
  if ! USP_EXPECTED_CAPABILITY=$2 "$emulator" -cpu "$1" "$build/tests" --gtest_brief=1 \
    --gtest_filter="${3:-*}" >"$build/log" 2>&1; then
    cat "$build/log"
    exit 1
  fi
  echo "[usp] ARM unit tests on $1, level $2: $(sed -n 's/^\[  PASSED  \] \([0-9]*\) tests.*/\1 passed/p' "$build/log")"
}
run max neon_bf16
run cortex-a72 default 'Levels*:*Attentions*:*Bf16Products*'
