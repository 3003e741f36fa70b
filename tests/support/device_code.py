"""What is in compiled GPU kernels: registers, spills, shared memory, matrix instructions.

Read from what the compilers of a real build leave behind when they are asked to: ptxas' report and
the PTX of nvcc, the assembly of clang with its metadata.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

# What makes each compiler keep and say it, in the environment of a build.
ASK_NVCC = "-Xptxas=-v --keep --keep-dir="  # NVCC_APPEND_FLAGS
ASK_CLANG = "#+-save-temps=obj"  # CCC_OVERRIDE_OPTIONS; the # keeps it quiet

# Names of the matrix instructions, and how each is written in what is read here.
INSTRUCTIONS = {
    "HMMA": re.compile(r"\bmma\.sync\."),
    "MFMA 32x32x8": re.compile(r"\bv_mfma_f32_32x32x8"),
    "MFMA 16x16x16": re.compile(r"\bv_mfma_f32_16x16x16"),
}


# A load, then a product, and nothing between that waits for the one or for other waves.
_LOAD_AHEAD = re.compile(
    r"global_load_dwordx4(?:(?!s_barrier|s_waitcnt[^\n]*vmcnt|s_branch|s_endpgm).)*?v_mfma",
    re.DOTALL,
)


# Memory of a thread's own. A frame that nothing touches is what is left of scalar registers that
# clang keeps in lanes of vector registers.
_SCRATCH = re.compile(r"\b(?:scratch|buffer)_(?:load|store|atomic)")

# Less than a register at a time from the LDS.
_NARROW_READ = re.compile(r"\bds_read_[ui](?:8|16)")


@dataclass(frozen=True)
class Kernel:
    """One compiled kernel.

    Attributes:
        source: Stem of its file in csrc/gpu.
        registers: A thread's: VGPRs and AGPRs on AMD.
        spills: Bytes (NVIDIA), or vector registers (AMD), kept in memory for lack of registers.
        scratch: Bytes of memory a thread uses as if they were registers, spills included.
        shared: Bytes of shared memory (LDS) fixed at compilation.
        instructions: How often each of INSTRUCTIONS stands in it; those that do.
        loads_ahead: Whether vectors from global memory are on their way during products (AMD).
        narrow_reads: How many reads of the LDS fill less than a register (AMD).
        moves: How many moves from and to the registers of the matrix unit (AMD).
    """

    source: str
    name: str
    architecture: str
    registers: int
    spills: int
    scratch: int
    shared: int
    instructions: dict[str, int] = field(default_factory=dict)
    loads_ahead: bool = False
    narrow_reads: int = 0
    moves: int = 0


def readable(mangled: str) -> str:
    """A kernel's name without namespaces and parameters, where c++filt is there to say it."""
    tool = shutil.which("c++filt")
    if tool is None:
        return mangled
    text = subprocess.run([tool, "-p", mangled], capture_output=True, text=True).stdout.strip()
    return re.sub(r"\(anonymous namespace\)::|\(usp::\w+\)|usp::(gpu::)?|^void ", "", text)


def count_instructions(text: str) -> dict[str, int]:
    counts = {name: len(pattern.findall(text)) for name, pattern in INSTRUCTIONS.items()}
    return {name: count for name, count in counts.items() if count}


def cuda_kernels(log: str, kept: Path) -> list[Kernel]:
    """The kernels in the log of a build with ``ASK_NVCC``, and the PTX that it kept."""
    entry = re.compile(
        r"Compiling entry function '(?P<name>\w+)' for '(?P<architecture>\w+)'.*?"
        r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, "
        r"(?P<loads>\d+) bytes spill loads.*?Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
        re.DOTALL,
    )
    bodies = {path: _ptx_bodies(path.read_text()) for path in kept.glob("*.ptx")}
    kernels = []
    for match in entry.finditer(log):
        suffix = f".{match['architecture'].replace('sm_', 'compute_')}.ptx"
        (path,) = [p for p, b in bodies.items() if p.name.endswith(suffix) and match["name"] in b]
        shared = re.search(r"(\d+) bytes smem", match["rest"])
        kernels.append(
            Kernel(
                source=path.name.removesuffix(suffix),
                name=readable(match["name"]),
                architecture=match["architecture"],
                registers=int(match["registers"]),
                spills=int(match["stores"]) + int(match["loads"]),
                scratch=int(match["stack"]),
                shared=int(shared[1]) if shared else 0,
                instructions=count_instructions(bodies[path][match["name"]]),
            )
        )
    return kernels


