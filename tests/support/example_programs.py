"""The training programs of examples/, run in the workers of a pool."""

from __future__ import annotations

import importlib
import sys
from typing import Any

import pool as workers
import torch
from places import EXAMPLES


def module(program: str) -> Any:
    if str(EXAMPLES) not in sys.path:
        sys.path.insert(0, str(EXAMPLES))
    return importlib.import_module(program)


def train(program: str, options: list[str], ulysses_degree: int, ring_degree: int) -> list[float]:
    """On a worker: the losses."""
    mesh = None
    if ulysses_degree * ring_degree > 1:
        mesh = workers.mesh(ulysses_degree, ring_degree)
    found = module(program)
    return found.train(found.parse(options), mesh, torch.device("cpu"))


def train_hybrid(options: list[str]) -> list[float]:
    """On a worker: the losses, on the mesh that the options say, or alone where they say none."""
    found = module("train_hybrid")
    args, alone = found.parse(options), found.Place(torch.device("cpu"))
    sizes = [getattr(args, axis) for axis in found.AXES]
    return found.train(args, alone if max(sizes) == 1 else found.start(args))


def largest_difference(losses: list[float], expected: list[float]) -> float:
    return max(abs(a - b) for a, b in zip(losses, expected, strict=True))
