"""A module in tiles as one autograd Function of its arguments and parameters."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor

from usp.nn.tiled.given import Given, tile_of
from usp.nn.tiled.sums import Joined, Sum
from usp.nn.tiled.surroundings import Surroundings
from usp.ops.derivatives import OnceDifferentiable, without_second_derivative


@dataclass(frozen=True)
class Call:
    """One call of a module.

    Attributes:
        forward: Computes all tiles.
        body: Computes one, with other tensors as parameters (by name), args and kwargs.
        name: Of the module, for errors.
        given: Its arguments.
        parameters: Names of those that are trained.
        surroundings: What was around it.
    """

    forward: Callable[[Given], Tensor]
    body: Callable[[Mapping[str, Tensor], Any, Any], Tensor]
    name: str
    given: Given
    parameters: tuple[str, ...]
    surroundings: Surroundings


def in_tiles(call: Call, parameters: Sequence[Tensor]) -> Tensor:
    """The result of a call, whose backward computes its tiles again."""
    return cast(Tensor, _InTiles.apply(call, *call.given.tensors, *parameters))


class _InTiles(OnceDifferentiable):
    of = "usp.tiled_mlp"

    @staticmethod
    def forward(ctx: Any, call: Call, *tensors: Tensor) -> Tensor:
        out = call.forward(call.given)
        ctx.call = replace(call, given=call.given.without_tensors())
        ctx.save_for_backward(*tensors)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        tensors = ctx.saved_tensors
        with torch.no_grad():
            found = _gradients(ctx.call, tensors, ctx.needs_input_grad[1:], grad)
        return None, *without_second_derivative(found, (grad, *tensors), _InTiles.of)


def _gradients(
    call: Call, tensors: Sequence[Tensor], needed: Sequence[bool], grad: Tensor
) -> list[Tensor | None]:
    pairs = list(zip(tensors, needed, strict=True))
    cut = call.given.cut
    arguments = [
        (Joined if is_cut else Sum)(*pair) for pair, is_cut in zip(pairs, cut, strict=False)
    ]
    parameters = [Sum(*pair) for pair in pairs[len(cut) :]]
    with call.surroundings.again():
        for tile in call.given.tiles:
            _backward_of(call, tile, arguments, parameters, grad.detach())
    return [each.result() for each in (*arguments, *parameters)]


def _backward_of(
    call: Call,
    tile: tuple[int, int],
    arguments: Sequence[Sum],
    parameters: Sequence[Sum],
    grad: Tensor,
) -> None:
    """Compute a tile again, and its gradients."""
    dim = call.given.dim
    for each in arguments:
        each.begin(dim, *tile)
    held = {name: each.leaf for name, each in zip(call.parameters, parameters, strict=True)}
    out = call.body(held, *call.given.filled([each.leaf for each in arguments]))
    if not out.requires_grad:
        return
    needed = [each.leaf for each in (*arguments, *parameters) if each.leaf.requires_grad]
    if not tile[0]:
        _check_leaves(call.name, out, needed)
    torch.autograd.backward(out, tile_of(grad, dim, *tile), inputs=needed)


def _check_leaves(name: str, out: Tensor, known: Sequence[Tensor]) -> None:
    """Refuse what would get no gradient here, though a plain call gives it one.

    Raises:
        ValueError: names its shape.
    """
    nodes: list[Any] = [out.grad_fn]
    seen: set[Any] = set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)
        if isinstance(leaf, Tensor) and not any(leaf is x for x in known):
            raise ValueError(
                f"{name} uses a tensor {tuple(leaf.shape)} that needs a gradient and is neither "
                "its parameter nor its argument: register it, or hand it over beside x"
            )
        nodes += [following for following, _ in node.next_functions]
