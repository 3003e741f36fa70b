"""Draws docs/pictures/layouts.svg: which of 24 tokens lie where, and what work that makes.

python scripts/draw_layouts.py
"""

from __future__ import annotations

from svg import PALE, RANKS, Svg, save

from usp import DocumentZigzag, masks
from usp.planning.layout import Layout, rows
from usp.planning.masks.mask import Mask
from usp.planning.plan import make_plan
from usp.planning.samples import masks_of

NAME = "layouts.svg"
TOKENS, RING, CELL = 24, len(RANKS), 16
DOCUMENTS = (0, 8, 24)
CAUSAL = masks.causal()
SHOWN: list[tuple[str, Layout, Mask, str]] = [
    ("contiguous", "contiguous", CAUSAL, "causal"),
    ("zigzag", "zigzag", CAUSAL, "causal"),
    ("striped", "striped", CAUSAL, "causal"),
    ("zigzag", "zigzag", CAUSAL & masks.documents(DOCUMENTS), "causal, 2 documents"),
    ("documents", DocumentZigzag(DOCUMENTS), CAUSAL & masks.documents(DOCUMENTS), ""),
]


def draw() -> str:
    left, right, height = 100, 120 + TOKENS * CELL, 52
    picture = Svg(right + 190, 30 + height * len(SHOWN))
    picture.words(left, 18, "24 tokens, each in the colour of its ring rank")
    picture.words(right, 18, "visible pairs of each rank")
    for line, (name, layout, mask, about) in enumerate(SHOWN):
        top = 30 + line * height
        picture.words(8, top + 17, name)
        if about:
            picture.words(8, top + 33, about, 10)
        for rank, row in enumerate(rows(layout, TOKENS, RING)):
            for position in row.tensor.tolist():
                x = left + position * CELL
                picture.box(x, top, CELL, CELL, RANKS[rank])
                picture.words(x + CELL / 2, top + 13, str(rank), 10, "middle")
        for end in DOCUMENTS[1:-1] if mask is not CAUSAL else ():
            picture.frame(left + end * CELL - 1, top - 4, 2, CELL + 8)
        lengths = TOKENS, TOKENS
        work = [make_plan(masks_of(mask), layout, lengths, RING, r).pairs for r in range(RING)]
        for rank, pairs in enumerate(work):
            y = top + rank * 10 - 6
            picture.box(right, y, 150, 9, PALE)
            picture.box(right, y, 150 * pairs / 129, 9, RANKS[rank])
            picture.words(right + 155, y + 8, str(pairs), 10)
    return str(picture)


if __name__ == "__main__":
    save(NAME, draw())
