"""A family of kernels against the reference in fp64, on problems that take milliseconds.

Each is a ring in small: a block of keys that all see, and one with a mask, against the LSE of
both. Key heads are shared, lengths are odd.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor

from usp.backends import reference
from usp.ops.merge import merge
from usp.planning.heads import Heads
from usp.planning.problem import (
    Block,
    Gradients,
    Saved,
    Scoring,
    State,
    Traits,
    state_dtype,
)
from usp.planning.visit import Span, Visit, whole_visit

OPTIONS = ("bias", "softcap", "alibi", "dropout")
# of the largest value: a family that is right is off by a few roundings of its weights
ALLOWED = {"float64": 1e-9, "float32": 1e-3, "bfloat16": 5e-2, "float16": 1e-2}
_HEADS = Heads(offset=0, count=4, total=4, group_size=2)
ONE_BLOCK = "one block, every key"


CAUSAL, WINDOW = "causal, fewer queries than keys", "a window"
BLIND_ROWS, DOCUMENTS = "causal, rows that see nothing", "documents"


@dataclass(frozen=True)
class Sizes:
    """More rows and keys than a tile has; ``earlier`` keys are in the first of two blocks.

    Attributes:
        masks: What rows see of the second one, a problem each.
    """

    batch: int
    queries: int
    earlier: int
    keys: int
    masks: tuple[str, ...] = (CAUSAL, WINDOW, BLIND_ROWS, DOCUMENTS)


# a CPU's kernels are compiled from one source, and its first call should not wait
ON_CPU, ON_GPU = Sizes(1, 67, 19, 131, (CAUSAL, WINDOW)), Sizes(2, 150, 37, 213)


def _seen(sizes: Sizes) -> dict[str, tuple[Tensor, Tensor]]:
    """What rows see of the second block: first and last key."""
    i = torch.arange(sizes.queries, device="cpu")
    none, below = torch.zeros_like(i), sizes.keys - sizes.queries
    ends = {
        CAUSAL: (none, i + below),
        WINDOW: (i - 11, i + below // 2),
        BLIND_ROWS: (none, i - 18),
        # of 29 queries and 53 keys; the last one is cut off, as a ring step has them
        DOCUMENTS: (i // 29 * 53, i // 29 * 53 + i % 29 + 24),
    }
    return {name: ends[name] for name in sizes.masks}


@dataclass(frozen=True, eq=False)
class Problem:
    """Attention over one or two blocks of keys, and the cotangents of its results.

    Attributes:
        name: Of what is special about it.
        blocks: The last one ends the pass.
        dout: (B, Lq, H, Dv), dtype of q. dlse: (B, H, Lq) in the dtype of the state.
    """

    name: str
    blocks: tuple[Block, ...]
    dout: Tensor
    dlse: Tensor

    @property
    def in_fp64(self) -> Problem:
        """The same numbers where the reference is exact: in fp64 on the CPU."""
        blocks = tuple(map(_exact, self.blocks))
        return Problem(self.name, blocks, self.dout.double().cpu(), self.dlse.double().cpu())


def _exact(block: Block) -> Block:
    bias, slopes, q_pos, k_pos = block.bias, block.alibi_slopes, block.q_pos, block.k_pos
    span = block.visit.span
    return block._replace(
        q=block.q.double().cpu(),
        k=block.k.double().cpu(),
        v=block.v.double().cpu(),
        # without what it holds on a device
        visit=replace(block.visit, span=span and Span(span.first, span.stop)),
        bias=None if bias is None else bias.double().cpu(),
        alibi_slopes=None if slopes is None else slopes.double().cpu(),
        q_pos=None if q_pos is None else q_pos.cpu(),
        k_pos=None if k_pos is None else k_pos.cpu(),
    )


def wrong_with(family: Any, traits: Traits, device: torch.device) -> str | None:
    """What a family of kernels gets wrong, or None.

    Args:
        family: A backend that takes the problem.
        traits: Of the problem: dtype, head dims and options are checked, with small lengths.
    """
    for problem in problems(family, traits, device):
        wanted = run(reference, problem.in_fp64)
        allowed = ALLOWED[str(traits.dtype).removeprefix("torch.")]
        for found in (run(family, problem), _at_once(family, problem)):
            said = _difference(found, wanted, allowed)
            if said is not None:
                return f"{said} ({problem.name})"
    return None


def problems(family: Any, traits: Traits, device: torch.device) -> Iterator[Problem]:
    """All that a family is checked with."""
    generator = torch.Generator(device="cpu").manual_seed(2026)
    with_lse = not family.reasons_against(replace(traits, returns_lse=True))

    def randn(*shape: int, dtype: torch.dtype = traits.dtype) -> Tensor:
        x = torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")
        return x.to(dtype).to(device)

    sizes = ON_CPU if device.type == "cpu" else ON_GPU
    state, heads, kv_heads = state_dtype(traits.dtype), _HEADS.count, 2
    for name, ends in (*_seen(sizes).items(), (ONE_BLOCK, None)):
        q = randn(sizes.batch, sizes.queries, heads, traits.head_dim)
        blocks = []
        for visit in _visits(sizes, ends):
            k = randn(sizes.batch, visit.num_keys, kv_heads, traits.head_dim)
            v = randn(sizes.batch, visit.num_keys, kv_heads, traits.value_head_dim)
            shape = 1, heads, sizes.queries, visit.num_keys
            bias = randn(*shape, dtype=state) if traits.bias else None
            blocks.append(_block(traits, visit, (q, k, v), bias))
        dout = randn(sizes.batch, sizes.queries, heads, traits.value_head_dim)
        dlse = randn(sizes.batch, heads, sizes.queries, dtype=state) * with_lse
        yield Problem(name, tuple(blocks), dout, dlse)


def _visits(sizes: Sizes, ends: tuple[Tensor, Tensor] | None) -> list[Visit]:
    """Of all keys in one block, or of some that all rows see and a block with these ends."""
    if ends is None:
        return [whole_visit(sizes.queries, sizes.keys)]
    first, last = ends
    first, stop = first.clamp(0, sizes.keys), (last + 1).clamp(0, sizes.keys)
    span = Span(first.int(), torch.maximum(first, stop).int())
    masked = Visit(sizes.queries, sizes.keys, span)
    return [whole_visit(sizes.queries, sizes.earlier), masked]


def _block(traits: Traits, visit: Visit, qkv: Sequence[Tensor], bias: Tensor | None) -> Block:
    q, k, v = qkv
    slopes = q_pos = k_pos = None
    if traits.alibi:
        slopes = torch.tensor([[0.5, 0.25, 0.1, 0.0]], dtype=state_dtype(q.dtype), device=q.device)
    if traits.alibi or traits.dropout:
        q_pos = torch.arange(7, 7 + q.shape[1], dtype=torch.int32, device=q.device)
        k_pos = torch.arange(k.shape[1], dtype=torch.int32, device=q.device)
    scoring = Scoring(
        traits.softmax_scale,
        softcap=2.0 if traits.softcap else 0.0,
        dropout_p=0.25 if traits.dropout else 0.0,
        dropout_seed=12345 if traits.dropout else 0,
    )
    return Block(q, k, v, visit, _HEADS, scoring, bias, slopes, q_pos, k_pos)


def run(family: Any, problem: Problem) -> dict[str, Tensor]:
    """Results and gradients of a problem by a family's kernels."""
    state = _forward(family, problem)
    q, (out, lse) = problem.blocks[0].q, (cast(Tensor, state.result), state.lse)
    delta = (
        family.delta(problem.dout, out)
        if family.CARRIES_STATE
        else (problem.dout.to(lse.dtype) * out.to(lse.dtype)).sum(-1).transpose(1, 2)
    )
    delta = (delta - problem.dlse).contiguous()
    saved = Saved(problem.dout, out, lse, delta, bool(problem.dlse.any()))
    alone = len(problem.blocks) == 1 and family.OVERWRITES
    results = {"out": out, "lse": lse, "dq": torch.zeros_like(q, dtype=lse.dtype)}
    for index, block in enumerate(problem.blocks):
        found = {"dk": block.k, "dv": block.v, "dbias": block.bias}
        sums = {n: torch.zeros_like(x, dtype=lse.dtype) for n, x in found.items() if x is not None}
        gradients = Gradients(results["dq"], sums["dk"], sums["dv"], sums.get("dbias"), alone)
        family.attention_backward(block, saved, gradients)
        results |= {f"{name} of block {index}": x for name, x in sums.items()}
    return results


