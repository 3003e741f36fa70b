#!/usr/bin/env bash
# ruff, mypy and clang-format, none of which changes a file. All of them run, whatever fails.
# usage: scripts/lint.sh VENV
set -uo pipefail
cd "$(dirname "$0")/.."
bin=${1:?usage: scripts/lint.sh VENV}/bin
failed=0

"$bin/ruff" check . || failed=1
"$bin/ruff" format --check . || failed=1
python3 scripts/versions.py check "$(dirname "$bin")" || failed=1 # mypy, for each Python
find csrc tests/cpp benchmarks \( -name '*.cpp' -o -name '*.h' -o -name '*.cu' \) -print0 |
  xargs -0 --no-run-if-empty "$bin/clang-format" --dry-run -Werror || failed=1

[ "$failed" = 0 ] && echo "[usp] lint: nothing to say"
exit "$failed"
