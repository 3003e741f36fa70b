"""Steps of training on some of the processes: data ranks times a mesh for each sequence."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

import usp
from usp.bench import world as worlds
from usp.bench.models import StepCase, TrainStep, of_torch, of_usp, weights_of
from usp.bench.world import World

TORCH, ALONE = "torch, one process", "usp, one process"


class Spread(NamedTuple):
    """Degrees: ranks with samples of their own, and of the mesh of each sequence."""

    dp: int
    ulysses: int
    ring: int

    @property
    def size(self) -> int:
        return self.dp * self.ulysses * self.ring

    @property
    def sp(self) -> int:
        return self.ulysses * self.ring

    def __str__(self) -> str:
        mesh = f"{self.ulysses} x {self.ring}"
        return f"usp {mesh}" if self.dp == 1 else f"usp dp {self.dp}, {mesh}"


def parse_spread(text: str) -> Spread:
    """ "2x1x4" as (2, 1, 4); "1x4" has no data ranks."""
    found = re.fullmatch(r"(?:(\d+)x)?(\d+)x(\d+)", text)
    numbers = [int(n or 1) for n in found.groups()] if found else [0]
    if 0 in numbers:
        raise argparse.ArgumentTypeError(f"{text!r} is no [DPx]ULYSSESxRING, as 2x1x2")
    return Spread(*numbers)


class Place(NamedTuple):
    """Where this rank is in a spread."""

    mesh: usp.SequenceMesh
    data: tuple[int, int, Any]


def places(spreads: list[Spread], world: World) -> dict[Spread, Place | None]:
    """This rank's place in each, on the first ranks of the world; None where it has none.

    Every rank calls it with the same spreads.
    """
    return {spread: _place(spread, world) for spread in spreads}


def _place(spread: Spread, world: World) -> Place | None:
    found = worlds.device_mesh(spread, ("dp", "ring", "ulysses"), world.device)
    if found is None:
        return None
    rank = found.get_local_rank("dp")
    group = found.get_group("dp") if spread.dp > 1 else None
    return Place(usp.SequenceMesh.from_device_mesh(found), (rank, spread.dp, group))


def steps_of(
    case: StepCase, placed: dict[Spread, Place | None], world: World, alone: bool = True
) -> dict[str, Callable[[], Any]]:
    """A step by each spread, and by one process with all cores; ranks without a place rest."""
    weights, rank = weights_of(case), worlds.axis().rank
    steps: dict[str, Callable[[], Any]] = {}
    if alone:
        for name, attend in ((TORCH, of_torch(case.model)), (ALONE, of_usp(case, None))):
            steps[name] = _rest
            if rank == 0:
                steps[name] = with_cores(TrainStep(case, weights, attend, world.device), world)
    for spread, place in placed.items():
        steps[str(spread)] = _rest
        if place is not None:
            attend = of_usp(case, place.mesh)
            steps[str(spread)] = TrainStep(
                case, weights, attend, world.device, place.mesh, place.data
            )
    return steps


class with_cores:
    """A step with all cores."""

    def __init__(self, step: TrainStep, world: World) -> None:
        self.step, self.world = step, world

    def __call__(self) -> None:
        with worlds.threads(self.world.cores):
            self.step()

    def gradients(self) -> Tensor:
        with worlds.threads(self.world.cores):
            return self.step.gradients()


def _rest() -> None:
    pass


@lru_cache(maxsize=2)
def exact_gradients(case: StepCase, device: str) -> Tensor:
    """By one process with torch's attention, in fp64."""
    attend = of_torch(case.model)
    return TrainStep(case, weights_of(case), attend, device, dtype=torch.float64).gradients()


def gradient_errors(
    case: StepCase, steps: dict[str, Callable[[], Any]], world: World
) -> tuple[dict[str, float], dict[str, str]]:
    """Relative error of all gradients together against fp64, of each; who raised, and what.

    The same on every rank.
    """
    runs = {name: getattr(step, "gradients", step) for name, step in steps.items()}
    found, failed = worlds.tried_together(runs)
    errors: dict[str, float] = {}
    if worlds.axis().rank == 0:
        with worlds.threads(world.cores):
            exact = exact_gradients(case, world.device)
        errors = {n: ((x - exact).norm() / exact.norm()).item() for n, x in found.items()}
    return worlds.everyone((errors, failed))[0]
