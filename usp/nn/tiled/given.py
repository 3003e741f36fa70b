"""The arguments of a call, and how they are cut into tiles."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from usp.planning.kinds import tensor
from usp.planning.shares import tile_bounds

_HELD = torch.empty(0)  # stands where a tensor was


@dataclass(frozen=True)
class Given:
    """The arguments of a call, and how they are cut.

    Attributes:
        tensors: All tensors among them; the first is that of the tokens.
        cut: Which of these are cut; the others are whole in each tile.
        tiles: Start and length of each.
        tokens, dim: How many along which dim, a negative one.
    """

    tensors: tuple[Tensor, ...]
    cut: tuple[bool, ...]
    tiles: tuple[tuple[int, int], ...]
    tokens: int
    dim: int
    _leaves: tuple[Any, ...]
    _spec: TreeSpec

    @classmethod
    def of(cls, args: tuple[Any, ...], kwargs: dict[str, Any], tiles: int, dim: int) -> Given:
        """Raises:
        TypeError: the first argument is no tensor.
        ValueError: tokens do not lie along ``dim``, or a tensor beside them does not fit.
        """
        leaves, spec = tree_flatten((args, kwargs))
        tensors = tuple(x for x in leaves if isinstance(x, Tensor))
        if not tensors or leaves[0] is not tensors[0]:
            raise TypeError(
                "what is computed in tiles takes a tensor of tokens as its first argument, got "
                f"{type(leaves[0]).__name__ if leaves else 'none'}"
            )
        x = tensor("x", tensors[0])
        if x.dim() < 2 or not -x.dim() <= dim < x.dim():
            raise ValueError(f"x is {tuple(x.shape)}, and tokens should lie along its dim {dim}")
        dim = dim - x.dim() if dim >= 0 else dim
        cut = tuple(_is_cut(each, x, dim) for each in tensors)
        bounds = tile_bounds(x.shape[dim], tiles)
        return cls(tensors, cut, bounds, x.shape[dim], dim, tuple(leaves), spec)

    def parts(self, start: int, length: int) -> list[Tensor]:
        """The tensors of a tile."""
        pairs = zip(self.tensors, self.cut, strict=True)
        return [tile_of(x, self.dim, start, length) if cut else x for x, cut in pairs]

    def filled(self, tensors: Sequence[Tensor]) -> tuple[Any, Any]:
        """The arguments with these in the place of their tensors: args and kwargs."""
        own = iter(tensors)
        leaves = [next(own) if isinstance(leaf, Tensor) else leaf for leaf in self._leaves]
        return cast(tuple[Any, Any], tree_unflatten(leaves, self._spec))

    def without_tensors(self) -> Given:
        """For the backward, to which autograd hands them."""
        leaves = tuple(_HELD if isinstance(x, Tensor) else x for x in self._leaves)
        return Given((), self.cut, self.tiles, self.tokens, self.dim, leaves, self._spec)


def tile_of(x: Tensor, dim: int, start: int, length: int) -> Tensor:
    """A part of a tensor; side by side in memory where the whole is, as modules that call ``view``
    rely on."""
    part = x.narrow(dim, start, length)
    return part.contiguous() if x.is_contiguous() else part


def _is_cut(given: Tensor, x: Tensor, dim: int) -> bool:
    tokens = x.shape[dim]
    if given.dim() == x.dim() and given.shape[dim] == tokens:
        return True
    if given.dim() < 2 or (given.dim() == x.dim() and given.shape[dim] == 1):
        return False
    raise ValueError(
        f"a tensor beside x is {tuple(given.shape)}, and x {tuple(x.shape)} has {tokens} tokens "
        f"along dim {dim}: give it {x.dim()} dims, with {tokens} or 1 along that one"
    )
