#!/usr/bin/env bash
# ruff, mypy and clang-format, none of which changes a file.
# usage: scripts/lint.sh VENV
set -euo pipefail
cd "$(dirname "$0")/.."
bin=${1:?usage: scripts/lint.sh VENV}/bin

"$bin/ruff" check .
"$bin/ruff" format --check .
"$bin/mypy"
find csrc tests/cpp \( -name '*.cpp' -o -name '*.h' -o -name '*.cu' \) -print0 |
  xargs -0 --no-run-if-empty "$bin/clang-format" --dry-run -Werror
echo "[usp] lint: nothing to say"
