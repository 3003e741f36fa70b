"""What stands in the place of a module's ``forward`` in a model that is parallelized."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from usp.distributed.mesh import SequenceMesh
from usp.integrations._answer import Tokens, refuse
from usp.integrations._beside import (
    attributes_while,
    cut_beside,
    documents_again,
    with_documents,
)
from usp.integrations._led import lead_through
from usp.integrations._streams import cut_both, cut_stream, join_both, join_stream
from usp.integrations._transformers_cache import OfMesh, decodes
from usp.integrations._trunk import Trunk, first_tensor
from usp.nn.site import Site


class Share(torch.autograd.Function):
    """What every rank computes alike: of its gradient each sends back a share."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, ranks: int) -> Tensor:
        ctx.ranks = ranks
        if torch.compiler.is_compiling():  # of outputs that share memory a graph makes views itself
            return x.clone()
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad / ctx.ranks, None


class Whole(Site):
    """The model itself: the sum of all ranks' gradients is that of one device."""

    def __init__(
        self, module: nn.Module, mesh: SequenceMesh | None, trunks: Sequence[Trunk]
    ) -> None:
        super().__init__(module, "")
        self.ranks, self.trunks = 1 if mesh is None else mesh.size, tuple(trunks)
        self.nested_tensors: list[nn.TransformerEncoder] = []

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        lead_through()  # in another process nobody may have

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if decodes(kwargs):  # few tokens, which every rank computes
            return self.inner(*args, **kwargs)
        for trunk in self.trunks:
            trunk.is_open = True
        try:
            out = self.inner(*args, **kwargs)
            for trunk in self.trunks:
                trunk.check_joined()
                trunk.check_outputs(tree_leaves(out))
        finally:
            for trunk in self.trunks:
                trunk.close()
        return out if self.ranks == 1 else tree_map(self._shared, out)

    def _shared(self, x: Any) -> Any:
        return Share.apply(x, self.ranks) if isinstance(x, Tensor) and x.requires_grad else x

    def remove(self) -> None:
        for encoder in self.nested_tensors:
            encoder.use_nested_tensor = True
        super().remove()


