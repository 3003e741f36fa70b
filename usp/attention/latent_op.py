"""Latent attention as one op, as ``op.py`` makes one of attention: its arguments are those, and
behind them the latents, of which k and v there are but the shapes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from usp.attention.arguments import check
from usp.attention.given import Latents, Options, Tensors
from usp.attention.hybrid import Call, Results, own_slopes, prepare
from usp.attention.latent_passes import Held, latent_backward, latent_forward, scattered_latents
from usp.attention.op import agrees, filled_up, room_of_row
from usp.attention.op_arguments import SCHEMA, Arguments, arguments
from usp.attention.op_frame import NUMBER, called, register
from usp.attention.request import agree_on_request
from usp.distributed.agreement import When, meet_before_backward
from usp.distributed.mesh import SequenceMesh
from usp.planning.heads import split_heads
from usp.planning.problem import state_dtype


class _Given(NamedTuple):
    """What the op takes."""

    arguments: Arguments
    latents: Latents

    @classmethod
    def of(cls, args: Sequence[Any]) -> _Given:
        return cls(Arguments(*args[:NUMBER]), Latents(*args[NUMBER:]))

    @property
    def options(self) -> Options:
        return replace(self.arguments.options, latents=self.latents)

    def prepared(
        self, call: Call, tensors: Tensors
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
        """As ``latent_forward`` takes it."""
        given = self.latents
        keys = torch.cat((given.latent, given.rope_key), -1)[:, :, None]
        slopes = own_slopes(tensors.alibi_slopes, call)
        return tensors.q, keys, given.up_k, given.up_v, tensors.key_padding_mask, slopes


def attention(
    tensors: Tensors,
    options: Options,
    mesh: SequenceMesh | None,
    dropout_seed: int | Tensor | None,
    validate: When,
) -> Tensor | tuple[Tensor, Tensor]:
    """``latent_attention`` through the op; ``options`` hold the latents."""
    latents = options.latents
    assert latents is not None
    needed = [torch.is_grad_enabled() and x.requires_grad for x in (tensors.q, *latents)]
    given = arguments(tensors, options, mesh, dropout_seed, validate)._replace(gradients=needed)
    return called("latent_attention", (*given, *latents), mesh, options.return_lse)


def _forward(*args: Any) -> tuple[Tensor, Tensor, list[Tensor]]:
    of = _Given.of(args)
    given, drawn = of.arguments, of.arguments.seed_is_drawn
    request, name = agree_on_request(
        given.tensors,
        of.options,
        given.on,
        None if drawn else given.number,
        given.number if drawn else None,
        given.compares,
        given.gradients,
    )
    tensors, call = prepare(given.tensors, request, given.on)
    out, lse, (held, results) = latent_forward(*of.prepared(call, tensors), call)
    if call.ulysses.size == 1:
        lse = results.lse
    kept: list[Tensor] = []
    if given.heads_change_hands:
        kept = [held.q, _with_dims(held.latent, of), results.out, results.lse]
        kept += [] if held.mask is None else [held.mask]
        kept = [filled_up(x, shape) for x, (shape, _) in zip(kept, _rooms(of), strict=True)]
    if agrees(given):
        told = (request.query_len, request.key_len, request.scoring.dropout_seed, name or 0)
        kept.insert(0, torch.tensor(told, device="cpu"))
    return out, out.new_empty(0) if lse is None else lse, kept


def _with_dims(latent: Tensor, of: _Given) -> Tensor:
    """Latents as wide as others hold them, where no heads are held and none have come."""
    return latent if latent.shape[2] else latent.new_zeros((*latent.shape[:2], of.latents.width))


def _rooms(of: _Given) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """As those of attention."""
    given, q = of.arguments, of.arguments.q
    assert given.on is not None
    on, (queries, keys) = given.on, room_of_row(given)
    own = split_heads(int(q.shape[2]), int(q.shape[2]), on.ulysses_degree)[on.ulysses_rank].count
    rooms: list[tuple[tuple[int, ...], torch.dtype]] = [
        ((q.shape[0], queries, own, q.shape[3]), q.dtype),
        ((q.shape[0], keys, of.latents.width), q.dtype),
        ((q.shape[0], queries, own, given.v.shape[3]), q.dtype),
        ((q.shape[0], own, queries), state_dtype(q.dtype)),
    ]
    mask = given.key_padding_mask
    return rooms if mask is None else [*rooms, ((q.shape[0], keys), mask.dtype)]


def _recalled(of: _Given, results: Results, kept: Sequence[Tensor]) -> tuple[Held, Results, Call]:
    """What was computed with, and the very call; nobody is asked again."""
    given, options, seed = of.arguments, of.options, 0
    if agrees(given):
        told, *kept = kept
        query_len, key_len, seed, name = told.tolist()
        options = replace(options, seq_len=(query_len, key_len))
        if given.on is not None and name:
            meet_before_backward(given.on, name)
    request = check(given.tensors, options, given.on, seed)
    tensors, call = prepare(given.tensors, request, given.on)
    _, _, up_k, up_v, mask, slopes = prepared = of.prepared(call, tensors)
    if not given.heads_change_hands:
        return scattered_latents(*prepared, call), results, call
    queries, keys = sum(request.query_lengths), sum(request.key_lengths)
    q, latent, out, lse, *masks = kept
    mask = masks[0][:, :keys].contiguous() if masks else None
    latent = latent[:, :keys]
    if not call.heads[call.ulysses.rank].count:  # none have come
        latent = latent[:, :, :0]
    held = Held(q[:, :queries], latent, up_k, up_v, mask, slopes)
    return held, Results(out[:, :queries], lse[:, :, :queries].contiguous(), None), call


def _gradients(
    dout: Tensor,
    dlse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    kept: Sequence[Tensor],
    bias_gradient: bool,
    *args: Any,
) -> tuple[Tensor, ...]:
    of = _Given.of(args)
    held, results, call = _recalled(of, Results(out, lse, None), kept)
    dq, dkeys, dup_k, dup_v = latent_backward(dout, dlse, held, results, call)
    width = of.latents.latent.shape[2]
    parts = (dkeys[:, :, 0, :width].clone(), dkeys[:, :, 0, width:].clone())
    return dq, *parts, dup_k, dup_v


def _fake_forward(*args: Any) -> tuple[Tensor, Tensor, list[Tensor]]:
    of = _Given.of(args)
    given, q = of.arguments, of.arguments.q
    out = q.new_empty((*q.shape[:3], given.v.shape[3]))
    lse = q.new_empty((q.shape[0], q.shape[2], q.shape[1]), dtype=state_dtype(q.dtype))
    kept = [torch.empty(4, dtype=torch.int64, device="cpu")] if agrees(given) else []
    if given.heads_change_hands:
        kept += [q.new_empty(shape, dtype=dtype) for shape, dtype in _rooms(of)]
        return out, lse if given.return_lse else q.new_empty(0), kept
    return out, lse, kept


def _fake_gradients(
    dout: Tensor,
    dlse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    kept: Sequence[Tensor],
    bias_gradient: bool,
    *args: Any,
) -> tuple[Tensor, ...]:
    of = _Given.of(args)
    return tuple(x.new_empty(x.shape) for x in (of.arguments.q, *of.latents))


register(
    "latent_attention",
    f"{SCHEMA}, Tensor latent, Tensor rope_key, Tensor up_k, Tensor up_v",
    (_forward, _fake_forward, _gradients, _fake_gradients),
    "Tensor dq, Tensor dlatent, Tensor drope_key, Tensor dup_k, Tensor dup_v",
)
