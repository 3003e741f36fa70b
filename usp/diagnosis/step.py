"""One step of attention on every rank, recorded."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

import torch

import usp
from usp.diagnosis.ranks import Note
from usp.diagnosis.spans import HostClock, Recorder, Span, StreamClock
from usp.planning.masks.mask import Mask

WARM_UP = 2


@dataclass(frozen=True)
class Step:
    """What is run.

    Attributes:
        seq_len, heads, kv_heads, head_dim, batch: Of the whole attention.
        ulysses, ring: Degrees; ring None is all other ranks.
        layout, transport, mask: As ``usp.long_context_attention`` takes them.
        dtype: By name.
        device_type: Where.
        backward: Whether gradients are computed too.
    """

    seq_len: int
    heads: int
    kv_heads: int
    head_dim: int
    batch: int
    ulysses: int
    ring: int
    layout: str
    transport: str
    mask: Mask | None
    dtype: str
    device_type: str
    backward: bool


def step_on(step: Step, rank: int, ranks: int, note: Note) -> str:
    """This rank's spans of the last of a few steps, as text."""
    if step.device_type == "cpu":
        torch.set_num_threads(1)
    note("groups")
    mesh = usp.init_mesh(step.ulysses, step.ring, device_type=step.device_type)
    held = len(usp.positions(step.seq_len, mesh, step.layout))
    dtype = getattr(torch, step.dtype)
    q, k, v = (
        torch.randn(
            step.batch, held, n, step.head_dim, dtype=dtype, device=step.device_type
        ).requires_grad_(step.backward)
        for n in (step.heads, step.kv_heads, step.kv_heads)
    )
    cotangent = torch.ones_like(q)

    def run() -> None:
        out = usp.long_context_attention(
            q,
            k,
            v,
            mesh,
            mask=step.mask,
            layout=step.layout,
            seq_len=step.seq_len,
            transport=step.transport,
        )
        assert isinstance(out, torch.Tensor)
        if step.backward:
            out.backward(cotangent)

    note("warm-up")
    for _ in range(WARM_UP):
        run()
    note("the step")
    mesh.gather_objects(None)
    recorder = Recorder(HostClock() if step.device_type == "cpu" else StreamClock())
    with recorder.recording():
        run()
    return json.dumps([asdict(span) for span in recorder.spans()])


def spans_of(text: str) -> list[Span]:
    """What ``step_on`` has told."""
    return [Span(**span) for span in json.loads(text)]
