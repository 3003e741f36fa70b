"""A trunk of a model while it runs: which sequence its tokens are of."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from weakref import ReferenceType, ref

import torch
from torch import Tensor

from usp.distributed.mesh import SequenceMesh
from usp.integrations._answer import Tokens, refuse
from usp.integrations._boundary import Boundary
from usp.integrations._region import Region, is_in_reentrant_checkpoint, region_of
from usp.integrations._streams import counts, held_of, join_both, two_streams
from usp.nn.spread import Spread
from usp.planning.layout import Layout
from usp.sharding.whole import ask_lengths


class Trunk:
    """What the modules of a trunk share.

    Attributes:
        mesh, layout, validate: Of the sequences in here.
        boundary: Where it is, and what is in it.
        dim: The dim of tokens.
        pieces: How attention in here is worked off, as options of ``long_context_attention``.
        is_open: Whether the model's forward runs.
        running: Tokens of the sequence that is between the first module and the last; None
            elsewhere.
    """

    def __init__(
        self,
        mesh: SequenceMesh | None,
        layout: Layout,
        validate: bool | None,
        boundary: Boundary,
        dim: int,
        pieces: Mapping[str, Any],
    ) -> None:
        self.mesh, self.layout, self.validate = mesh, layout, validate
        self.boundary, self.dim, self.pieces = boundary, dim, pieces
        self.is_open = False
        self.running: Tokens | None = None
        self._region: Region | None = None
        self._seen: dict[tuple[int, int | None], Tokens] = {}
        self._left: dict[int, tuple[str, ReferenceType[Tensor], Tokens]] = {}

    @property
    def region(self) -> Region | None:
        """That which is entered, here or by what computes a part of it again; None outside."""
        if self._region is not None or not is_computed_again():
            return self._region
        return region_of(self)

    def begin(self, x: Tensor, second: Tensor | None = None) -> Tokens | None:
        """The tokens of a whole sequence that comes to the first module; None where it stays whole.

        Args:
            second: Another stream, which attention joins to it.

        Raises:
            RuntimeError: another is on its way; or nobody would divide its gradient by the ranks.
        """
        if not (self.is_open or is_computed_again()):
            self._refuse_gradients()
            return None
        lengths = x.shape[self.dim], None if second is None else second.shape[self.dim]
        if lengths not in self._seen:
            self._seen[lengths] = self._tokens(*lengths)
        tokens = self._seen[lengths]
        if not is_computed_again():
            if self.running is not None:
                raise RuntimeError(
                    f"the first module of {self.boundary.trunk} is called again before the last: "
                    "the trunk must be modules that follow each other, each called once"
                )
            self.running = tokens
        return tokens

    def _tokens(self, first: int, second: int | None) -> Tokens:
        spread = Spread(self.mesh, self.layout, first + (second or 0), validate=self.validate)
        joint = self.boundary.joint
        if second is None or joint is None:
            return Tokens.of(spread, ())
        return two_streams(spread, joint.ordered(first, second), joint.each)

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

    def note_local(self, name: str, out: Any, tokens: Tokens) -> None:
        """Remember what a module before the last has returned, while somebody else holds it."""
        several = self.mesh is not None and self.mesh.size > 1
        if several and not torch.compiler.is_compiling() and not is_computed_again():
            for x in out if isinstance(out, tuple | list) else (out,):
                if isinstance(x, Tensor):
                    self._left[id(x)] = name, ref(x), tokens

    def note_copy(self, x: Any, copy: Tensor) -> None:
        """Remember that it is of what a module before the last has returned, where it is."""
        name, held, tokens = self._left.get(id(x), ("", None, None))
        if tokens is not None and held is not None and held() is x:
            self.note_local(name, copy, tokens)

    def whole_of(self, x: Any) -> Any:
        """What a module before the last has returned, of all ranks; anything else as it is."""
        _, held, tokens = self._left.get(id(x), ("", None, None))
        if not isinstance(x, Tensor) or tokens is None or held is None or held() is not x:
            return x
        return join_both(tokens, x, self.dim)

    def check_outputs(self, leaves: Iterable[Any]) -> None:
        """Refuse outputs of the model that are those of a module before the last.

        Raises:
            NotImplementedError: names the module.
        """
        for x in leaves:
            name, held, _ = self._left.get(id(x), ("", None, None))
            if isinstance(x, Tensor) and held is not None and held() is x:
                raise NotImplementedError(
                    f"the model returns what {name} does, {tuple(x.shape)}, which is this rank's "
                    "alone (hidden states of inner layers): it has whole ones of the last alone"
                )

    def current(self, x: Tensor | None, second: Tensor | None = None) -> Tokens | None:
        """The tokens of the sequence that local ones are of; None where they are of none.

        A checkpoint computes modules again in the backward, when other sequences may have come
        since: it is the one of which this rank holds so many. Where that could be two, on this or
        another rank, the ranks tell each other what they hold.

        Args:
            x, second: What the module is given, of both streams; None where it is not known.
        """
        if not is_computed_again():
            return self.running
        if self.region is not None:
            return self.region.tokens
        if len(self._seen) == 1:
            return next(iter(self._seen.values()))
        return self._again(*(None if y is None or y.dim() <= self.dim else y for y in (x, second)))

    def _again(self, x: Tensor | None, second: Tensor | None) -> Tokens:
        held = None if x is None else x.shape[self.dim]
        pair = None if second is None else (held, second.shape[self.dim])
        told = [counts(tokens, self.boundary.joint) for tokens in self._seen.values()]
        mine = 0 if self.mesh is None else self.mesh.rank
        fitting = [one for one in told if one.fits(mine, held, pair)]
        if held is None or not fitting:
            raise NotImplementedError(
                f"a module inside of {self.boundary.trunk} is computed again in the backward with "
                f"{held} tokens along dim {self.dim} of its first tensor, and sequences of "
                f"{sorted(tokens.spread.seq_len for tokens in self._seen.values())} tokens, of "
                f"which this rank holds {sorted(tokens.held for tokens in self._seen.values())}, "
                "have been there: checkpoint whole modules of the trunk"
            )
        (one, *more) = fitting
        if not more and not any(one.is_like(other, pair is None) for other in told):
            return one.tokens
        if pair is not None:
            first, other = (sum(ask_lengths(n, self.mesh)) for n in (held, pair[1]))
            return self._seen[first, other]
        if any(one.tokens.parts for one in told):
            raise NotImplementedError(
                f"a module inside of {self.boundary.trunk} is computed again in the backward with "
                f"{held} tokens, and with sequences of two streams of several lengths it cannot be "
                "told which it is of: checkpoint whole modules of the trunk that take both streams"
            )
        spread = Spread.infer(held, self.mesh, self.layout, validate=self.validate)
        return self._seen[spread.seq_len, None]

    @contextmanager
    def entered(self, tokens: Tokens) -> Iterator[Region]:
        """The region of these tokens, which may be entered already."""
        if (region := self.region) is not None:
            with region.entered_again():
                yield region
            return
        with Region(tokens, owner=self, pieces=self.pieces) as region:
            self._region = region
            try:
                yield region
            finally:
                self._region = None

    def check_held(self, x: Tensor, tokens: Tokens, what: str, place: int | None = None) -> None:
        """Refuse what has not this rank's share of tokens, or of a stream's."""
        held = x.shape[self.dim] if x.dim() > self.dim else None
        share = tokens.held if place is None else held_of(tokens, place)
        if held != share:
            refuse(
                tokens.spread,
                ValueError(
                    f"{what} is {tuple(x.shape)} with {held} tokens along dim {self.dim}, where "
                    f"this rank holds {share} of "
                    f"{tokens.spread.seq_len if place is None else (tokens.parts or ())[place]}"
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
