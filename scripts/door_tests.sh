#!/usr/bin/env bash
# The doors into models of other libraries, and adapters to attention kernels of others, with these
# libraries.
# usage: scripts/door_tests.sh VENV [pytest arguments]
set -euo pipefail
cd "$(dirname "$0")/.."
venv=${1:?usage: scripts/door_tests.sh VENV [pytest arguments]}
shift

# Nothing in here is downloaded but by pip: models are made of random numbers.
export HF_HUB_OFFLINE=1
scripts/libraries.sh "$venv" || echo "[usp] flash-attn and aiter could not be installed: going on without"
exec "$venv/bin/pytest" -n 2 --dist worksteal -m "not gpu" --durations 10 \
  tests/integrations tests/backends/library "$@"
