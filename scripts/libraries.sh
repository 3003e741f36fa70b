#!/usr/bin/env bash
# Attention libraries whose kernels or Python run without a GPU, and DeepSpeed, each set in a folder
# of its own: nothing else finds them there.
# usage: scripts/libraries.sh VENV [flash-attn-4|science]
# flash-attn-4 is 320 MB of compilers; science, 1.2 GB, are models whose requirements, among them
# another torch, are left out, and what these import
set -euo pipefail
cd "$(dirname "$0")/.."
venv=${1:?usage: scripts/libraries.sh VENV [flash-attn-4|science]}
case "${2:-}" in
  "")
    folder=build/libraries
    wanted=(flash-attn==2.8.3.post2 einops==0.8.2 amd-aiter==0.1.7.post2.dev18
      yunchang==0.6.4 ring-flash-attn==0.1.8 fla-core==0.6.0
      deepspeed==0.19.8 hjson msgpack psutil py-cpuinfo pydantic pydantic-core annotated-types
      typing-inspection tqdm)
    ;;
  flash-attn-4)
    folder=build/flash-attn-4
    wanted=(flash-attn-4==4.0.0b36 nvidia-cutlass-dsl{,-libs-base,-libs-core,-libs-cu12}==4.8.1
      quack-kernels==0.6.5 apache-tvm-ffi torch-c-dlpack-ext cuda-bindings cuda-pathfinder protobuf
      einops==0.8.2)
    ;;
  science)
    folder=build/science
    wanted=(anemoi-models==0.19.0 anemoi-utils==0.5.14 anemoi-graphs==0.9.8 hydra-core==1.3.8
      omegaconf==2.4.0 antlr4-python3-runtime==4.9.3 xxhash==4.1.0 torch-geometric==2.8.0
      microsoft-aurora==2.0.1
      nvidia-physicsnemo==2.2.2 warp-lang==1.19.0 nvtx==0.2.17 pyvers==0.2.3 tensordict==0.15.3
      jaxtyping==0.3.11 cloudpickle s3fs==2026.9.0 aiobotocore==3.10.0 aioitertools==0.13.0
      botocore==1.44.8 jmespath==1.1.0 wrapt==2.5.2 aiohttp multidict yarl propcache frozenlist
      aiosignal aiohappyeyeballs attrs fsspec
      terratorch==1.2.13 torchgeo==0.8.1 lightly==1.6.0 lightly-utils aenum
      segmentation-models-pytorch==0.6.0 albumentations==1.4.10 albucore==0.0.13
      opencv-python-headless==5.0.0.93 stringzilla simsimd kornia==0.9.0 kornia-rs==0.2.0
      rasterio==1.4.4 affine==3.0.1 click cligj pyparsing rioxarray==0.19.0 xarray==2026.9.0
      geopandas==1.2.0 pyogrio shapely==2.2.0 pyproj==3.7.2 pycocotools==2.0.11 python-box==8.0.0
      pandas==3.1.1 pytz==2026.6 python-dateutil six h5py==3.16.0 jsonargparse torchmetrics
      docstring-parser importlib-resources typeshed-client einx rtree)
    ;;
  *)
    echo "usage: scripts/libraries.sh VENV [flash-attn-4|science]" >&2
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
