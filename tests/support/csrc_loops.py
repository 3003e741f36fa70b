"""The machine code of the C++ kernels: of plain ones in bf16, for a GPU that need not be there.

Needs nvcc, or a clang for HIP; and for NVIDIA the disassembler that comes with Triton.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from places import CSRC
from sass import disassembled, functions, main_loop
from usp_build import toolchains

SOURCES = ("attention_forward", "attention_backward")
# By their names in csrc/gpu, those of the Triton kernels that do the same.
KERNELS = {"forward_kernel": "forward", "key_value_kernel": "keys", "query_kernel": "queries"}
_PLAIN = re.compile(rf"({'|'.join(KERNELS)})INS0_8BFloat16ELi(\d+)ELb1E")


def texts_of(files: Iterable[Path]) -> dict[tuple[str, int], str]:
    """Kernel and head dim -> its code, of cubins or clang's assembly."""
    found = {}
    for path in files:
        cubin = path.suffix == ".cubin"
        text = disassembled(path.read_bytes()) if cubin else path.read_text()
        for name, body in functions(text).items():
            if match := _PLAIN.search(name):
                found[KERNELS[match[1]], int(match[2])] = body
    return found


def rows_of(target: str, head_dims: set[int], folder: Path) -> list[dict[str, Any]]:
    """As ``triton_ahead.py`` has them, with the main loops.

    Args:
        target: Such as cuda:90 or hip:gfx942.
        folder: For what the compiler makes.

    Raises:
        toolchains.Missing: There is no compiler for it.
    """
    kind, _, name = target.partition(":")
    listed = {"TORCH_CUDA_ARCH_LIST": f"{name[0]}.{name[1:]}", "PYTORCH_ROCM_ARCH": name}
    compiler = toolchains.find(kind, os.environ | listed)
    only = ["-cubin"] if kind == "cuda" else ["-S", "--offload-device-only"]
    made = []
    for source in SOURCES:
        made.append(folder / f"{source}.{name}.{'cubin' if kind == 'cuda' else 's'}")
        command = [*compiler.command, *compiler.flags, f"-I{CSRC}", *only]
        subprocess.run([*command, CSRC / "gpu" / f"{source}.cu", "-o", made[-1]], check=True)
    return [
        {"target": target, "kernel": kernel, "dtype": "bfloat16", "head_dim": head_dim}
        | {"main_loop": main_loop(text)}
        for (kernel, head_dim), text in texts_of(made).items()
        if head_dim in head_dims
    ]
