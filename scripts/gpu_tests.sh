#!/usr/bin/env bash
# The tests that need a GPU, then those that want it alone: they time kernels or fill its memory. Most
# of the first is compiling, so several processes share them and the GPU; build/gpu-tests-*.log holds
# what each said.
# usage: scripts/gpu_tests.sh VENV [pytest arguments]
set -uo pipefail
cd "$(dirname "$0")/.."
pytest=${1:?usage: scripts/gpu_tests.sh VENV [pytest arguments]}/bin/pytest
shift

cores=$(getconf _NPROCESSORS_ONLN)
parts=$((cores > 16 ? 8 : (cores + 1) / 2))
export OMP_NUM_THREADS=1
mkdir -p build
running=()
for part in $(seq "$parts"); do
  "$pytest" -m gpu -p no:cacheprovider --part "$part/$parts" tests/gpu/test_gpu.py \
    tests/gpu/test_gpu_libraries.py tests/gpu/test_gpu_linear.py tests/gpu/test_gpu_tiles.py \
    tests/gpu/test_gpu_offload.py "$@" \
    >"build/gpu-tests-$part.log" 2>&1 &
  running+=($!)
done
failed=0
for part in $(seq "$parts"); do
  wait "${running[part - 1]}"
  code=$?
  tail -n 1 "build/gpu-tests-$part.log"
  # 5: -k and the like left nothing for this part
  if [ "$code" != 0 ] && [ "$code" != 5 ]; then
    grep -E '^(FAILED|ERROR)' "build/gpu-tests-$part.log" || tail -n 30 "build/gpu-tests-$part.log"
    failed=1
  fi
done
cat build/gpu-tests-*.log | grep -E '^SKIPPED' | sort | uniq -c
"$pytest" -m gpu -p no:cacheprovider tests/gpu/test_gpu_trust.py tests/gpu/test_gpu_large.py "$@"
code=$?
if [ "$code" != 0 ] && [ "$code" != 5 ]; then failed=1; fi
exit "$failed"
