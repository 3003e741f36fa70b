"""A short causal convolution over a spread sequence, with the tokens of ranks before in front."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from usp.distributed.agreement import Facts
from usp.distributed.comm import untraced
from usp.distributed.mesh import SequenceMesh, check_mesh
from usp.planning.kinds import DTYPES, tensor
from usp.planning.layout import Held, Layout, check_layout
from usp.planning.shares import named_lengths
from usp.sharding.halo import Sequence1d, in_front, in_front_in_graph
from usp.sharding.in_graph import is_in_graph


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    mesh: SequenceMesh | None = None,
    cu_seqlens: Sequence[int] | Tensor | None = None,
    layout: Layout = "contiguous",
    seq_len: int | None = None,
    validate: bool | None = None,
) -> Tensor:
    """A causal convolution of each channel over a sequence that is spread over ranks, as gated
    DeltaNet and Mamba have it in front.

    ``y_t = bias + sum_w weight[:, w] x_{t - W + 1 + w}`` over tokens of the same document; what
    lies before it is 0. A rank is sent the ``W - 1`` tokens in front of its own, of however many
    ranks, and sends the gradient of these back. Derivatives of every order.

    Args:
        x: (B, L, C) fp16 | bf16 | fp32 | fp64, this rank's tokens.
        weight: (C, W). ``conv.weight[:, 0]`` of a ``nn.Conv1d`` with ``groups=C``. Its gradient is
            this rank's part of the sum.
        bias: (C,), likewise.
        mesh: The ranks that share the sequence, all of them in its order; None is one device.
        cu_seqlens: Global boundaries ``(0, ..., total)`` of packed documents, host integers.
        layout: "contiguous", or ``usp.Held(counts)``.
        seq_len: Tokens of the whole; by default the sum of what the ranks hold.
        validate: Whether the ranks compare their arguments first; see ``long_context_attention``.

    Returns:
        (B, L, C), as ``torch.nn.functional.conv1d`` computes it: in the dtype of x, or autocast's.

    Raises:
        TypeError: an argument is of another kind.
        ValueError: arguments do not fit each other, this rank's share, or those of another rank;
            or a layout that is not in the order of the sequence.
    """
    check_mesh(mesh)
    sequence = Sequence1d(mesh, layout, seq_len, cu_seqlens)

    def facts() -> Facts:
        _check(x, weight, bias, layout)
        return {"taps": weight.shape[1], "dtype of weight": weight.dtype, "bias": bias is not None}

    # of a weight that is none the ranks are told where they meet
    left = weight.shape[-1] - 1 if isinstance(weight, Tensor) and weight.dim() else 0
    length = None
    if is_in_graph(x, mesh):
        named = named_lengths(seq_len, check_layout(layout))
        length = None if named is None else named[0]
    if length is not None:
        facts()
        ahead = in_front_in_graph(x, replace(sequence, seq_len=length), left, validate)
    else:
        run = in_front if mesh is None or mesh.size == 1 else untraced(in_front)
        ahead, length = run(x, sequence, left, validate, facts)
    return _convolved(ahead, x, weight, bias, _starts(sequence, length))


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, layout: Layout) -> None:
    given = {"x": x, "weight": weight} | ({} if bias is None else {"bias": bias})
    for name, each in given.items():
        if tensor(name, each).dtype not in DTYPES or each.device != x.device:
            raise ValueError(
                f"{name} must be fp16, bf16, fp32 or fp64 on the device of x: x is on {x.device}, "
                f"{name} is {each.dtype} on {each.device}"
            )
        if each.dtype != x.dtype and not torch.is_autocast_enabled(x.device.type):
            raise ValueError(f"x is {x.dtype} and {name} {each.dtype}: they must share a dtype")
    if x.dim() != 3:
        raise ValueError(f"x must be (batch, sequence, channels), got {tuple(x.shape)}")
    channels = x.shape[2]
    if weight.dim() != 2 or weight.shape[0] != channels or not weight.shape[1]:
        raise ValueError(
            f"weight must be (channels, taps) with {channels} channels, as x has, and a tap or "
            f"more, got {tuple(weight.shape)}"
        )
    if bias is not None and tuple(bias.shape) != (channels,):
        raise ValueError(f"bias must be ({channels},), got {tuple(bias.shape)}")
    if layout != "contiguous" and not isinstance(layout, Held):
        raise ValueError(
            "a causal convolution goes by the order of the sequence: layout must be 'contiguous' "
            f"or usp.Held, got {layout!r}"
        )


def _starts(sequence: Sequence1d, length: int) -> list[int]:
    """Which of this rank's tokens begin a document, but the first of these tokens."""
    rank = sequence.mesh.rank if sequence.mesh else 0
    start, stop = sequence.first(length)[rank : rank + 2]
    inner = sequence.documents(length)[1:-1]
    return sorted({a - start for a in inner if start < a < stop})


def _convolved(
    ahead: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, starts: list[int]
) -> Tensor:
    """One convolution over all documents, with as many zeros before each as it looks back.

    Args:
        ahead: (B, W - 1, C), what is in front of x.
    """
    edges = [0, *starts, x.shape[1]]
    parts, zeros = [ahead], torch.zeros_like(ahead)
    for i, (a, b) in enumerate(pairwise(edges)):
        parts += [x[:, a:b]] if i == 0 else [zeros, x[:, a:b]]
    if not x.shape[1]:  # torch has no convolution of nothing
        parts.append(x.new_zeros(x.shape[0], 1, x.shape[2]))
    joined = torch.cat(parts, 1).transpose(1, 2)
    out = F.conv1d(joined, weight[:, None], bias, groups=x.shape[2]).transpose(1, 2)
    left = ahead.shape[1]
    found = [out[:, a + i * left : b + i * left] for i, (a, b) in enumerate(pairwise(edges))]
    return found[0] if len(found) == 1 else torch.cat(found, 1)
