"""What is done with some kernels to see whether they keep a promise; in a worker for some.

``ops`` has the functions of the contract: ``attention_forward``, ``attention_backward``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from guarded import assert_untouched, guarded
from kernel_call import (
    Call,
    Inputs,
    blocks,
    computed,
    make_inputs,
    new_state,
    options,
    whole_and_in_blocks,
)
from torch import Tensor


def answers(ops: Any, case: Call) -> dict[str, Tensor]:
    """All results of one call."""
    return computed(case, make_inputs(case), ops)


def in_blocks(ops: Any, case: Call) -> Any:
    """The state after all keys at once, and after three blocks of them."""
    return whole_and_in_blocks(case, make_inputs(case), ops)


def results(ops: Any, case: Call, carried: bool, lse_is_read: bool) -> dict[str, Tensor]:
    """Of the last block of keys: the result of its own, and the state that it would be.

    Args:
        carried: Whether there is a state before; without one ``out`` is None.
        lse_is_read: Also where ``out`` is None.
    """
    x = make_inputs(case)
    out, lse = new_state(case)
    *before, (keys, masked) = blocks(case)
    for prior, _ in before:
        shared = options(case, x, prior, masked=False)
        ops.attention_forward(x.q, x.k[:, prior], x.v[:, prior], *shared, out, lse)
    last_lse, kept = lse.clone(), out.clone()
    if not (carried or lse_is_read):
        last_lse.fill_(torch.nan)
    result, around = guarded(out.shape, torch.nan, case.dtype)
    given = (x.q, x.k[:, keys], x.v[:, keys], *options(case, x, keys, masked=masked))
    held = out.clone() if carried else None
    ops.attention_forward(*given, held, last_lse, result)
    assert held is None or torch.equal(held, kept)
    assert_untouched(around, result)
    ops.attention_forward(*given, out, lse)
    return {"out": out, "lse": lse, "result": result, "last_lse": last_lse}


def state_of_blind_rows(ops: Any, case: Call, why: str) -> None:
    """A row that sees nothing keeps its state to the bit, and any other does not."""
    x = make_inputs(case)
    blind = torch.ones(case.lq, dtype=torch.bool)
    if why == "bias":
        x.bias = torch.full((1, 1, 1, case.lk), -torch.inf, dtype=case.acc)
    else:
        x.first = torch.full((case.lq,), 7, dtype=torch.int32)
        x.stop = x.first.clone()
        if why == "span of some rows":
            x.stop[33:] = 50
            blind[33:] = False
    generator = torch.Generator().manual_seed(8)
    out, lse = (
        torch.randn(state.shape, generator=generator, dtype=case.acc) for state in new_state(case)
    )
    kept = out.clone(), lse.clone()
    shared = options(case, x, slice(None), masked=True)
    ops.attention_forward(x.q, x.k, x.v, *shared, out, lse)
    assert torch.equal(out[:, blind], kept[0][:, blind])
    assert torch.equal(lse[..., blind], kept[1][..., blind])
    assert (lse[..., ~blind] != kept[1][..., ~blind]).all()


def with_one_key_above(case: Call, where: int) -> Inputs:
    x = make_inputs(case)
    x.bias = torch.zeros(1, 1, 1, case.lk, dtype=case.acc)
    x.bias[..., where] = 200.0
    return x


def one_key_far_above(ops: Any, case: Call, where: int) -> dict[str, Tensor]:
    return computed(case, with_one_key_above(case, where), ops)


def scaled(ops: Any, case: Call, scale: float) -> tuple[Tensor, Tensor]:
    """The state with another scale of the scores."""
    x = make_inputs(case)
    state = new_state(case)
    shared = options(case, x, slice(None), masked=True)
    shared[9] = scale
    ops.attention_forward(x.q, x.k, x.v, *shared, *state)
    return state


def saved_for_backward(ops: Any, case: Call, x: Inputs) -> tuple[Tensor, ...]:
    """dout, q, k, v, delta and lse after a forward."""
    out, lse = new_state(case)
    shared = options(case, x, slice(None), masked=True)
    ops.attention_forward(x.q, x.k, x.v, *shared, out, lse)
    delta = (x.dout.to(case.acc) * out).sum(-1).transpose(1, 2).contiguous()
    return x.dout, x.q, x.k, x.v, delta, lse


def added(ops: Any, case: Call) -> list[tuple[Tensor, Tensor]]:
    """Each gradient after one backward, and after two."""
    x = make_inputs(case)
    shared = options(case, x, slice(None), masked=True)
    saved = saved_for_backward(ops, case, x)
    leaves = (x.q, x.k, x.v, x.bias)
    once, twice = (
        [None if t is None else torch.zeros(t.shape, dtype=case.acc) for t in leaves]
        for _ in range(2)
    )
    for sums, times in ((once, 1), (twice, 2)):
        for _ in range(times):
            ops.attention_backward(*saved, *shared, *sums)
    return [(a, b) for a, b in zip(once, twice, strict=True) if a is not None and b is not None]


def overwritten(
    ops: Any, case: Call, kept: list[tuple[torch.dtype, torch.dtype]]
) -> list[tuple[Tensor, Tensor]]:
    """Gradients as they are written over, and the sums that they must be, unrounded.

    Args:
        kept: Pairs of dtypes that are tried, of dq, and of dk and dv.
    """
    x = make_inputs(case)
    shared = options(case, x, slice(None), masked=True)
    generator = torch.Generator().manual_seed(1)
    shape = (2, case.batch, case.heads[0], case.lq)
    lse, delta = torch.randn(shape, generator=generator, dtype=case.acc)
    args = (x.dout, x.q, x.k, x.v, delta, lse + 4, *shared)
    sums = [torch.zeros(t.shape, dtype=case.acc) for t in (x.q, x.k, x.v)]
    dbias = None if x.bias is None else torch.zeros(x.bias.shape, dtype=case.acc)
    ops.attention_backward(*args, *sums, dbias)
    found = []
    for dq_dtype, kv_dtype in kept:
        dtypes = (dq_dtype, kv_dtype, kv_dtype)
        made = [guarded(t.shape, torch.nan, d) for t, d in zip(sums, dtypes, strict=True)]
        again = None if dbias is None else torch.zeros_like(dbias)
        ops.attention_backward(*args, *(result for result, _ in made), again, True)
        for result, around in made:
            assert_untouched(around, result)
        found += zip((result for result, _ in made), sums, strict=True)
        if dbias is not None and again is not None:
            found.append((again, dbias))
    return found


def written_outside(ops: Any, case: Call) -> dict[str, float]:
    """The largest number of each result; none of them is written beside its tensor."""
    x = make_inputs(case)
    shapes = [state.shape for state in new_state(case)]
    made = {"out": guarded(shapes[0], 0.0), "lse": guarded(shapes[1], -torch.inf)}
    shared = options(case, x, slice(None), masked=True)
    ops.attention_forward(x.q, x.k, x.v, *shared, made["out"][0], made["lse"][0])
    for name in ("q", "k", "v", "bias"):
        made[f"d{name}"] = guarded(getattr(x, name).shape, 0.0)
    delta = torch.randn(shapes[1], generator=torch.Generator().manual_seed(2))
    sums = [made[name][0] for name in ("dq", "dk", "dv", "dbias")]
    ops.attention_backward(x.dout, x.q, x.k, x.v, delta, made["lse"][0], *shared, *sums)
    for inside, around in made.values():
        assert_untouched(around, inside)
    return {name: inside.abs().max().item() for name, (inside, _) in made.items()}


FAR = ("batch", "rows", "heads")


def far_apart_case(base: Call) -> Call:
    """Of 3 sequences of 3 tokens with 3 heads."""
    case = replace(base, batch=3, lq=3, lk=3, heads=(3, 0, 1), head_dim=8, value_head_dim=8)
    return replace(case, dtype=torch.bfloat16, span="causal")


def far_apart(ops: Any, case: Call, far: str, gap: int) -> dict[str, Tensor]:
    """Results where entries along a dim lie ``gap`` elements apart.

    Only the pages that are used come into being.
    """
    width = case.head_dim
    units = {"batch": (gap, 3, 1), "rows": (3, gap, 1), "heads": (3, 1, gap)}[far]
    strides = tuple(unit if unit == gap else unit * width for unit in units)
    x = make_inputs(case)
    for name in ("q", "k", "v", "dout"):
        near = getattr(x, name)
        memory = torch.empty(2 * gap + 9 * width, dtype=case.dtype)
        setattr(x, name, memory.as_strided(near.shape, (*strides, 1)).copy_(near))
    return computed(case, x, ops)


def rows_far_apart(ops: Any, case: Call, gap: int) -> dict[str, Tensor]:
    """Results for rows of q, k, v, dout that all are k's and lie ``gap`` elements apart."""
    x = make_inputs(case)
    far = torch.empty(case.lq * gap, dtype=case.dtype).as_strided(x.k.shape, (1, gap, 1, 1))
    x.q = x.k = x.v = x.dout = far.copy_(x.k)
    return computed(case, x, ops)


def all_equal(found: Sequence[dict[str, Tensor]]) -> None:
    first, *others = found
    for other in others:
        for name, result in other.items():
            assert torch.equal(result, first[name]), name
