"""Draws docs/pictures/bands.svg: three masks over 16 tokens, as bands; one query's intervals.

python scripts/draw_bands.py
"""

from __future__ import annotations

import torch
from svg import PALE, RANKS, Svg, save

from usp import masks

NAME = "bands.svg"
TOKENS, CELL, QUERY = 16, 13, 11
SHOWN = {
    "causal()": masks.causal(),
    "causal() & (window(4) | first_keys(2))": masks.causal()
    & (masks.window(4) | masks.first_keys(2)),
    "~window(3, 3)": ~masks.window(3, 3),
}


def draw() -> str:
    side = TOKENS * CELL
    gap = 62
    picture = Svg(30 + len(SHOWN) * (side + gap), side + 92)
    for column, (name, mask) in enumerate(SHOWN.items()):
        left, top = 30 + column * (side + gap), 30
        picture.words(left, 18, name, 11)
        picture.box(left, top, side, side, PALE)
        bands = mask.bands(torch.arange(TOKENS), TOKENS)
        told = []
        for colour, first, stop in zip(
            RANKS, bands.first.tolist(), bands.stop.tolist(), strict=False
        ):
            for query, (start, end) in enumerate(zip(first, stop, strict=True)):
                for key in range(start, end):
                    picture.box(left + key * CELL, top + query * CELL, CELL, CELL, colour)
            if first[QUERY] < stop[QUERY]:
                told.append(f"[{first[QUERY]}, {stop[QUERY]})")
        picture.frame(left, top + QUERY * CELL, side, CELL)
        picture.words(left, top + side + 20, f"query {QUERY} sees {' and '.join(told)}", 11)
        plural = "s" if len(bands.first) > 1 else ""
        picture.words(left, top + side + 38, f"{len(bands.first)} band{plural}", 11)
    picture.words(30, side + 86, "queries go down, keys to the right; a colour is a band", 11)
    return str(picture)


if __name__ == "__main__":
    save(NAME, draw())
