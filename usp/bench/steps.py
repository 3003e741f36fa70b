"""What a rank does between messages: one ring step, one head exchange, one merge."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from unittest import mock

import torch
from torch import Tensor

from usp import kernels
from usp.attention import block, ulysses
from usp.bench.attention import Own
from usp.bench.libraries import Library, Merge
from usp.distributed.comm import Axis
from usp.ops import native as ops
from usp.ops.merge import MERGERS, merge
from usp.planning.heads import Heads
from usp.planning.problem import Block, Scoring, State
from usp.planning.visit import whole_visit


@dataclass(frozen=True, eq=False)
class RingStep:
    """All queries against all keys of one block, into a state that holds another block."""

    q: Tensor
    blocks: tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]

    def state(self, own: Own) -> State:
        """That has seen the first block."""
        state = block.new_state(self.q, self.q.shape[-1])
        self.usp(own, state, 0)
        return state

    def no_state(self) -> State:
        """That has seen nothing and gives its result at once, in the dtype of q."""
        state = block.new_state(self.q, self.q.shape[-1], carried=False)
        return State(None, state.lse, torch.empty_like(self.q))

    def usp(self, own: Own, state: State, which: int = 1) -> None:
        length, heads = self.q.shape[1], self.q.shape[2]
        visit = whole_visit(length, length)
        k, v = self.blocks[which]
        scoring = Scoring(self.q.shape[-1] ** -0.5)
        piece = Block(self.q, k, v, visit, Heads(0, heads, heads, 1), scoring)
        own(block.attention_forward, piece, state, own.backend)

    def library(self, library: Library, merge: Merge, state: State) -> None:
        out, lse, _ = library.forward(self.q, *self.blocks[1], False)
        merge(state, out, lse)

    def exact(self, head: int) -> Tensor:
        """out of one head over both blocks, in fp64."""
        k, v = (torch.cat([b[part][0, :, head] for b in self.blocks]) for part in (0, 1))
        p = (self.q[0, :, head].double() @ k.double().T * k.shape[1] ** -0.5).softmax(1)
        return p @ v.double()


class Row(Axis):
    """Ranks that all hold the same: what one sends to the others is what comes in."""

    def all_to_all(self, messages: Tensor, send: Sequence[int], recv: Sequence[int]) -> Tensor:
        assert list(send) == list(recv)
        return messages


class HeadExchange:
    """q, k, v (1, L, H, D) of one of ``degree`` ranks, each of which gets H / degree heads."""

    def __init__(self, degree: int, q: Tensor, k: Tensor, v: Tensor) -> None:
        self.row, self.tensors = Row(degree, 0, None), [q, k, v]
        _, length, heads, _ = q.shape
        each = heads // degree
        runs = tuple((rank * each, (rank + 1) * each) for rank in range(degree))
        self.cut = ulysses.Cut((length,) * degree, runs)
        self.gathered = self.expected("scatter")
        size = self.bytes_moved // 2
        self.source, self.target = (
            torch.ones(size, dtype=torch.uint8, device=q.device) for _ in "12"
        )

    @property
    def bytes_moved(self) -> int:
        """Read and written, into a message and out of it."""
        return 4 * sum(x.numel() * x.element_size() for x in self.tensors)

    def expected(self, which: str) -> list[Tensor]:
        """Where all ranks hold the same."""
        if which == "gather":
            return self.tensors
        return [
            torch.cat([x[:, :, slice(*run)] for run in self.cut.heads], 1) for x in self.tensors
        ]

    def copy(self) -> Tensor:
        """As many bytes read and written as an exchange must."""
        return self.target.copy_(self.source)

    def scatter(self) -> list[Tensor]:
        return ulysses.scatter_heads(self.row, self.tensors, [self.cut] * 3)

    def gather(self) -> list[Tensor]:
        return ulysses.gather_heads(self.row, self.gathered, [self.cut] * 3)

    def torch_scatter(self) -> list[Tensor]:
        """By torch alone: pieces made contiguous, joined to a message, cut and joined again."""
        pieces = [[x[:, :, slice(*run)] for x in self.tensors] for run in self.cut.heads]
        message = torch.cat([x.contiguous().flatten() for piece in pieces for x in piece])
        parts = message.split([x.numel() for piece in pieces for x in piece])
        return [
            torch.cat([p.view(x[n].shape) for p, x in zip(parts[n::3], pieces, strict=True)], 1)
            for n in range(3)
        ]

    def torch_gather(self) -> list[Tensor]:
        split = [x.split(self.cut.lengths, 1) for x in self.gathered]
        pieces = list(zip(*split, strict=True))
        message = torch.cat([x.contiguous().flatten() for piece in pieces for x in piece])
        parts = message.split([x.numel() for piece in pieces for x in piece])
        return [
            torch.cat([p.view(x[n].shape) for p, x in zip(parts[n::3], pieces, strict=True)], 2)
            for n in range(3)
        ]

    def runs(self, which: str) -> dict[str, Callable[[], list[Tensor]]]:
        """Every way that is here."""
        ours = self.scatter if which == "scatter" else self.gather
        found = {"torch": self.torch_scatter if which == "scatter" else self.torch_gather}
        device = self.tensors[0].device.type
        if kernels.reason_against(device) is None:
            found["usp triton"] = ours
        if ops.is_there("pack", device):

            def native() -> list[Tensor]:
                with without_triton():
                    return ours()

            found["usp native"] = native
        return found


@contextmanager
def without_triton() -> Iterator[None]:
    with mock.patch.object(kernels, "can_take", lambda *tensors: False):
        yield


class StateMerge:
    """A partial result (1, L, H, D) into a state, by each way of ``ops.merge``, and by torch."""

    def __init__(self, out: Tensor, more: Tensor) -> None:
        shape = out.shape[0], out.shape[2], out.shape[1]
        generator = torch.Generator(out.device).manual_seed(1)
        self.lse, self.more_lse = (
            torch.randn(shape, generator=generator, device=out.device) for _ in "12"
        )
        self.out, self.more = out.float(), more

    @property
    def bytes_moved(self) -> int:
        """The state read and written, what comes read."""
        return 2 * (self.out.nbytes + self.lse.nbytes) + self.more.nbytes + self.more_lse.nbytes

    def runs(self) -> dict[str, Callable[[], tuple[Tensor, Tensor]]]:
        """Every way that takes it, each into a state of its own: which it returns."""
        given = self.out, self.lse, self.more, self.more_lse
        ways = {
            "torch" if name == "torch" else f"usp {name}": merger.merge_into
            for name, merger in MERGERS.items()
            if merger.takes(*given)
        }

        def run(merge_into: Callable[..., None]) -> Callable[[], tuple[Tensor, Tensor]]:
            out, lse = self.out.clone(), self.lse.clone()

            def call() -> tuple[Tensor, Tensor]:
                merge_into(out, lse, self.more, self.more_lse)
                return out, lse

            return call

        return {name: run(way) for name, way in ways.items()}

    def exact(self) -> Tensor:
        """The new out, in fp64."""
        given = (self.out, self.lse, self.more, self.more_lse)
        return merge(*(x.double() for x in given))[0]
