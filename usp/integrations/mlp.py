"""MLPs of a model that exists, computed in tiles of tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

from torch import nn

from usp.integrations._choice import Only, any_means, choices, means, outermost, shortened
from usp.integrations._families import known_parts
from usp.integrations._tiles import of_trunk, tiled_sites

Model = TypeVar("Model", bound=nn.Module)


def replace_mlp(model: Model, tiles: int, *, only: Only | None = None, dim: int = -2) -> Model:
    """Let the MLPs of a model compute in tiles of tokens (``usp.tiled_mlp``), in place.

    The modules stay the objects they were, with their parameters, hooks and names: what is replaced
    is their ``forward``, and ``usp.restore(model)`` puts it back. Before or after
    ``usp.parallelize``, which has an argument for it too (``tiles=``), and DDP or FSDP. The model
    copies and pickles.

    Args:
        model: What holds the MLPs, or is one.
        tiles: How many; see ``usp.tiled_mlp``.
        only: Which modules: names as in ``named_modules``, patterns of them (``"*.mlp"``), classes,
            a function of (name, module), or several of these; of modules that hold each other the
            outermost. None: those of the models that ``usp.parallelize`` knows.
        dim: The dim of tokens of what they are given.

    Returns:
        ``model``.

    Raises:
        TypeError: an argument is of another kind.
        ValueError: the model is not known, or its MLPs are no modules; or ``only`` means none, or
            one that computes in tiles already.
        NotImplementedError: a module looks at several tokens; names what does. Nothing has been
            replaced.
    """
    names = dict(model.named_modules(remove_duplicate=False))
    for site in tiled_sites(names, _meant(model, names, only), tiles, dim):
        site.place()
    return model


def _meant(model: nn.Module, names: Mapping[str, nn.Module], only: Only | None) -> list[str]:
    if only is None:
        known = [each for found in known_parts(model).values() for each in found]
        if not known:
            raise ValueError(
                f"{type(model).__qualname__} is not known: say which modules are its MLPs, "
                'usp.replace_mlp(model, tiles, only="*.mlp")'
            )
        return [n for each in known for n in of_trunk(each, each.blocks(model), names)]
    for choice in choices(only):
        if not any(means(choice, name, names) for name in names):
            raise ValueError(
                f"only={choice!r} means no module of {type(model).__qualname__}, which holds "
                f"{shortened(names)}"
            )
    return outermost([name for name in names if any_means(only, name, names)])
