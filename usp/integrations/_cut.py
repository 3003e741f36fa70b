"""A model that is given this rank's tokens and returns what is theirs: ``outputs="local"``."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from usp.distributed.agreement import refuse_together
from usp.distributed.mesh import SequenceMesh, degrees_and_place
from usp.integrations._answer import Tokens
from usp.integrations._sites import Whole
from usp.integrations._trunk import Trunk, is_computed_again
from usp.nn.spread import Spread


class CutTrunk(Trunk):
    """A trunk whose tokens were cut before the model: each forward is handed its Spread."""

    def __init__(self, *of_trunk: Any) -> None:
        super().__init__(*of_trunk)
        self._handed: list[Spread] = []  # two at most, to know whether there was more than one
        self._given: dict[int, tuple[StorageWeakRef, Tokens]] = {}
        self._room = 1024

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_given": {}}

    def open(self, spread: Spread) -> Tokens:
        """The model's forward begins with these."""
        if spread.validate is None:
            spread = replace(spread, validate=self.validate)
        tokens = Tokens.of(spread, (), cut=True)
        self.is_open, self.running = True, tokens
        if spread not in self._handed and len(self._handed) < 2:
            self._handed.append(spread)
        return tokens

    def begin(self, x: Tensor, second: Tensor | None = None) -> Tokens | None:
        if not (self.is_open or is_computed_again()):
            self._refuse_gradients()
        return self.current(x)

    def end(self) -> None:
        """What follows has the same tokens."""

    def current(self, x: Tensor | None, second: Tensor | None = None) -> Tokens | None:
        """A checkpoint that computes again is given the very tensor, or one that shares its memory:
        by that it is known of which batch it is, for the next may have other documents."""
        if torch.compiler.is_compiling():
            return self.running
        if not is_computed_again():
            if self.running is not None and x is not None:
                self._note(x, self.running)
            return self.running
        if self.region is not None:
            return self.region.tokens
        held, tokens = self._given.get(_storage(x), (None, None)) if x is not None else (None, None)
        if held is not None and not held.expired():
            return tokens
        if len(self._handed) == 1:
            return Tokens.of(self._handed[0], (), cut=True)
        raise NotImplementedError(
            f"a module inside of {self.boundary.trunk} is computed again in the backward from a "
            "tensor that it was not given before, and batches of several lengths or documents have "
            "been there, so that it cannot be told which this is of: checkpoint whole modules of "
            "the trunk, and leave what they are given where it is"
        )

    def _note(self, x: Tensor, tokens: Tokens) -> None:
        if len(self._given) > self._room:
            self._given = {n: pair for n, pair in self._given.items() if not pair[0].expired()}
            self._room = max(1024, 2 * len(self._given))
        self._given[_storage(x)] = StorageWeakRef(x.untyped_storage()), tokens

    def note_local(self, name: str, out: Any, tokens: Tokens) -> None:
        """All that the model returns is this rank's."""

    def check_outputs(self, leaves: Iterable[Any]) -> None:
        """All that the model returns is this rank's."""


def _storage(x: Tensor) -> int:
    return int(x.untyped_storage()._cdata)


class Cut(Whole):
    """The model itself, which is handed the Spread of what it is given."""

    def __init__(self, module: nn.Module, mesh: SequenceMesh | None, trunk: CutTrunk) -> None:
        super().__init__(module, mesh, (trunk,))
        self.mesh, self.trunk = mesh, trunk
        self._takes_spread = "spread" in inspect.signature(type(module).forward).parameters

    def __call__(self, *args: Any, spread: Spread | None = None, **kwargs: Any) -> Any:
        try:
            self._check(spread)
        except (TypeError, ValueError) as refusal:
            refuse_together(self.mesh, "long_context_attention", self.trunk.validate, refusal)
            raise
        if spread is None:
            return self.inner(*args, **kwargs)
        if self._takes_spread:
            kwargs = kwargs | {"spread": spread}
        try:
            with self.trunk.entered(self.trunk.open(spread)):
                return self.inner(*args, **kwargs)
        finally:
            self.trunk.close()

    def _check(self, spread: Spread | None) -> None:
        if spread is None:
            if self.ranks > 1:
                raise ValueError(
                    f"{self.described()} has local outputs on {self.ranks} ranks, and nobody says "
                    "of which sequence its tokens are: hand it all of usp.cut_batch(batch, mesh), "
                    "which holds spread=, or a usp.Spread of your own"
                )
            return
        if not isinstance(spread, Spread):
            raise TypeError(f"spread must be a usp.Spread, got {type(spread).__name__}")
        theirs, ours = degrees_and_place(spread.mesh), degrees_and_place(self.mesh)
        if theirs != ours:
            raise ValueError(
                f"{self.described()} is on a mesh of ring x ulysses degrees {ours[0]}, at "
                f"{ours[1]}, and spread= on one of {theirs[0]}, at {theirs[1]}: cut the batch for "
                "the mesh of the model"
            )
