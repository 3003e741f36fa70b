"""A row of the table of libraries: what a kernel takes, and what it says against a problem."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from usp.backends.library.call import Kernel
from usp.planning.problem import Traits

HALVES = (torch.float16, torch.bfloat16)
Dims = Callable[[int, int, str], str | None]  # head dims of q and v, architecture -> reason


@dataclass(frozen=True)
class Record:
    """One kernel of a library.

    Attributes:
        name: As users name the backend. Several rows may share it; the first that is there counts.
        title: What it is.
        missing: Why it is not installed, or None; imports nothing.
        load: Imports it; raises ``Missing`` or whatever the import raises.
        built_for: "cuda" or "hip", the torch that it runs beside; None for any.
        device_type: Of the tensors.
        architectures: Patterns of those it was made for.
        dtypes: Of q, k, v, which are all of one.
        dims: What it says against head dims.
        windows: Whether it takes windows, which then count from the bottom right corner.
        shared_heads: Whether query heads may share a key head, in groups of one size.
        softcap: Whether it takes one.
        dlse: Whether its backward takes a gradient of the LSE.
        packed: How the LSE of a packed call lies: "hn" (heads, tokens), "nh"; None without.
        lse: How that of a dense call lies, before its adapter has it as ``Kernel`` says.
        empty_lse: What some release answers for a row that sees nothing; none where that is not
            known. No call has one.
        shown: What of its adapter has been executed, and on what.
    """

    name: str
    title: str
    missing: Callable[[], str | None]
    load: Callable[[], Kernel]
    architectures: tuple[str, ...]
    dims: Dims
    built_for: str | None = None
    device_type: str = "cuda"
    dtypes: tuple[torch.dtype, ...] = HALVES
    windows: bool = False
    shared_heads: bool = True
    softcap: bool = False
    dlse: bool = False
    packed: str | None = None
    lse: str = "(B, H, n)"
    empty_lse: tuple[float, ...] = ()
    shown: str = ""

    def not_for_this_torch(self) -> str | None:
        """Why this build of torch is not the one that it runs beside."""
        builds = {"cuda": torch.version.cuda, "hip": torch.version.hip}
        if self.built_for is not None and builds[self.built_for] is None:
            return f"{self.title} runs beside a torch that is built for {self.built_for.upper()}"
        return None

    def reasons_against(self, traits: Traits) -> Iterator[str]:
        """All but what concerns this machine."""
        if traits.architecture.startswith(("sm_", "gfx")) and not any(
            re.fullmatch(pattern, traits.architecture) for pattern in self.architectures
        ):
            made_for = ", ".join(self.architectures)
            yield f"it is made for {made_for}, and this is {traits.architecture}"
        if traits.dtype not in self.dtypes:
            takes = ", ".join(str(dtype).removeprefix("torch.") for dtype in self.dtypes)
            yield f"it takes {takes}, and q is {traits.dtype}"
        against_dims = self.dims(traits.head_dim, traits.value_head_dim, traits.architecture)
        if against_dims is not None:
            yield against_dims
        if traits.softmax_scale <= 0:
            yield f"it wants a positive softmax_scale, not {traits.softmax_scale}"
        if traits.returns_lse and not self.dlse:
            yield "its backward takes no gradient of the LSE"
        if traits.bias:
            yield "it has no bias or key padding mask"
        if traits.alibi:
            yield "it has no ALiBi by global positions"
        if traits.dropout:
            yield "its dropout draws numbers of its own, which no mesh could repeat"
        if traits.softcap and not self.softcap:
            yield "it has no softcap"


def equal_dims(step: int, largest: int) -> Dims:
    """Head dims of q and v alike: multiples of ``step`` up to ``largest``."""

    def against(head_dim: int, value_head_dim: int, _: str) -> str | None:
        if head_dim != value_head_dim:
            return f"head_dim {head_dim} and v's {value_head_dim} must be equal"
        return _against_dim(head_dim, step, largest)

    return against


def any_dims(step: int, largest: int) -> Dims:
    """Head dims of q and v, each a multiple of ``step`` up to ``largest``."""

    def against(head_dim: int, value_head_dim: int, _: str) -> str | None:
        return _against_dim(head_dim, step, largest) or _against_dim(value_head_dim, step, largest)

    return against


def dims_by_architecture(
    largest: dict[str, int], pairs: dict[str, tuple[tuple[int, int], ...]], step: int = 8
) -> Dims:
    """Equal head dims up to a number that depends on the device, and some pairs beside these."""

    def against(head_dim: int, value_head_dim: int, architecture: str) -> str | None:
        if (head_dim, value_head_dim) in pairs.get(architecture, ()):
            return None
        limit = largest.get(architecture, min(largest.values()))
        return equal_dims(step, limit)(head_dim, value_head_dim, architecture)

    return against


def _against_dim(dim: int, step: int, largest: int) -> str | None:
    if dim % step or not 0 < dim <= largest:
        return f"a head dim must be a multiple of {step} up to {largest}, and one is {dim}"
    return None
