"""A model whose tokens are spread for a while."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from usp.distributed.mesh import SequenceMesh
from usp.integrations._boundary import Boundary
from usp.integrations.parallelize import Model, parallelize, restore


@contextmanager
def parallelized(
    model: Model,
    mesh: SequenceMesh | None,
    trunk: str | Boundary | Sequence[str | Boundary] | None = None,
    **options: Any,
) -> Iterator[Model]:
    """``parallelize`` for as long as a ``with`` lasts, then ``restore``, whatever was raised.

    Args:
        model, mesh, trunk: Of ``parallelize``. A backward belongs into the ``with``, too:
            activation checkpoints compute again in it.
        options: The others of ``parallelize``.

    Example:
        >>> with usp.parallelized(model, mesh) as model:
        ...     loss = criterion(model(images), labels)
        ...     loss.backward()
    """
    parallelize(model, mesh, trunk, **options)
    try:
        yield model
    finally:
        restore(model)
