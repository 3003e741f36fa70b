#!/usr/bin/env bash
# Every test: C++ where CMake and GoogleTest are there, then pytest on the installed package. Tests
# that wait for compilers run beside the others, which leave a core idle most of the time.
# usage: scripts/test.sh VENV [pytest arguments]
set -euo pipefail
cd "$(dirname "$0")/.."
venv=${1:?usage: scripts/test.sh VENV [pytest arguments]}
shift

scripts/cpp_tests.sh

# The program, not `python -m pytest`: that would put this folder first on sys.path, and the tests
# would run on the sources here, which hold no compiled extension, instead of what was installed.
mkdir -p build
log=build/tests-of-compiled-code.log
"$venv/bin/pytest" --waiting only "$@" >"$log" 2>&1 &
waiting=$!
trap 'kill "$waiting" 2>/dev/null || true' EXIT

# 5: the arguments leave nothing for this half
code=0
"$venv/bin/pytest" --waiting without "$@" || code=$?
echo "[usp] tests of compiled GPU code, run beside the others:"
other=0
wait "$waiting" || other=$?
trap - EXIT
cat "$log"
if [ "$code" = 5 ] && [ "$other" = 5 ]; then exit 5; fi
for found in "$code" "$other"; do
  if [ "$found" != 0 ] && [ "$found" != 5 ]; then exit "$found"; fi
done
