"""Parts of a trunk that are more than what they call: torch's attention, local ones, DropPath."""

from __future__ import annotations

import inspect
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from usp import rng
from usp.integrations._answer import Tokens
from usp.integrations._beside import with_documents
from usp.integrations._sites import Inside
from usp.integrations._streams import held_of, join_both, stream
from usp.integrations._trunk import Trunk
from usp.masks import documents
from usp.nn.multihead.module import MultiheadAttention
from usp.nn.multihead.placement import Placement
from usp.nn.site import Site
from usp.nn.spread import Spread

_MULTIHEAD_NAMES = (
    "query",
    "key",
    "value",
    "key_padding_mask",
    "need_weights",
    "attn_mask",
    "average_attn_weights",
    "is_causal",
)


_COPIES = frozenset((Tensor.clone, torch.clone, Tensor.detach, Tensor.contiguous))


class Multihead(Inside):
    """``nn.MultiheadAttention``: in its place one of ours, with the very same parameters."""

    def __init__(self, module: nn.MultiheadAttention, name: str, trunk: Trunk) -> None:
        super().__init__(module, name, trunk, False)
        self._ours = MultiheadAttention.from_torch(module)
        for registry in ("_parameters", "_buffers", "_modules"):  # who replaces one, does it here
            self._ours.__dict__[registry] = module.__dict__[registry]
        self._placement = getattr(module, "placement", self._ours.placement)
        self._placements: dict[Spread, Placement] = {}

    def run(self, tokens: Tokens, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        region = self.trunk.region
        tokens = tokens if region is None else region.tokens  # which know of documents
        if tokens.documents is not None:
            return torch.compiler.disable(self._run_told)(tokens, args, kwargs)
        pieces = self.trunk.pieces
        if tokens.is_alone and not pieces:
            return self.inner(*args, **kwargs)
        given = dict(zip(_MULTIHEAD_NAMES, args, strict=False)) | kwargs
        for name, dim in (("key_padding_mask", -1), ("attn_mask", -2)):
            mask = given.get(name)
            if isinstance(mask, Tensor) and mask.shape[dim] == tokens.spread.seq_len:
                given[name] = tokens.spread.shard(mask, dim)
        ours, module = self._ours, cast(nn.MultiheadAttention, self.module)
        ours.training, ours.dropout = module.training, module.dropout
        ours.placement = ours._compared = self._placed(tokens.spread)
        with self.trunk.entered(tokens) as region, region.paused():
            region.answered += 1
            return MultiheadAttention.forward(ours, **given)

    def _run_told(self, tokens: Tokens, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Outside of a graph, which has the boundaries of documents as a tensor."""
        told = with_documents(replace(tokens, documents=None), tokens.documents)
        with self.trunk.entered(told) as region, region.meaning(told):
            return self.run(told, args, kwargs)

    def _placed(self, spread: Spread) -> Placement:
        if spread.cu_seqlens is not None:  # others in every batch
            mask = documents(spread.cu_seqlens)
            own = self._placement.mask
            return replace(self._at(spread), mask=mask if own is None else own & mask)
        if spread not in self._placements:
            self._placements[spread] = self._at(spread)
        return self._placements[spread]

    def _at(self, spread: Spread) -> Placement:
        often = {None: "first", True: "always", False: "never"}[spread.validate]
        where = {"mesh": spread.mesh, "layout": spread.layout, "seq_len": spread.seq_len}
        return replace(self._placement, **where, validate=often, **self.trunk.pieces)


class Across(Inside):
    """Attention to tokens that every rank holds whole, where it is given these."""

    def __init__(self, module: nn.Module, name: str, trunk: Trunk, argument: str) -> None:
        super().__init__(module, name, trunk, True)
        self._argument = argument
        self._names = tuple(inspect.signature(type(module).forward).parameters)[1:]

    def among(self, tokens: Tokens, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tokens:
        given = dict(zip(self._names, args, strict=False)) | kwargs
        if len(tokens.shares) == 1 or given.get(self._argument) is None:
            return tokens
        held = [tokens.held]
        if tokens.parts is not None:
            held += [held_of(tokens, 0), held_of(tokens, 1)]
        return replace(tokens, across=tuple(held))


class Alone(Inside):
    """Attention among the first of two streams that others join."""

    def among(self, tokens: Tokens, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tokens:
        joint = self.trunk.boundary.joint
        if joint is None or tokens.parts is None or len(tokens.shares) == 1:
            return tokens
        return stream(tokens, joint.place("")).alone


class Local(Site):
    """A module that means what this rank holds."""

    def __init__(self, module: nn.Module, name: str, trunk: Trunk) -> None:
        super().__init__(module, name)
        self.trunk = trunk

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        region = self.trunk.region
        if region is None:
            return self.inner(*args, **kwargs)
        with region.paused():
            return self.inner(*args, **kwargs)


class Samples(Inside):
    """What drops whole samples (DropPath): the same on all ranks."""

    def run(self, tokens: Tokens, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        probability = getattr(self.module, "drop_prob", getattr(self.module, "p", None))
        if len(tokens.shares) == 1 or not self.module.training or probability == 0:
            return self.inner(*args, **kwargs)
        if torch.compiler.is_compiling():
            return torch.compiler.disable(self._replicated)(args, kwargs)
        return self._replicated(args, kwargs)

    def _replicated(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        with rng.replicated(self.trunk.mesh):
            return self.inner(*args, **kwargs)


class Reader(Site):
    """A module outside of the trunk that looks at what is between two modules of it: the whole."""

    def __init__(self, module: nn.Module, name: str, trunk: Trunk) -> None:
        super().__init__(module, name)
        self.trunk = trunk

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        trunk, tokens = self.trunk, self.trunk.current(x)
        if tokens is None or len(tokens.shares) == 1:  # behind the last it is whole
            return self.inner(x, *args, **kwargs)
        trunk.check_held(x, tokens, f"what {self.name} is given")
        return self.inner(join_both(tokens, x, trunk.dim), *args, **kwargs)


class States(Site):
    """The module that holds the trunk and returns what is between its modules: the whole of it."""

    def __init__(self, module: nn.Module, name: str, trunk: Trunk) -> None:
        super().__init__(module, name)
        self.trunk = trunk

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():  # a graph does not know whose outputs it returns
            return torch.compiler.disable(self._joined)(*args, **kwargs)
        return self._joined(*args, **kwargs)

    def _joined(self, *args: Any, **kwargs: Any) -> Any:
        with Copies(self.trunk):
            out = self.inner(*args, **kwargs)
        return tree_map(self.trunk.whole_of, out)


class Copies(TorchFunctionMode):
    """What is copied of what a module of the trunk has returned is this rank's alone, too."""

    def __init__(self, trunk: Trunk) -> None:
        super().__init__()
        self.trunk = trunk

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in _COPIES and args:
            self.trunk.note_copy(args[0], out)
        return out
