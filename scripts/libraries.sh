#!/usr/bin/env bash
# Attention libraries whose kernels or Python run without a GPU, in a folder of their own: nothing
# else finds them there.
# usage: scripts/libraries.sh VENV
set -euo pipefail
cd "$(dirname "$0")/.."
venv=${1:?usage: scripts/libraries.sh VENV}
wanted=(flash-attn==2.8.3.post2 einops==0.8.2 amd-aiter==0.1.7.post2.dev18)
folder=build/libraries
[ "$(cat "$folder/wanted" 2>/dev/null)" = "${wanted[*]}" ] && exit

rm -rf "$folder"
# flash-attn's own switches: no prebuilt wheel is looked for, and no CUDA is compiled
export FLASH_ATTENTION_FORCE_BUILD=TRUE FLASH_ATTENTION_SKIP_CUDA_BUILD=TRUE
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps \
  --no-build-isolation --target "$folder" "${wanted[@]}"
echo "${wanted[*]}" >"$folder/wanted"
