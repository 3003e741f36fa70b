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
    cut_beside,
    documents_again,
    prefix_of_this_rank,
    with_documents,
)
from usp.integrations._trunk import Trunk, first_tensor
from usp.nn.site import Site


class Share(torch.autograd.Function):
    """What every rank computes alike: of its gradient each sends back a share."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, ranks: int) -> Tensor:
        ctx.ranks = ranks
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

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
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
            before = region.answered
            with prefix_of_this_rank(self.module, self.trunk.boundary.prefix_count, tokens):
                out = self.inner(*args, **kwargs)
            if self.must_answer and region.answered == before:
                self._refuse_silence(tokens)
        return out

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

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        trunk, names = self.trunk, self._names
        given = dict(zip(names, args, strict=False))
        x = args[0] if args else kwargs.get(names[0]) if names else None
        if not isinstance(x, Tensor) or x.dim() <= trunk.dim:
            raise TypeError(
                f"{self.described()} takes tokens along dim {trunk.dim} of its first argument, got "
                f"{tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__}"
            )
        tokens = trunk.begin(x) if self.is_first else trunk.current(x)
        if tokens is None:
            return self.inner(*args, **kwargs)
        self._check_never(tokens, given | kwargs)
        boundary = trunk.boundary
        if self.is_first and not tokens.cut:
            x = tokens.spread.shard(x, trunk.dim)
        trunk.check_held(x, tokens, f"what {self.described()} is given")
        if args:
            rest = (
                cut_beside(tokens, boundary, name, given[name]) for name in names[1 : len(args)]
            )
            args = (x, *rest, *args[1 + len(names[1 : len(args)]) :])
        else:
            kwargs = kwargs | {names[0]: x}
        cut = {n: cut_beside(tokens, boundary, n, value) for n, value in kwargs.items()}
        apart = (given | kwargs).get(boundary.documents or "")
        out = self.run(with_documents(tokens, apart), args, cut)
        if not self.is_last or tokens.cut:
            trunk.note_local(self.described(), out)
            return out
        trunk.end()
        return self._joined(tokens, out)

    def _check_never(self, tokens: Tokens, given: Mapping[str, Any]) -> None:
        kept = [name for name in self.trunk.boundary.never if given.get(name) is not None]
        if kept and len(tokens.shares) > 1:
            refuse(
                tokens.spread,
                NotImplementedError(
                    f"{self.described()} is given {', '.join(kept)}, which would keep "
                    f"{tokens.held} of {tokens.spread.seq_len} tokens on this rank: call the model "
                    "without (use_cache=False), on the whole sequence"
                ),
            )

    def _joined(self, tokens: Tokens, out: Any) -> Any:
        trunk = self.trunk
        x, *others = out if isinstance(out, tuple | list) else (out,)
        if not isinstance(x, Tensor) or first_tensor(others) is not None:
            raise NotImplementedError(
                f"{self.described()} returns {type(out).__name__} with more tensors than its "
                "tokens, and which of them are joined is not known: let it return them alone"
            )
        trunk.check_held(x, tokens, f"what {self.described()} returns")
        whole = tokens.spread.unshard(x, trunk.dim)
        return type(out)((whole, *others)) if isinstance(out, tuple | list) else whole