class Inside(Site):
    """A module in the trunk: torch's attention means the whole sequence, also where a checkpoint
    computes this module again."""

    def __init__(self, module: nn.Module, name: str, trunk: Trunk, must_answer: bool) -> None:
        super().__init__(module, name)
        self.trunk, self.must_answer = trunk, must_answer

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling() and not self.trunk.is_open and torch.is_grad_enabled():
            # called by itself, or computed again in a backward: no graph can tell
            return torch.compiler.disable(self.called)(*args, **kwargs)
        return self.called(*args, **kwargs)

    def called(self, *args: Any, **kwargs: Any) -> Any:
        """The module, in the trunk or by itself."""
        x = first_tensor((*args, *kwargs.values()))
        tokens = self.trunk.current(x)
        if tokens is None:  # called by itself: an ordinary module
            return self.inner(*args, **kwargs)
        if self.trunk.boundary.documents is None or self.trunk.region is not None:
            return self.run(tokens, args, kwargs)
        return self._run_by_itself(tokens, args, kwargs)

    def _run_by_itself(self, tokens: Tokens, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A checkpoint inside of a module of the trunk, with documents that this was told."""
        name = self.trunk.boundary.documents
        names = tuple(inspect.signature(type(self.module).forward).parameters)[1:]
        told = (dict(zip(names, args, strict=False)) | kwargs).get(name or "")
        with self.trunk.entered(documents_again(tokens, told)) as region:
            out = self.run(tokens, args, kwargs)
            if told is None and region.answered and len(tokens.shares) > 1:
                raise NotImplementedError(
                    f"{self.described()} is computed again in the backward, where nobody tells it "
                    f"{name}: checkpoint whole modules of the trunk"
                )
        return out

    def run(self, tokens: Tokens, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        with self.trunk.entered(tokens) as region:
            before, among = region.answered, self.among(region.tokens, args, kwargs)
            boundary, must_answer = self.trunk.boundary, self.must_answer
            changed = attributes_while(self.module, boundary, tokens, must_answer)
            with changed, region.meaning(among):
                out = self.inner(*args, **kwargs)
            if self.must_answer and region.answered == before:
                self._refuse_silence(tokens)
        return out

    def among(self, tokens: Tokens, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tokens:
        """Those of the attention in here, of the tokens of the region and what the module takes."""
        return tokens

    def _refuse_silence(self, tokens: Tokens) -> None:
        if torch.compiler.is_compiling() or len(tokens.shares) == 1:
            return
        refuse(
            tokens.spread,
            NotImplementedError(
                f"{self.described()} called no attention that could be answered for the whole "
                f"sequence, and this rank holds {tokens.held} of its {tokens.spread.seq_len} "
                "tokens: let it call F.scaled_dot_product_attention, put usp.LongContextAttention "
                "in it, or, if it holds none, say which modules do: usp.Boundary(trunk, attention)"
            ),
        )


class Block(Inside):
    """One of the modules that follow each other: cuts what comes whole, joins what leaves."""

    def __init__(
        self, module: nn.Module, name: str, trunk: Trunk, must_answer: bool, ends: tuple[bool, bool]
    ) -> None:
        super().__init__(module, name, trunk, must_answer)
        self.is_first, self.is_last = ends
        parameters = inspect.signature(type(module).forward).parameters
        self._names = tuple(parameters)[1:]

    def called(self, *args: Any, **kwargs: Any) -> Any:
        trunk, names, boundary = self.trunk, self._names, self.trunk.boundary
        given = dict(zip(names, args, strict=False)) | kwargs
        x = args[0] if args else kwargs.get(names[0]) if names else None
        if not isinstance(x, Tensor) or x.dim() <= trunk.dim:
            raise TypeError(
                f"{self.described()} takes tokens along dim {trunk.dim} of its first argument, got "
                f"{tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__}"
            )
        second = None if boundary.joint is None else given.get(boundary.joint.argument)
        tokens = trunk.begin(x, second) if self.is_first else trunk.current(x, second)
        if tokens is None:
            return self.inner(*args, **kwargs)
        self._check_never(tokens, given)
        local = {name: self._of_this_rank(tokens, name, given) for name in given}
        positional = names[: len(args)]
        args = (*(local[name] for name in positional), *args[len(positional) :])
        kwargs = {name: local[name] for name in kwargs}
        apart = given.get(boundary.documents or "")
        out = self.run(with_documents(tokens, apart), args, kwargs)
        if not self.is_last or tokens.cut:
            trunk.note_local(self.described(), out, tokens)
            return out
        trunk.end()
        return self._joined(tokens, out, second is not None)

    def _of_this_rank(self, tokens: Tokens, name: str, given: Mapping[str, Any]) -> Any:
        """An argument of the module, with what is here of it."""
        trunk, joint, x = self.trunk, self.trunk.boundary.joint, given[name]
        is_stream = name == self._names[0] or (joint is not None and name == joint.argument)
        if not is_stream or x is None:
            return cut_beside(tokens, trunk.boundary, name, x)
        place = None
        if joint is not None and tokens.parts is not None and given.get(joint.argument) is not None:
            place = joint.place(name)
        if self.is_first and not tokens.cut:
            if place is not None:
                return cut_stream(tokens, x, trunk.dim, place)
            x = cut_both(tokens, x, trunk.dim)
        trunk.check_held(x, tokens, f"{name} that {self.described()} is given", place)
        return x

    def _check_never(self, tokens: Tokens, given: Mapping[str, Any]) -> None:
        kept = [
            name
            for name in self.trunk.boundary.never
            if given.get(name) is not None and not isinstance(given[name], OfMesh)
        ]
        if kept and len(tokens.shares) > 1:
            refuse(
                tokens.spread,
                NotImplementedError(
                    f"{self.described()} is given {', '.join(kept)}, which would be of this "
                    f"rank's {tokens.held} of {tokens.spread.seq_len} tokens alone: call the model "
                    "without (a cache: use_cache=False, or sharded_cache of the door of "
                    "transformers), on the whole sequence"
                ),
            )

    def _joined(self, tokens: Tokens, out: Any, streams: bool) -> Any:
        """What the last module returns, whole.

        Args:
            streams: Whether it was given two.
        """
        joint = self.trunk.boundary.joint
        if joint is not None and tokens.parts is not None and streams:
            first, second = joint.place(""), joint.place(joint.argument)
            if isinstance(out, Tensor):
                return self._whole(tokens, out, first)
            pair = (second, first) if joint.returned == 0 else (first, second)
            if len(out) == 2:
                return type(out)(
                    None if x is None else self._whole(tokens, x, place)
                    for x, place in zip(out, pair, strict=True)
                )
        x, *others = out if isinstance(out, tuple | list) else (out,)
        if not isinstance(x, Tensor) or first_tensor(others) is not None:
            raise NotImplementedError(
                f"{self.described()} returns {type(out).__name__} with more tensors than its "
                "tokens, and which of them are joined is not known: let it return them alone"
            )
        whole = self._whole(tokens, x, None)
        return type(out)((whole, *others)) if isinstance(out, tuple | list) else whole

    def _whole(self, tokens: Tokens, x: Tensor, place: int | None) -> Tensor:
        dim = self.trunk.dim
        self.trunk.check_held(x, tokens, f"what {self.described()} returns", place)
        if place is None:
            return join_both(tokens, x, dim)
        return join_stream(tokens, x, dim, place)
