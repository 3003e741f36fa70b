"""What a kernel of a library is asked for, whatever its own names for it are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from typing import Protocol

import torch
from torch import Tensor


class Missing(Exception):
    """A library that cannot be asked here; the message says why, and what to do."""


@dataclass(frozen=True, eq=False)
class Packed:
    """Where the sequences of a packed call lie: rectangles of one kind, one behind the other.

    Attributes:
        cu_q, cu_k: (sequences + 1,) int32 on the device: where each begins, and the end of all.
        max_q, max_k: Tokens of the longest, or more.
    """

    cu_q: Tensor
    cu_k: Tensor
    max_q: int
    max_k: int


@dataclass(frozen=True)
class How:
    """What is computed of q, k and v.

    A row i of n queries sees the keys j of m with ``i + m - n - left <= j <= i + m - n + right``:
    bounds count from the diagonal that ends in the bottom right corner. None is no bound.

    Attributes:
        scale: Factor of the scores, positive.
        left, right: The window; ``right`` alone, as 0, is a causal mask.
        softcap: ``softcap * tanh(score / softcap)``; 0 is off.
        packed: For q, k, v of (tokens, heads, dim); None for (B, n, heads, dim).
    """

    scale: float
    left: int | None = None
    right: int | None = None
    softcap: float = 0.0
    packed: Packed | None = None

    @property
    def causal(self) -> bool:
        return self.left is None and self.right == 0

    def window(self, unbounded: int | None) -> tuple[int | None, int | None]:
        """``left, right`` with a library's own word for no bound; none where ``causal`` says it."""
        right = None if self.causal else self.right
        return (
            unbounded if self.left is None else self.left,
            unbounded if right is None else right,
        )


class Kernel(Protocol):
    """A library's attention, forward and backward, behind one signature.

    Dense, q is (B, n, H, D), k (B, m, G, D), v (B, m, G, Dv), out like q with Dv, and lse
    (B, H, n) fp32, natural log. Packed, all but lse lack B, and lse lies as the table's ``packed``
    says.
    """

    def forward(self, q: Tensor, k: Tensor, v: Tensor, how: How) -> tuple[Tensor, Tensor]:
        """``out, lse`` over these keys alone."""

    def backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        how: How,
        dlse: Tensor | None,
    ) -> Sequence[Tensor]:
        """``dq, dk, dv`` of these keys, with ``out`` and ``lse`` over all keys.

        All that comes in is contiguous but q, k and v, whose last dim is. ``dlse`` (B, H, n) is
        given to those alone that take it.
        """


def deterministic() -> bool:
    """Whether torch was asked for the same bits every time."""
    return torch.are_deterministic_algorithms_enabled()


def version_of(distribution: str) -> tuple[int, ...] | None:
    """The release of an installed distribution: (2, 8, 3) of "2.8.3.post2"; None without it."""
    try:
        text = metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None
    numbers = []
    for part in text.split("+")[0].split("."):
        if not part.isdigit():
            digits = part[: len(part) - len(part.lstrip("0123456789"))]
            numbers += [int(digits)] if digits else []
            break
        numbers.append(int(part))
    return tuple(numbers)


def is_there(module: str) -> bool:
    """Whether a module can be found; it is not imported, but what holds it may be.

    A folder of that name beside the program, which Python takes for a namespace, is no module.
    """
    try:
        spec = find_spec(module)
    except Exception:  # of a package whose own import fails, in whatever way
        return False
    return spec is not None and (spec.has_location or spec.submodule_search_locations is None)
