"""Attention as one op, for those who must see it whole.

``torch.compile`` and ``torch.export`` keep their graph whole. A dispatch mode, as selective
activation checkpointing is one, sees an op that takes tensors and returns tensors, to keep its
results or to call it again; below it are kernels that write in place and collectives that ranks
must call alike, which nobody may skip. The op plans and runs just what the eager function does.

A graph on a mesh holds the overload ``mesh``, which has an effect: it may be dropped, repeated or
put in another order nowhere, for the other ranks would wait.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from usp.attention import levels
from usp.attention.arguments import check
from usp.attention.bias import scatter_bias
from usp.attention.given import Options, Tensors
from usp.attention.hybrid import (
    Call,
    Forward,
    Results,
    attention_backward,
    attention_forward,
    own_slopes,
    prepare,
    scattered,
)
from usp.attention.op_arguments import SCHEMA, Arguments, arguments
from usp.attention.op_frame import LIBRARY, OVERLOADS, called, register
from usp.attention.request import agree_on_request
from usp.distributed.agreement import When, meet_before_backward
from usp.distributed.mesh import SequenceMesh
from usp.planning.heads import split_heads
from usp.planning.layout import Held
from usp.planning.problem import state_dtype


def attention(
    tensors: Tensors,
    options: Options,
    mesh: SequenceMesh | None,
    dropout_seed: int | Tensor | None,
    validate: When,
) -> Tensor | tuple[Tensor, Tensor]:
    """``long_context_attention`` through the op; arguments and result as there."""
    given = arguments(tensors, options, mesh, dropout_seed, validate)
    return called("attention", given, mesh, options.return_lse)


def _forward(*args: Any) -> tuple[Tensor, Tensor, list[Tensor]]:
    given = Arguments(*args)
    number, drawn = given.number, given.seed_is_drawn
    request, name = agree_on_request(
        given.tensors,
        given.options,
        given.on,
        None if drawn else number,
        number if drawn else None,
        given.compares,
        given.gradients,
    )
    tensors, call = prepare(given.tensors, request, given.on)
    done = attention_forward(tensors, call)
    lse = done.lse
    if call.ulysses.size == 1:
        lse = levels.returned(done.results.lse, done.results.level)
    kept = _kept(done, call, given)
    if agrees(given):
        seed, rows = request.scoring.dropout_seed, call.bias_cut and call.bias_cut.has_rows
        told = (request.query_len, request.key_len, seed, name or 0, int(bool(rows)))
        kept.insert(0, torch.tensor(told, device="cpu"))
    return done.out, done.out.new_empty(0) if lse is None else lse, kept


def agrees(given: Arguments) -> bool:
    """Whether a call says more than its arguments: it drew a seed, or ranks met."""
    return given.dropout_seed is not None or given.mesh is not None


def _kept(done: Forward, call: Call, given: Arguments) -> list[Tensor]:
    """What the backward needs beyond its inputs and results, whoever keeps it.

    What was exchanged in a row of several ranks; where there is a bias, the LSE relative to its
    levels, and these. A bias without rows of its own was only cut, and is cut again.
    """
    inputs, (out, lse, level) = done.inputs, done.results
    levelled = []
    if inputs.attn_bias is not None:
        shape = _level_shape(inputs.q, inputs.key_padding_mask, inputs.attn_bias)
        levelled = [lse.clone(), lse.new_zeros(shape) if level is None else level]
    if call.ulysses.size == 1:
        return levelled
    kept = [inputs.q, inputs.k, inputs.v, out, lse, *levelled[1:]]
    if inputs.key_padding_mask is not None:
        kept.append(inputs.key_padding_mask)
    if inputs.attn_bias is not None and _may_have_rows(given):
        rows = inputs.attn_bias.transpose(1, 2)
        if call.bias_cut is None or not call.bias_cut.has_rows:
            rows = rows[:, :0]
        kept.append(rows)
    return [filled_up(x, shape) for x, (shape, _) in zip(kept, _rooms(given), strict=True)]


def _rooms(given: Arguments) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """Shapes and dtypes of what a row of several ranks keeps, without asking anybody."""
    q, k, v, mask, bias, *_ = given
    mesh = given.on
    assert mesh is not None
    degree, rank = mesh.ulysses_degree, mesh.ulysses_rank
    heads = split_heads(int(q.shape[2]), int(k.shape[2]), degree)[rank]
    first, stop = heads.kv_range
    batch, own, own_kv = q.shape[0], heads.count, stop - first
    queries, keys = room_of_row(given)
    state = state_dtype(q.dtype)
    rooms: list[tuple[tuple[int, ...], torch.dtype]] = [
        ((batch, queries, own, q.shape[3]), q.dtype),
        ((batch, keys, own_kv, k.shape[3]), k.dtype),
        ((batch, keys, own_kv, v.shape[3]), v.dtype),
        ((batch, queries, own, v.shape[3]), q.dtype),
        ((batch, own, queries), state),
    ]
    if bias is not None:
        bias_heads = own if bias.shape[1] == heads.total else 1
        rooms.append(((bias.shape[0] if mask is None else batch, bias_heads, queries), state))
    if mask is not None:
        rooms.append(((batch, keys), mask.dtype))
    if bias is not None and _may_have_rows(given):
        rooms.append(((bias.shape[0], queries, bias_heads, bias.shape[3]), bias.dtype))
    return rooms


def room_of_row(given: Arguments) -> tuple[int, int]:
    """Room for the queries and keys of a row.

    How many tokens the row has depends on what the others hold; where they are dealt out evenly,
    this one, the u-th of U ranks, holds L of at most U L + u. So much room there is, and the rest
    of it is empty.
    """
    mesh = given.on
    assert mesh is not None
    degree, rank = mesh.ulysses_degree, mesh.ulysses_rank
    queries, keys = (degree * x.shape[1] + rank for x in (given.q, given.k))
    of_queries, of_keys = given.layouts
    if isinstance(of_queries, Held):
        queries = sum(of_queries.counts[mesh.rank - rank :][:degree])
    if isinstance(of_keys, Held):
        keys = sum(of_keys.counts[mesh.rank - rank :][:degree])
    return queries, keys


def _may_have_rows(given: Arguments) -> bool:
    """Whether a bias may differ among queries; a single one cannot tell."""
    bias = given.attn_bias
    return bias is not None and (bias.shape[2] != 1 or given.q.shape[1] == 1)


def filled_up(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A contiguous tensor of that shape that begins with x."""
    if tuple(x.shape) == shape:
        return x.contiguous()
    room = x.new_zeros(shape)
    room[tuple(slice(n) for n in x.shape)] = x
    return room


