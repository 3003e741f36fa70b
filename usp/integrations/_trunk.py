"""A trunk of a model while it runs: which sequence its tokens are of."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import ReferenceType, ref

import torch
from torch import Tensor

from usp.distributed.mesh import SequenceMesh
from usp.integrations._answer import Tokens, refuse
from usp.integrations._boundary import Boundary
from usp.integrations._region import Region, is_in_reentrant_checkpoint
from usp.nn.spread import Spread
from usp.planning.layout import Layout


class Trunk:
    """What the modules of a trunk share.

    Attributes:
        mesh, layout, validate: Of the sequences in here.
        boundary: Where it is, and what is in it.
        dim: The dim of tokens.
        is_open: Whether the model's forward runs.
        running: Tokens of the sequence that is between the first module and the last; None
            elsewhere.
        region: That which is entered; None outside.
    """

    def __init__(
        self,
        mesh: SequenceMesh | None,
        layout: Layout,
        validate: bool | None,
        boundary: Boundary,
        dim: int,
    ) -> None:
        self.mesh, self.layout, self.validate = mesh, layout, validate
        self.boundary, self.dim = boundary, dim
        self.is_open = False
        self.running: Tokens | None = None
        self.region: Region | None = None
        self._seen: dict[int, Tokens] = {}
        self._left: dict[int, tuple[str, ReferenceType[Tensor]]] = {}

    def begin(self, x: Tensor) -> Tokens | None:
        """The tokens of a whole sequence that comes to the first module; None where it stays whole.

        Raises:
            RuntimeError: another is on its way; or nobody would divide its gradient by the ranks.
        """
        if not (self.is_open or is_computed_again()):
            self._refuse_gradients()
            return None
        length = x.shape[self.dim]
        if length not in self._seen:
            spread = Spread(self.mesh, self.layout, length, validate=self.validate)
            self._seen[length] = Tokens.of(spread, ())
        tokens = self._seen[length]
        if not is_computed_again():
            if self.running is not None:
                raise RuntimeError(
                    f"the first module of {self.boundary.trunk} is called again before the last: "
                    "the trunk must be modules that follow each other, each called once"
                )
            self.running = tokens
        return tokens

    def _refuse_gradients(self) -> None:
        several = self.mesh is not None and self.mesh.size > 1
        if several and (torch.is_grad_enabled() or is_in_reentrant_checkpoint()):
            raise RuntimeError(
                f"{self.boundary.trunk} is called outside of the model's forward, where every rank "
                "would have the gradient of the whole and their sum would be too large: call the "
                "model, or this under torch.no_grad()"
            )

    def end(self) -> None:
        """The sequence is whole again."""
        if not is_computed_again():
            self.running = None

    def close(self) -> None:
        """The forward of the model is over, whichever way."""
        self.is_open, self.running, self._left = False, None, {}

    def check_joined(self) -> None:
        """Raises:
        RuntimeError: the forward of the model is over, and tokens are not joined.
        """
        if self.running is not None:
            raise RuntimeError(
                f"the last module of {self.boundary.trunk} was not called, so tokens were cut and "
                "never joined: end the trunk where the model does"
            )

    def note_local(self, name: str, out: Any) -> None:
        """Remember what a module before the last has returned, while somebody else holds it."""
        several = self.mesh is not None and self.mesh.size > 1
        if several and not torch.compiler.is_compiling() and not is_computed_again():
            for x in out if isinstance(out, tuple | list) else (out,):
                if isinstance(x, Tensor):
                    self._left[id(x)] = name, ref(x)

    def check_outputs(self, leaves: Iterable[Any]) -> None:
        """Refuse outputs of the model that are those of a module before the last.

        Raises:
            NotImplementedError: names the module.
        """
        for x in leaves:
            name, held = self._left.get(id(x), ("", None))
            if isinstance(x, Tensor) and held is not None and held() is x:
                raise NotImplementedError(
                    f"the model returns what {name} does, {tuple(x.shape)}, which is this rank's "
                    "alone (hidden states of inner layers): it has whole ones of the last alone"
                )

    def current(self, x: Tensor | None) -> Tokens | None:
        """The tokens of the sequence that local ones are of; None where they are of none.

        A checkpoint computes modules again in the backward, when other sequences may have come
        since: it is the one of which this rank holds so many. Where that could be two, on this or
        another rank, the ranks tell each other what they hold.

        Args:
            x: What the module is given; None where it is not known.
        """
        if not is_computed_again():
            return self.running
        if len(self._seen) == 1:
            return next(iter(self._seen.values()))
        held = x.shape[self.dim] if x is not None and x.dim() > self.dim else None
        fitting = [tokens for tokens in self._seen.values() if tokens.held == held]
        if held is None or not fitting:
            raise NotImplementedError(
                f"a module inside of {self.boundary.trunk} is computed again in the backward with "
                f"{held} tokens along dim {self.dim} of its first tensor, and sequences of "
                f"{sorted(self._seen)} tokens, of which this rank holds "
                f"{sorted(tokens.held for tokens in self._seen.values())}, have been there: "
                "checkpoint whole modules of the trunk"
            )
        if len(fitting) == 1 and not self._is_like_another(fitting[0]):
            return fitting[0]
        spread = Spread.infer(held, self.mesh, self.layout, validate=self.validate)
        return self._seen[spread.seq_len]

    def _is_like_another(self, tokens: Tokens) -> bool:
        """Whether a rank cannot tell them from those of another length; the same on all ranks."""
        return any(
            a == b
            for other in self._seen.values()
            if other is not tokens
            for a, b in zip(tokens.shares, other.shares, strict=True)
        )

    @contextmanager
    def entered(self, tokens: Tokens) -> Iterator[Region]:
        """The region of these tokens, which may be entered already."""
        if self.region is not None:
            with self.region.entered_again():
                yield self.region
            return
        with Region(tokens) as region:
            self.region = region
            try:
                yield region
            finally:
                self.region = None

    def check_held(self, x: Tensor, tokens: Tokens, what: str) -> None:
        """Refuse what has not this rank's share of tokens."""
        held = x.shape[self.dim] if x.dim() > self.dim else None
        if held != tokens.held:
            refuse(
                tokens.spread,
                ValueError(
                    f"{what} is {tuple(x.shape)} with {held} tokens along dim {self.dim}, where "
                    f"this rank holds {tokens.held} of {tokens.spread.seq_len}"
                ),
            )


def is_computed_again() -> bool:
    """Whether this is an activation checkpoint's second time."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._current_graph_task_id() != -1


def first_tensor(items: Any) -> Tensor | None:
    """Of arguments, in their order."""
    return next((item for item in items if isinstance(item, Tensor)), None)
