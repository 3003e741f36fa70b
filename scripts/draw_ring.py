"""Draws docs/pictures/ring.svg: the steps of four ranks, causal and zigzag, by their plans.

python scripts/draw_ring.py
"""

from __future__ import annotations

import torch
from svg import PALE, RANKS, Svg, save

from usp import masks
from usp.planning.plan import Step, make_plan
from usp.planning.samples import masks_of

NAME = "ring.svg"
TOKENS, RING, CELL = 16, len(RANKS), 16


def draw() -> str:
    held = TOKENS // RING
    side, gap = held * CELL, 46
    picture = Svg(70 + RING * (side + gap), 60 + RING * (side + gap))
    for rank in range(RING):
        plan = make_plan(masks_of(masks.causal()), "zigzag", (TOKENS, TOKENS), RING, rank, "ring")
        top = 44 + rank * (side + gap)
        picture.box(4, top + side / 2 - 12, 50, 24, RANKS[rank])
        picture.words(29, top + side / 2 + 5, f"rank {rank}", 12, "middle")
        for number, step in enumerate(plan.steps):
            left = 70 + number * (side + gap)
            if not rank:
                name = "own keys" if not number else f"after hop {number}"
                picture.words(left + side / 2, 18, name, 12, "middle")
            _step(picture, step, left, top)
            if number:
                picture.arrow(left - gap + 8, top + side / 2, left - 8, top + side / 2)
    return str(picture)


def _step(picture: Svg, step: Step, left: float, top: float) -> None:
    (load,), held = step.loads, TOKENS // RING
    picture.words(left, top - 5, f"keys of {step.owner}", 10)
    here = torch.arange(held)[load.rows.index].tolist()
    for key in here:  # rows that nobody further on needs are not sent
        picture.box(left + key * CELL, top, CELL, held * CELL, PALE)
    for visit in load.visits:
        for query in range(held):
            first, stop = 0, visit.num_keys
            if visit.span is not None:
                first, stop = int(visit.span.first[query]), int(visit.span.stop[query])
            for key in here[first:stop]:
                x, y = left + key * CELL, top + query * CELL
                picture.box(x, y, CELL, CELL, RANKS[step.owner])


if __name__ == "__main__":
    save(NAME, draw())