def _recalled(
    given: Arguments, results: Results, kept: Sequence[Tensor]
) -> tuple[Tensors, Results, Call]:
    """The inputs and results of this rank's heads, and the very call; nobody is asked again."""
    tensors, options, seed, rows = given.tensors, given.options, 0, 0
    if agrees(given):
        told, *kept = kept
        query_len, key_len, seed, name, rows = told.tolist()
        options = replace(options, seq_len=(query_len, key_len))
        if given.on is not None and name:
            meet_before_backward(given.on, name)
    request = check(tensors, options, given.on, seed)
    if not given.heads_change_hands:
        tensors, call = prepare(tensors, request, given.on)
        inputs = scattered(tensors, call)
        if inputs.attn_bias is not None:
            inputs = inputs._replace(attn_bias=levels.prepared(inputs.attn_bias)[0])
            results = Results(results.out, kept[0], _or_none(kept[1]))
        return inputs, results, call
    queries, keys = sum(request.query_lengths), sum(request.key_lengths)
    q, k, v, out, lse, *rest = kept
    q, out, k, v = q[:, :queries], out[:, :queries], k[:, :keys], v[:, :keys]
    level = rest.pop(0)[:, :, :queries] if given.attn_bias is not None else None
    mask = rest.pop(0)[:, :keys].contiguous() if given.key_padding_mask is not None else None
    tensors, call = prepare(tensors, request, given.on, bias_rows=bool(rows))
    bias = tensors.attn_bias
    if rows:
        bias = rest[0][:, :queries].transpose(1, 2)
    elif bias is not None and call.bias_cut is not None:
        bias = levels.prepared(scatter_bias(call.ulysses, bias, call.bias_cut))[0]
    inputs = Tensors(q, k, v, mask, bias, own_slopes(tensors.alibi_slopes, call))
    return inputs, Results(out, lse[:, :, :queries].contiguous(), _or_none(level)), call


