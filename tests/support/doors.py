"""A model on one device and its copy that is spread: outputs and every gradient, in fp64."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

Change = Callable[[nn.Module], Any]


class Doubled(TorchFunctionMode):
    """In fp64 all that is computed in fp32 meanwhile, theirs and ours alike."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        func = Tensor.double if func is Tensor.float else func
        args = tuple(torch.float64 if x is torch.float32 else x for x in args)
        kwargs = {n: torch.float64 if x is torch.float32 else x for n, x in (kwargs or {}).items()}
        return func(*args, **kwargs)


def randomize(model: nn.Module, std: float = 0.1) -> nn.Module:
    """No bias, table or scale is zero, which would hide a wrong gradient; in fp64."""
    generator = torch.Generator().manual_seed(7)
    model = model.double()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(std * torch.randn(p.shape, generator=generator, dtype=p.dtype))
            if p.dim() == 1 and name.endswith("weight"):
                p.add_(1.0)  # norms
    return model


def results(
    model: nn.Module, inputs: dict[str, Any], finish: Change = lambda model: None
) -> dict[str, Tensor]:
    """Outputs, and gradients of every parameter and of floating inputs.

    Args:
        finish: Called with the model between backward and the look at gradients.
    """
    given = {
        name: x.detach().clone().requires_grad_()
        if isinstance(x, Tensor) and x.is_floating_point()
        else x
        for name, x in inputs.items()
    }
    out = model(**given)
    found = [x for x in tree_leaves(out) if isinstance(x, Tensor) and x.is_floating_point()]
    loss = torch.zeros((), dtype=torch.float64)
    for n, x in enumerate(found):
        random = torch.Generator().manual_seed(n)
        loss = loss + (x * torch.randn(x.shape, generator=random, dtype=torch.float64)).sum()
    loss.backward()
    # what comes in whole has a gradient like a parameter's: each rank has a part of it
    leaves = [x for x in given.values() if isinstance(x, Tensor) and x.requires_grad]
    model.of_inputs = nn.ParameterList(nn.Parameter(x.detach()) for x in leaves)
    for parameter, x in zip(model.of_inputs, leaves, strict=True):
        parameter.grad = x.grad
    finish(model)
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    del model.of_inputs
    model.zero_grad()
    return {f"output {n}": x.detach() for n, x in enumerate(found)} | gradients


def errors(
    whole: dict[str, Tensor], found: dict[str, Tensor], most: float = 1e-9
) -> dict[str, float]:
    """What differs by more than ``most``, relative to the largest value of its kind."""
    assert whole.keys() == found.keys(), whole.keys() ^ found.keys()
    wrong = {}
    for name, wanted in whole.items():
        assert wanted.shape == found[name].shape, name
        if wanted.numel():
            scale = max(1.0, wanted.abs().max().item())
            error = ((wanted - found[name]).abs().max() / scale).item()
            if not error <= most:
                wrong[name] = error
    return wrong


def compared(
    model: nn.Module,
    inputs: dict[str, Any],
    mesh: Any,
    spread: Change,
    change: Change = lambda m: m,
) -> dict[str, float]:
    """On a worker: what differs between a model and its copy that ``spread`` has spread.

    Args:
        change: Wraps the copy once it is spread.
    """
    import usp

    ours = copy.deepcopy(model)
    wanted = results(model, inputs)
    spread(ours)
    ours = change(ours)
    found = results(ours, inputs, lambda m: usp.all_reduce_gradients(m, mesh))
    return errors(wanted, {name.replace("_orig_mod.", ""): x for name, x in found.items()})
