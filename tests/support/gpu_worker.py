"""Workers whose tensors live on a GPU that they share; gloo moves them through host memory."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any

import torch
import torch.distributed as dist
from cases import Case, Tensors, local
from judge import attend
from torch import Tensor
from triton_interpreter import start_interpreter


def start_gpu_worker() -> None:
    """In a fresh process: gloo has no point to point for GPU tensors, so lend it host copies."""
    # what torch asks for so that its own products are deterministic, as workers want them
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    if os.environ.get("TRITON_INTERPRET"):
        start_interpreter()
    from usp.distributed.comm import Axis, Wait

    shift, all_gather, all_to_all = Axis.shift, Axis.all_gather, Axis.all_to_all
    exchange = Axis.exchange

    def shift_by_host(self: Axis, message: Tensor, out: Tensor, by: int = 1) -> Wait:
        wait = shift(self, message.cpu(), torch.empty_like(out, device="cpu"), by)
        return lambda: out.copy_(wait())

    def gather_by_host(self: Axis, message: Tensor, whole: Tensor, sizes: Sequence[int]) -> Wait:
        wait = all_gather(self, message.cpu(), torch.empty_like(whole, device="cpu"), sizes)
        return lambda: whole.copy_(wait())

    def all_to_all_by_host(
        self: Axis, messages: Tensor, send: Sequence[int], recv: Sequence[int]
    ) -> Tensor:
        return all_to_all(self, messages.cpu(), send, recv).to(messages.device)

    def exchange_by_host(
        self: Axis, send: Sequence[tuple[int, Tensor]], receive: Sequence[tuple[int, Tensor]]
    ) -> Callable[[], None]:
        came = [(step, torch.empty_like(out, device="cpu")) for step, out in receive]
        wait = exchange(self, [(step, message.cpu()) for step, message in send], came)

        def arrive() -> None:
            wait()
            for (_, out), (_, held) in zip(receive, came, strict=True):
                out.copy_(held)

        return arrive

    Axis.shift, Axis.all_gather = shift_by_host, gather_by_host
    Axis.all_to_all, Axis.exchange = all_to_all_by_host, exchange_by_host


def run_on_device(case: Case, device: str) -> dict[str, Tensor]:
    """On a worker: this rank's results and gradients, computed there."""
    import pool

    mesh = pool.mesh(case.ulysses, case.ring) if case.on_mesh else None
    t = local(case, dist.get_rank())
    moved: dict[str, Any] = {
        field.name: x.to(device) if isinstance(x := getattr(t, field.name), Tensor) else x
        for field in fields(Tensors)
    }
    return {name: x.cpu() for name, x in attend(case, Tensors(**moved), mesh).items()}


def one_rank_alone(store: str, device: str) -> None:
    """A program of its own: the NCCL path with one rank (gloo on CPU), against one device."""
    import usp

    family = "nccl" if device == "cuda" else "gloo"
    dist.init_process_group(family, store=dist.FileStore(store, 1), rank=0, world_size=1)
    try:
        mesh = usp.init_mesh(1, 1, device_type=device)
        shape = (2, 257, 4, 64) if device == "cuda" else (2, 19, 4, 8)
        q, k, v, dout = (torch.randn(shape, device=device).bfloat16() for _ in range(4))
        results = []
        for where in (mesh, None):
            leaves = [x.clone().requires_grad_() for x in (q, k, v)]
            out = usp.LongContextAttention(where, causal=True, layout="zigzag")(*leaves)
            results.append([out, *torch.autograd.grad(out, leaves, dout)])
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
        message = torch.arange(8, device=device)
        total = message.clone()
        dist.all_reduce(total)
        assert torch.equal(message, total)
    finally:
        dist.destroy_process_group()
