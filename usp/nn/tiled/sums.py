"""Gradients of all tiles brought together: summed, or side by side."""

from __future__ import annotations

import torch
from torch import Tensor

from usp.nn.tiled.given import tile_of


class Sum:
    """A tensor that each tile sees whole, and the sum of its gradients.

    Attributes:
        leaf: What stands for it in a tile: gradients of tiles are taken from there as soon as they
            are complete, so that they are never kept beside the sums of all.
    """

    def __init__(self, x: Tensor, is_needed: bool) -> None:
        self._x, self._is_needed = x, is_needed
        self._total: Tensor | None = None
        self.leaf = self._made(x)

    def begin(self, dim: int, start: int, length: int) -> None:
        """The next tile."""

    def result(self) -> Tensor | None:
        """None where no tile has used it."""
        self.leaf = self._x  # or leaf, its hook and this would hold each other
        return None if self._total is None else self._total.to(self._x.dtype)

    def _made(self, x: Tensor) -> Tensor:
        leaf = x.detach()
        if self._is_needed:
            leaf.requires_grad_()
            leaf.register_post_accumulate_grad_hook(self._take)
        return leaf

    def _take(self, leaf: Tensor) -> None:
        grad, leaf.grad = leaf.grad, None
        if grad is not None:
            self._add(grad)

    def _add(self, grad: Tensor) -> None:
        if self._total is None:
            self._total = grad.to(torch.promote_types(grad.dtype, torch.float32))
        else:
            self._total.add_(grad)


class Joined(Sum):
    """A tensor that is cut, and the gradients of its parts side by side."""

    def begin(self, dim: int, start: int, length: int) -> None:
        self._place = dim, start, length
        self.leaf = self._made(tile_of(self._x, dim, start, length))

    def _add(self, grad: Tensor) -> None:
        if self._total is None:
            self._total = torch.zeros_like(self._x)
        self._total.narrow(*self._place).copy_(grad)