def _ptx_bodies(ptx: str) -> dict[str, str]:
    """The text of each kernel. Functions that were not inlined count for all of them."""
    first, *entries = re.split(r"(?m)^\.(?:visible |weak )*\.?entry ", ptx)
    shared = first if ".func" in first else ""
    return {re.match(r"\w+", text)[0]: text + shared for text in entries}  # type: ignore[index]


def hip_kernels(assembly: Iterable[Path]) -> list[Kernel]:
    """The kernels in the device assembly of a build with ``ASK_CLANG``."""
    kernels = []
    for path in assembly:
        stem, _, architecture = path.stem.partition("-hip-amdgcn-amd-amdhsa-")
        text = path.read_text()
        for entry in re.split(r"(?m)^  - (?=\.agpr_count|\.args)", text)[1:]:
            name = _metadata(entry, "name")
            found = re.search(rf"(?ms)^{re.escape(name)}:.*?^\.Lfunc_end", text)
            body = found[0] if found else ""
            frame = int(_metadata(entry, "private_segment_fixed_size"))
            kernels.append(
                Kernel(
                    source=stem,
                    name=readable(name),
                    architecture=architecture,
                    registers=int(_metadata(entry, "vgpr_count")),
                    spills=int(_metadata(entry, "vgpr_spill_count")),
                    scratch=frame if _SCRATCH.search(body) else 0,
                    shared=int(_metadata(entry, "group_segment_fixed_size")),
                    instructions=count_instructions(body),
                    loads_ahead=_LOAD_AHEAD.search(body) is not None,
                    narrow_reads=len(_NARROW_READ.findall(body)),
                    moves=body.count("v_accvgpr"),
                )
            )
    return kernels


def _metadata(entry: str, key: str) -> str:
    match = re.search(rf"(?m)^    \.{key}: +(\S+)$", entry)
    assert match is not None, f"no .{key} in the metadata of a kernel"
    return match[1]


def overview(kernels: Iterable[Kernel]) -> str:
    """One line for all variants of a kernel on an architecture, each column at its largest."""
    variants: dict[tuple[str, str, str], list[Kernel]] = {}
    for kernel in kernels:
        name = kernel.name.partition("<")[0]
        variants.setdefault((kernel.source, name, kernel.architecture), []).append(kernel)
    lines = []
    for (source, name, architecture), group in variants.items():
        largest = {
            column: max(getattr(kernel, column) for kernel in group)
            for column in ("registers", "spills", "scratch", "shared")
        }
        counts: dict[str, int] = {}
        for kernel in group:
            for instruction, count in kernel.instructions.items():
                counts[instruction] = max(count, counts.get(instruction, 0))
        title = f"{name} ({len(group)} variants)"
        lines.append(Kernel(source, title, architecture, **largest, instructions=counts))
    return table(lines)


def table(kernels: Iterable[Kernel]) -> str:
    """One line a kernel."""
    head = ("file", "kernel", "for", "registers", "spills", "scratch", "shared", "instructions")
    rows = [head] + [
        (
            *(k.source, k.name, k.architecture, str(k.registers), str(k.spills)),
            *(str(k.scratch), str(k.shared)),
            " ".join(f"{count} {name}" for name, count in k.instructions.items()) or "-",
        )
        for k in sorted(kernels, key=lambda k: (k.source, k.architecture, k.name))
    ]
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    return "\n".join(
        "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )
