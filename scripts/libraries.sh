#!/usr/bin/env bash
# Attention libraries whose kernels or Python run without a GPU, and DeepSpeed, each set in a folder
# of its own: nothing else finds them there.
# usage: scripts/libraries.sh VENV [flash-attn-4]      that one is 320 MB of compilers
set -euo pipefail
cd "$(dirname "$0")/.."
venv=${1:?usage: scripts/libraries.sh VENV [flash-attn-4]}
case "${2:-}" in
  "")
    folder=build/libraries
    wanted=(flash-attn==2.8.3.post2 einops==0.8.2 amd-aiter==0.1.7.post2.dev18
      yunchang==0.6.4 ring-flash-attn==0.1.8
      deepspeed==0.19.8 hjson msgpack psutil py-cpuinfo pydantic pydantic-core annotated-types
      typing-inspection tqdm)
    ;;
  flash-attn-4)
    folder=build/flash-attn-4
    wanted=(flash-attn-4==4.0.0b36 nvidia-cutlass-dsl{,-libs-base,-libs-core,-libs-cu12}==4.8.1
      quack-kernels==0.6.5 apache-tvm-ffi torch-c-dlpack-ext cuda-bindings cuda-pathfinder protobuf
      einops==0.8.2)
    ;;
  *)
    echo "usage: scripts/libraries.sh VENV [flash-attn-4]" >&2
    exit 2
    ;;
esac
[ "$(cat "$folder/wanted" 2>/dev/null)" = "${wanted[*]}" ] && exit

rm -rf "$folder"
# flash-attn's own switches: no prebuilt wheel is looked for, and no CUDA is compiled
export FLASH_ATTENTION_FORCE_BUILD=TRUE FLASH_ATTENTION_SKIP_CUDA_BUILD=TRUE DS_BUILD_OPS=0
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps \
  --no-build-isolation --target "$folder" "${wanted[@]}"
echo "${wanted[*]}" >"$folder/wanted"
