#!/usr/bin/env bash
# What concerns the machine at hand: C++ where CMake and GoogleTest are there, then pytest on the
# installed package, a process for each of two cores.
# usage: scripts/test.sh VENV [pytest arguments]
set -euo pipefail
cd "$(dirname "$0")/.."
venv=${1:?usage: scripts/test.sh VENV [pytest arguments]}
shift

scripts/cpp_tests.sh

# The program, not `python -m pytest`: that would put this folder first on sys.path, and the tests
# would run on the sources here, which hold no compiled extension, instead of what was installed.
exec "$venv/bin/pytest" -n 2 --dist worksteal -m "not gpu and not device_code and not library and not long" --durations 10 "$@"
