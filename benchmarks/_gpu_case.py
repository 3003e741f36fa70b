"""What the GPU benchmark computes: one case, by usp and by each rival that is there."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from _attention_case import DTYPES, GROUP
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from usp import long_context_attention

Run = Callable[[], Any]
MASKS = ("causal", "full", "gqa")  # gqa: causal, 8 query heads for a key head
FLOPS = {"forward": 4.0, "backward": 10.0}  # of a visible pair, a head and a head dim
_FLASH = {"flash_attn": "flash-attn 2", "flash_attn_interface": "flash-attn 3"}


@dataclass(frozen=True)
class Case:
    """``tokens`` in all, cut into sequences of ``length``; ``width`` = heads x head_dim."""

    dtype: str
    head_dim: int
    length: int
    mask: str
    tokens: int = 16384
    width: int = 2048

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return max(1, self.tokens // self.length), self.length, self.heads, self.head_dim

    @property
    def heads(self) -> int:
        return self.width // self.head_dim

    @property
    def kv_heads(self) -> int:
        return max(1, self.heads // GROUP) if self.mask == "gqa" else self.heads

    @property
    def is_causal(self) -> bool:
        return self.mask != "full"

    def flops(self, which: str) -> float:
        """The usual way: a causal mask halves."""
        batch, length, heads, head_dim = self.shape
        pairs = float(batch) * length * length * heads
        return FLOPS[which] * pairs * head_dim * (0.5 if self.is_causal else 1.0)


class Problem:
    """Inputs of a case on a device, and every way to compute it.

    Each is a function of q, k, v (B, L, H, D) that returns out in the same layout.
    """

    def __init__(self, case: Case, device: str) -> None:
        self.case, self.device = case, device
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

    @cached_property
    def candidates(self) -> dict[str, Callable[..., Tensor]]:
        found: dict[str, Callable[..., Tensor]] = {"usp": self._usp}
        if self.device == "cpu":
            return found | {"sdpa": self._sdpa}
        found |= {
            "sdpa flash": self._forced(SDPBackend.FLASH_ATTENTION),
            "sdpa cudnn": self._forced(SDPBackend.CUDNN_ATTENTION),
            "flex": self._flex,
        }
        return found | dict(self._installed())

    def _usp(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return long_context_attention(q, k, v, causal=self.case.is_causal, backend="triton")

    def _sdpa(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        heads_first = (x.transpose(1, 2) for x in (q, k, v))
        out = F.scaled_dot_product_attention(
            *heads_first, is_causal=self.case.is_causal, enable_gqa=self.case.mask == "gqa"
        )
        return out.transpose(1, 2)

    def _forced(self, backend: SDPBackend) -> Callable[..., Tensor]:
        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            with sdpa_kernel(backend):
                return self._sdpa(q, k, v)

        return attend

    def _flex(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = _compiled_flex()(
            *(x.transpose(1, 2) for x in (q, k, v)),
            block_mask=_causal_mask(self.case.length) if self.case.is_causal else None,
            enable_gqa=self.case.mask == "gqa",
        )
        return out.transpose(1, 2)

    def _installed(self) -> Iterator[tuple[str, Callable[..., Tensor]]]:
        for module, name in _FLASH.items():
            if importlib.util.find_spec(module) is not None:
                function = importlib.import_module(module).flash_attn_func

                def attend(q: Tensor, k: Tensor, v: Tensor, call: Any = function) -> Tensor:
                    out = call(q, k, v, causal=self.case.is_causal)
                    return out[0] if isinstance(out, tuple) else out

                yield name, attend

    def run(self, name: str, which: str) -> Run:
        """One forward, or one backward through a graph that is kept."""
        attend = self.candidates[name]
        if which == "forward":

            def forward() -> Tensor:
                with torch.no_grad():
                    return attend(*self.leaves)

            return forward
        out = attend(*self.leaves)
        return lambda: torch.autograd.grad(out, self.leaves, self.dout, retain_graph=True)

    def results(self, name: str) -> dict[str, Tensor]:
        out = self.candidates[name](*self.leaves)
        grads = torch.autograd.grad(out, self.leaves, self.dout)
        return {"out": out.detach(), **dict(zip(("dq", "dk", "dv"), grads, strict=True))}

    def exact_rows(self, rows: Tensor) -> dict[str, Tensor]:
        """out and dq of some rows of the last head of the last sequence, in fp64."""
        q, k, v = (x.detach()[-1, :, -1].double() for x in self.leaves)
        scores = q[rows] @ k.T * self.case.head_dim**-0.5
        if self.case.is_causal:
            hidden = torch.arange(len(k), device=k.device) > rows[:, None]
            scores = scores.masked_fill(hidden, -torch.inf)
        p = scores.softmax(1)
        out = p @ v
        dout = self.dout[-1, rows, -1].double()
        ds = p * (dout @ v.T - (dout * out).sum(1, keepdim=True))
        return {"out": out, "dq": ds @ k * self.case.head_dim**-0.5}


_flex_cache: dict[Any, Any] = {}


def _compiled_flex() -> Any:
    if "function" not in _flex_cache:
        from torch.nn.attention.flex_attention import flex_attention

        _flex_cache["function"] = torch.compile(flex_attention, dynamic=False)
    return _flex_cache["function"]


def _causal_mask(length: int) -> Any:
    if length not in _flex_cache:
        from torch.nn.attention.flex_attention import create_block_mask

        def causal(_b: Tensor, _h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return i >= j

        _flex_cache[length] = create_block_mask(causal, None, None, length, length, device="cuda")
    return _flex_cache[length]
