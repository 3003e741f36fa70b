"""Ring steps and whole rings of virtual ranks on one device: usp against library call + merge.

The rival is the ring as ring-flash-attention's users run it: a library's partial results in the
inputs' dtype, merged in fp32 by PyTorch, zigzag cut into whole halves of queries or keys.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from usp import block
from usp.backends import triton
from usp.mask import make_mask
from usp.plan import Plan, Step, make_plan
from usp.problem import Block, Heads, Scoring, State

Partial = tuple[Tensor, Tensor]
Library = Callable[[Tensor, Tensor, Tensor, bool], Partial]


def flash(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Partial:
    """torch's FlashAttention-2 with its LSE; (B, L, H, D)."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal)
    return out.transpose(1, 2), lse


def cudnn(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Partial:
    """cuDNN's attention with its LSE."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
        q, k, v, None, True, 0.0, causal
    )
    return out.transpose(1, 2), lse.reshape(q.shape[:3])


def on_cpu(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Partial:
    """torch's CPU kernel, for a dry run."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal)
    return out.transpose(1, 2), lse


LIBRARIES: dict[str, Library] = {"flash": flash, "cudnn": cudnn}


def eager_merge(state: State, out: Tensor, lse: Tensor) -> None:
    """The usual update: out - sigmoid(lse' - lse) (out - out'), in PyTorch."""
    share = torch.sigmoid(lse - state.lse).transpose(1, 2)[..., None]
    state.out.sub_(share * (state.out - out.float()))
    state.lse.copy_(state.lse - torch.nn.functional.logsigmoid(state.lse - lse))


def fused_merge(state: State, out: Tensor, lse: Tensor) -> None:
    """usp's own merge kernel."""
    block.merge_into(state.out, state.lse, out, lse)


@dataclass(frozen=True, eq=False)
class RingStep:
    """All queries against all keys of one block, into a state that holds another block."""

    q: Tensor
    blocks: tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]

    def state(self) -> State:
        state = block.new_state(self.q, self.q.shape[-1])
        self.usp(state, 0)
        return state

    def usp(self, state: State, which: int = 1) -> None:
        length, heads = self.q.shape[1], self.q.shape[2]
        step = Step(0, length, length, None, length * length)
        scoring = Scoring(self.q.shape[-1] ** -0.5)
        k, v = self.blocks[which]
        piece = Block(self.q, k, v, step, Heads(0, heads, heads, 1), scoring)
        block.attention_forward(piece, state, triton)

    def library(self, state: State, call: Library, merge: Callable[..., None]) -> None:
        merge(state, *call(self.q, *self.blocks[1], False))


@dataclass(frozen=True, eq=False)
class VirtualRing:
    """A causal zigzag ring whose ranks take turns on one device; forward."""

    ranks: int
    q: Tensor
    k: Tensor
    v: Tensor

    @property
    def plans(self) -> list[Plan]:
        length = self.q.shape[1]
        mask = make_mask(causal=True)
        return [make_plan(mask, "zigzag", length, length, self.ranks, r) for r in range(self.ranks)]

    def shards(self) -> list[list[Tensor]]:
        """q, k, v of each rank."""
        rows = [plan.queries.positions_on(self.q.device) for plan in self.plans]
        return [[x.index_select(1, row) for x in (self.q, self.k, self.v)] for row in rows]

    def usp(self, shards: list[list[Tensor]]) -> list[Tensor]:
        heads = self.q.shape[2]
        held = Heads(0, heads, heads, 1)
        scoring = Scoring(self.q.shape[-1] ** -0.5)
        outs = []
        for plan in self.plans:
            q = shards[plan.ring_rank][0]
            state = block.new_state(q, q.shape[-1])
            for step in plan.steps:
                _, k, v = shards[step.owner]
                piece = Block(q, k, v, step, held, scoring)
                block.attention_forward(piece, state, triton)
            outs.append(state.out.to(q.dtype))
        return outs

    def library(
        self, shards: list[list[Tensor]], call: Library, merge: Callable[..., None]
    ) -> list[Tensor]:
        outs = []
        for rank in range(self.ranks):
            q, k, v = shards[rank]
            half = q.shape[1] // 2
            out, lse = call(q, k, v, True)
            state = State(out.float(), lse.float().clone())
            for step in range(1, self.ranks):
                owner = (rank - step) % self.ranks
                _, k, v = shards[owner]
                if step <= rank:
                    merge(state, *call(q, k[:, :half], v[:, :half], False))
                else:
                    later = State(state.out[:, half:], state.lse[:, :, half:])
                    merge(later, *call(q[:, half:], k, v, False))
            outs.append(state.out.to(q.dtype))
        return outs
