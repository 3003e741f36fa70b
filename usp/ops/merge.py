"""The softmax over two disjoint sets of keys from those over each: the one formula, and in place.

``merge`` is the formula, and differentiable. ``merge_into`` updates a state, in one pass over
memory where a kernel can.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from usp import kernels
from usp.machine.apart import begin
from usp.ops import native
from usp.ops.tried import may_run


class Merger(NamedTuple):
    """One way to merge in place: whether it takes these tensors, and the call."""

    takes: Callable[[Tensor, Tensor, Tensor, Tensor], bool]
    merge_into: Callable[[Tensor, Tensor, Tensor, Tensor], None]


def merge(out: Tensor, lse: Tensor, more_out: Tensor, more_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Join the softmax over two disjoint sets of keys; differentiable.

    Args:
        out, more_out: (B, L, H, Dv) normalised outputs, finite also where a row saw nothing.
        lse, more_lse: (B, H, L) natural logs of their sums, -inf where a row saw nothing.

    Returns:
        out, lse over both sets; 0 and -inf where a row saw nothing in either.

    Source:
        Online softmax: Milakov & Gimelshein 2018, arXiv:1805.02867.
    """
    top = torch.maximum(lse, more_lse).detach()
    top = torch.where(top == -torch.inf, 0, top)
    weight, more_weight = (lse - top).exp(), (more_lse - top).exp()
    total = weight + more_weight
    seen = total > 0
    total = torch.where(seen, total, 1)
    share, more_share = ((w / total).transpose(1, 2)[..., None] for w in (weight, more_weight))
    joined = torch.where(seen, top + total.log(), -torch.inf)
    return share * out + more_share * more_out, joined


def merge_into(out: Tensor, lse: Tensor, more_out: Tensor, more_lse: Tensor) -> None:
    """``merge`` into ``out`` and ``lse``, in place.

    Args:
        out, lse: In the dtype of the state, as in ``merge``.
        more_out, more_lse: Of any floating dtype.
    """
    state_and_more = out, lse, more_out, more_lse
    for name, merger in MERGERS.items():
        if merger.takes(*state_and_more) and (
            name == "torch" or may_run("merging", name, check, out.device)
        ):
            merger.merge_into(*state_and_more)
            return


def _triton_takes(out: Tensor, lse: Tensor, more_out: Tensor, more_lse: Tensor) -> bool:
    return out.dtype == torch.float32 and kernels.can_take(out, lse, more_out, more_lse)


def _triton(out: Tensor, lse: Tensor, more_out: Tensor, more_lse: Tensor) -> None:
    from usp.kernels import state_merge

    with kernels.launch_guard(out):
        state_merge.merge_into(out, lse, more_out, more_lse)


def _native_takes(out: Tensor, lse: Tensor, more_out: Tensor, more_lse: Tensor) -> bool:
    # The GPU's state is fp32; the last dim is read and written in vectors.
    is_state = out.dtype == torch.float32 or (out.dtype, out.device.type) == (torch.float64, "cpu")
    fits = more_out.dtype == out.dtype or (
        out.dtype == torch.float32 and more_out.dtype in (torch.bfloat16, torch.float16)
    )
    dense = all(x.shape[-1] <= 1 or x.stride(-1) == 1 for x in (out, more_out))
    return is_state and fits and dense and native.is_there("state_merge", out.device.type)


def _native(out: Tensor, lse: Tensor, more_out: Tensor, more_lse: Tensor) -> None:
    torch.ops.usp.state_merge(out, lse, more_out, more_lse)


def _torch(out: Tensor, lse: Tensor, more_out: Tensor, more_lse: Tensor) -> None:
    joined = merge(out, lse, more_out, more_lse)
    for place, value in zip((out, lse), joined, strict=True):
        place.copy_(value)


def check(told: list[str]) -> str | None:
    """What is wrong with the merger of a name on a device, or None.

    Args:
        told: ``[name, device]``.
    """
    merger, device = MERGERS[told[0]], torch.device(told[1])
    begin(device)
    generator = torch.Generator("cpu").manual_seed(2026)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")

    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        out, lse, more_lse = randn(2, 67, 3, 40), randn(2, 3, 67), randn(2, 3, 67)
        more_out = randn(2, 67, 3, 40).to(dtype)
        # rows that have seen nothing before, then, or at all
        lse[..., 5:9] = more_lse[..., 7:12] = -torch.inf
        out[:, 5:9] = more_out[:, 7:12] = 0
        wanted = merge(*(x.double() for x in (out, lse, more_out, more_lse)))
        given = [x.to(device) for x in (out, lse, more_out, more_lse)]
        if not merger.takes(*given):
            continue
        merger.merge_into(*given)
        for what, found, right in zip(("out", "lse"), given, wanted, strict=False):
            # -inf where that is right, and NaN is no success
            right_there = (found.double().cpu() - right).abs() <= 1e-5
            if not bool((right_there | (found.double().cpu() == right)).all()):
                return f"{what} is wrong, of a state that gets {dtype}"
    return None


# The first that takes the tensors and is right merges them. The order is a guess, that of
# ``backends.TABLE``: no committed result compares them.
MERGERS = {
    "triton": Merger(_triton_takes, _triton),
    "native": Merger(_native_takes, _native),
    "torch": Merger(lambda *_: True, _torch),
}
