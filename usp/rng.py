"""The two random streams of a sharded model: equal on all sequence ranks, or different on each.

DropPath drops whole samples, so every rank that holds a part of a sample must drop it alike:
``replicated``. Dropout of tokens and features must differ, or distant tokens lose the same
features: ``sharded``. (Attention dropout needs neither: it is keyed by global positions.)

No global state: a stream starts from one number of torch's default CPU generator and leaves
nothing behind but that this number was drawn. So ``torch.manual_seed`` makes it repeatable, and
``torch.utils.checkpoint``, which winds that generator back, replays the same numbers.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING

import torch

from usp.distributed.agreement import check_on_all_ranks

if TYPE_CHECKING:
    from usp.distributed.mesh import SequenceMesh

__all__ = ["replicated", "sharded"]

# Fractional part of the golden ratio: consecutive ranks get seeds far apart in every bit.
_GOLDEN = 0x9E3779B97F4A7C15
_SEED_BITS = 63


@contextmanager
def replicated(mesh: SequenceMesh | None = None) -> Iterator[None]:
    """Random numbers in here are equal on all ranks of ``mesh``.

    The seed is that of the mesh's first rank: the ranks meet (48 bytes along each axis), so every
    rank of the mesh must come here, and where one is elsewhere each raises. Ranks of different
    meshes (data parallel ones) differ when their generators do.

    Args:
        mesh: The sequence ranks that must agree; None is one device.

    Example:
        >>> with usp.rng.replicated(mesh):
        ...     x = x + drop_path(branch(x))
    """
    seed = _draw_seed()
    if mesh is not None and mesh.size > 1:
        _, told = check_on_all_ranks(
            mesh, "usp.rng.replicated", lambda: None, lambda _: {}, lambda: (seed,)
        )
        seed = told[0][0]
    with _seeded(seed, mesh):
        yield


@contextmanager
def sharded(mesh: SequenceMesh | None = None) -> Iterator[None]:
    """Random numbers in here differ on each rank of ``mesh``, though their generators be equal.

    Nothing is sent.

    Args:
        mesh: The sequence ranks that must differ; None is one device.

    Example:
        >>> with usp.rng.sharded(mesh):
        ...     x = torch.nn.functional.dropout(x, 0.1)
    """
    rank = 0 if mesh is None else mesh.rank
    seed = (_draw_seed() + (rank + 1) * _GOLDEN) % 2**_SEED_BITS
    with _seeded(seed, mesh):
        yield


class Drawn:
    """Random numbers that can be drawn again: of one number of torch's default CPU generator, like
    the streams above, so that ranks draw alike however many they need."""

    def __init__(self) -> None:
        self._seed = _draw_seed()

    def again(self) -> AbstractContextManager[None]:
        """The same numbers each time; afterwards generators are as they were."""
        return _seeded(self._seed, None)


def _draw_seed() -> int:
    return int(torch.randint(2**_SEED_BITS - 1, (), dtype=torch.int64, device="cpu"))


@contextmanager
def _seeded(seed: int, mesh: SequenceMesh | None) -> Iterator[None]:
    """torch's generators start from ``seed``; afterwards they are as they were."""
    accelerator = _accelerator(mesh)
    if accelerator is None:
        with torch.random.fork_rng(devices=()):
            torch.default_generator.manual_seed(seed)
            yield
        return
    index = torch.accelerator.current_device_index()
    with torch.random.fork_rng(devices=(index,), device_type=accelerator):
        torch.default_generator.manual_seed(seed)
        getattr(torch, accelerator).manual_seed(seed)
        yield


def _accelerator(mesh: SequenceMesh | None) -> str | None:
    """The accelerator whose generator may be drawn from; one that nobody has started is left."""
    device = torch.accelerator.current_accelerator()
    if device is None or not torch.accelerator.is_available():
        return None
    if mesh is not None and mesh.device_type == device.type:
        return device.type
    started = getattr(getattr(torch, device.type), "is_initialized", lambda: True)
    return device.type if started() else None
