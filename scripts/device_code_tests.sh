#!/usr/bin/env bash
# What executes or compiles GPU code, without a GPU: emulators, interpreters, compilers. Tests that
# wait for a long command (tests/support/background.py) run beside the others.
# usage: scripts/device_code_tests.sh VENV [pytest arguments]
set -euo pipefail
cd "$(dirname "$0")/.."
pytest=(${1:?usage: scripts/device_code_tests.sh VENV [pytest arguments]}/bin/pytest -m "device_code and not gpu")
shift

mkdir -p build
log=build/tests-that-wait.log
"${pytest[@]}" --waiting only "$@" >"$log" 2>&1 &
waiting=$!
trap 'kill "$waiting" 2>/dev/null || true' EXIT

# 5: the arguments leave nothing for this half
code=0
"${pytest[@]}" --waiting without --durations 10 "$@" || code=$?
echo "[usp] tests of compiled GPU code, run beside the others:"
other=0
wait "$waiting" || other=$?
trap - EXIT
cat "$log"
if [ "$code" = 5 ] && [ "$other" = 5 ]; then exit 5; fi
for found in "$code" "$other"; do
  if [ "$found" != 0 ] && [ "$found" != 5 ]; then exit "$found"; fi
done