def _level_shape(q: Tensor, mask: Tensor | None, bias: Tensor) -> tuple[int, ...]:
    """(B|1, H|1, Lq), as bias and mask together are broadcast."""
    return bias.shape[0] if mask is None else q.shape[0], bias.shape[1], q.shape[1]


def _or_none(level: Tensor | None) -> Tensor | None:
    """A level that every row is at, 0, as none."""
    return level if level is not None and level.any() else None


def _gradients(
    dout: Tensor,
    dlse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    kept: Sequence[Tensor],
    bias_gradient: bool,
    *args: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    inputs, results, call = _recalled(Arguments(*args), Results(out, lse, None), kept)
    dq, dk, dv, dbias = attention_backward(dout, dlse, inputs, results, call, bias_gradient)
    # dk and dv are two views of one message, but outputs of an op must not share memory.
    return dq, dk, dv.clone(), dq.new_empty(0) if dbias is None else dbias.contiguous()


def _fake_forward(*args: Any) -> tuple[Tensor, Tensor, list[Tensor]]:
    given = Arguments(*args)
    q, v = given.q, given.v
    batch, length, heads = q.shape[:3]
    out = q.new_empty((batch, length, heads, v.shape[3]))
    lse = q.new_empty((batch, heads, length), dtype=state_dtype(q.dtype))
    kept = [torch.empty(5, dtype=torch.int64, device="cpu")] if agrees(given) else []
    if given.heads_change_hands:
        kept += [q.new_empty(shape, dtype=dtype) for shape, dtype in _rooms(given)]
        return out, lse if given.return_lse else q.new_empty(0), kept
    if given.attn_bias is not None:
        shape = _level_shape(q, given.key_padding_mask, given.attn_bias)
        kept += [lse.new_empty(lse.shape), lse.new_empty(shape)]
    return out, lse, kept


def _fake_gradients(
    dout: Tensor,
    dlse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    kept: Sequence[Tensor],
    bias_gradient: bool,
    *args: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    q, k, v, _, bias, *_ = args
    dbias = bias.new_empty(bias.shape) if bias_gradient else q.new_empty(0)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), dbias


def _vmapped(overload: str, info: Any, in_dims: Sequence[Any], *args: Any) -> tuple[Any, Any]:
    """One call for each item: what is dropped, and what ranks exchange, is that of the item."""
    mapped = [isinstance(dim, int) for dim in in_dims]
    calls = [
        getattr(torch.ops.usp.attention, overload)(
            *(
                x.select(dim, i) if has_dim else x
                for x, dim, has_dim in zip(args, in_dims, mapped, strict=True)
            )
        )
        for i in range(info.batch_size)
    ]
    out, lse, kept = zip(*calls, strict=True)
    stacked = [torch.stack(items) for items in zip(*kept, strict=True)]
    return (torch.stack(out), torch.stack(lse), stacked), (0, 0, [0] * len(stacked))


register(
    "attention",
    SCHEMA,
    (_forward, _fake_forward, _gradients, _fake_gradients),
    "Tensor dq, Tensor dk, Tensor dv, Tensor dbias",
)
for _overload in OVERLOADS:
    _op = getattr(torch.ops.usp.attention, _overload)
    torch.library.register_vmap(_op, partial(_vmapped, _overload), lib=LIBRARY)