def _at_once(family: Any, problem: Problem) -> dict[str, Tensor]:
    """The same by the ops that make their results, where a family has them for the problem."""
    block, *others = problem.blocks
    scored = block.bias, block.alibi_slopes, block.scoring.dropout_p or None
    if others or not hasattr(family, "attention_once") or scored != (None, None, None):
        return {}
    out, lse = family.attention_once(block)
    dlse = problem.dlse if problem.dlse.any() else None
    dq, dk, dv = family.attention_once_backward(block, problem.dout, dlse, out, lse)
    return {"out": out, "lse": lse, "dq": dq, "dk of block 0": dk, "dv of block 0": dv}


def _forward(family: Any, problem: Problem) -> State:
    """The state after all blocks, with its result."""
    q, dv = problem.blocks[0].q, problem.dout.shape[-1]
    dtype, alone = state_dtype(q.dtype), len(problem.blocks) == 1
    out = q.new_zeros((*q.shape[:3], dv), dtype=dtype)
    lse = q.new_full((q.shape[0], q.shape[2], q.shape[1]), -torch.inf, dtype=dtype)
    result = q.new_empty((*q.shape[:3], dv))
    for block in problem.blocks:
        last = result if block is problem.blocks[-1] else None
        if family.CARRIES_STATE:
            family.attention_forward(block, State(None if alone else out, lse, last))
            continue
        for rows, more_out, more_lse in family.attention_partials(block):
            more = more_out.to(dtype), more_lse.to(dtype)
            out[:, rows], lse[:, :, rows] = merge(out[:, rows], lse[:, :, rows], *more)
        if last is not None:
            last.copy_(out)
    return State(out, lse, result)


def _difference(found: dict[str, Tensor], wanted: dict[str, Tensor], allowed: float) -> str | None:
    for name, result in found.items():
        right, result = wanted[name], result.double().cpu()
        hidden = right == -torch.inf
        if not torch.equal(result == -torch.inf, hidden):
            return (
                f"{name} is -inf in {int((result == -torch.inf).sum())} places, not {hidden.sum()}"
            )
        right, result = (x.masked_fill(hidden, 0) for x in (right, result))
        largest = max(1.0, right.abs().max().item())
        error = (result - right).abs().max().item()
        if not error <= allowed * largest:  # NaN too
            return f"{name} is off by {error:.2g} where {allowed * largest:.2g} is allowed"
    return None
