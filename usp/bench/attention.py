"""Attention on one device: a case's inputs, and every way to compute it, forward and backward."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from usp import long_context_attention
from usp.backends import in_order
from usp.bench.case import Case
from usp.bench.device import DTYPES, Run
from usp.bench.exact import NAMES, exact_heads, relative_error
from usp.kernels import architecture, configs, has_gluon
from usp.planning.problem import Traits

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Own:
    """A backend of usp, and what must be set while it runs."""

    backend: Any
    setting: Callable[[], AbstractContextManager[object]] = nullcontext

    def __call__(self, run: Callable[..., Any], *args: Any) -> Any:
        """Run it so."""
        with self.setting():
            return run(*args)


def own(dtype: torch.dtype, head_dim: int, device: str) -> dict[str, Own]:
    """Every backend that takes such a problem there, by name; "auto" would take the first."""
    found = {name: Own(backend) for name, backend, reasons in asked(dtype, head_dim, device)
             if not reasons}  # fmt: skip
    if "usp triton" in found and has_pipelines(head_dim, device):
        found["usp hopper"] = Own(found["usp triton"].backend, configs.pipelined)
    return found


def asked(
    dtype: torch.dtype, head_dim: int, device: str
) -> Iterator[tuple[str, Any, tuple[str, ...]]]:
    """Every backend in order of preference: its name here, itself, and why it cannot."""
    name, dims = architecture(torch.device(device)), (head_dim, head_dim)
    traits = Traits(device, dtype, *dims, head_dim**-0.5, architecture=name)
    for backend in in_order(name):
        yield f"usp {backend.NAME}", backend, backend.reasons_against(traits)


def has_pipelines(head_dim: int, device: str) -> bool:
    """Whether the Triton backend has kernels for Hopper alone beside the portable ones."""
    if device != "cuda" or head_dim > 128 or not hasattr(configs, "pipelined"):
        return False
    return configs.family(torch.device(device)) == "sm_90" and has_gluon()


class Problem:
    """Inputs of a case on a device, and every way to compute it, by name.

    Each is a function of q, k, v (B, L, H, D) that returns out in the same layout.
    """

    def __init__(
        self, case: Case, device: str, ours: Mapping[str, Own], rivals: Mapping[str, Attend]
    ) -> None:
        self.case, self.device, self.own = case, device, ours
        generator = torch.Generator(device).manual_seed(0)
        batch, length, heads, head_dim = case.shape

        def randn(num_heads: int) -> Tensor:
            shape = (batch, length, num_heads, head_dim)
            x = torch.randn(shape, generator=generator, device=device)
            return x.to(DTYPES[case.dtype])

        self.leaves = [randn(heads), randn(case.kv_heads), randn(case.kv_heads)]
        self.dout = randn(heads)
        for leaf in self.leaves:
            leaf.requires_grad_()
        self.candidates: dict[str, Attend] = {
            **{name: self._usp(contestant) for name, contestant in ours.items()},
            **rivals,
        }

    def _usp(self, contestant: Own) -> Attend:
        options = self.case.options | {"backend": contestant.backend.NAME}

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            out = contestant(partial(long_context_attention, **options), q, k, v)
            assert isinstance(out, Tensor)
            return out

        return attend

    def run(self, name: str, which: str) -> Run:
        """One forward, one backward through a graph that is kept, or both."""
        attend = self.candidates[name]
        if which == "forward":
            on_gpu = self.device == "cuda"
            # on CPUs FlexAttention refuses what has gradients, elsewhere it would be compiled twice
            leaves = self.leaves if on_gpu else [x.detach() for x in self.leaves]

            def forward() -> Tensor:
                with torch.set_grad_enabled(name == "flex" and on_gpu):
                    return attend(*leaves)

            return forward
        if which == "both":
            return lambda: self._grads(name, attend(*self.leaves))
        out = attend(*self.leaves)
        return partial(self._grads, name, out)

    def _grads(self, name: str, out: Tensor) -> tuple[Tensor, ...]:
        grad = partial(torch.autograd.grad, retain_graph=True)
        if name in self.own:
            return tuple(self.own[name](grad, out, self.leaves, self.dout))
        return grad(out, self.leaves, self.dout)

    @cached_property
    def exact(self) -> dict[str, Tensor]:
        """In fp64: the heads of the last key head in the last sequence."""
        q, k, v = (x[-1] for x in self.leaves)
        group = self.case.group
        tensors = (q[:, -group:], k[:, -1], v[:, -1], self.dout[-1, :, -group:])
        return exact_heads(tensors, self.case.interval(self.device), self.case.head_dim**-0.5)

    def errors(self, name: str, backward: bool = True) -> dict[str, float]:
        """Relative rms error of each tensor there."""
        if backward:
            out = self.candidates[name](*self.leaves)
            results = (out.detach(), *self._grads(name, out))
        else:
            results = (self.run(name, "forward")(),)
        group = self.case.group
        heads: dict[str, Any] = {"out": slice(-group, None), "dq": slice(-group, None)}
        heads |= {"dk": -1, "dv": -1}
        return {
            n: relative_error(x[-1, :, heads[n]], self.exact[n])
            for n, x in zip(NAMES, results, strict=False)
        }
