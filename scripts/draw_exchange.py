"""Draws docs/pictures/exchange.svg: tokens and heads of three ranks, before and after they are
exchanged; neither number divides by three.

python scripts/draw_exchange.py
"""

from __future__ import annotations

from itertools import accumulate

from svg import PALE, RANKS, Svg, save

from usp.planning.heads import split_heads
from usp.planning.shares import pieces

NAME = "exchange.svg"
TOKENS, HEADS, RANKS_OF_ROW, CELL = 8, 5, 3, 18


def draw() -> str:
    lengths = pieces(TOKENS, RANKS_OF_ROW)
    starts = [0, *accumulate(lengths)]
    width, height, gap = HEADS * CELL, TOKENS * CELL, 60
    picture = Svg(60 + RANKS_OF_ROW * (width + gap), 2 * height + 150)
    below = 40 + height + 76
    for rank, heads in enumerate(split_heads(HEADS, HEADS, RANKS_OF_ROW)):
        left = 60 + rank * (width + gap)
        picture.words(left, 20, f"rank {rank}", 12)
        for top, all_heads in ((40, True), (below, False)):
            picture.box(left, top, width, height, PALE)
            for token in range(TOKENS):
                owner = sum(start <= token for start in starts[1:])
                for head in range(HEADS):
                    here = heads.offset <= head < heads.offset + heads.count
                    if owner == rank if all_heads else here:
                        x, y = left + head * CELL, top + token * CELL
                        picture.box(x, y, CELL, CELL, RANKS[owner])
        picture.words(left, 36 + height + 20, f"{lengths[rank]} tokens, all heads", 10)
        picture.words(left, below + height + 16, f"all tokens, {heads.count} heads", 10)
        for other in range(RANKS_OF_ROW):
            to = 60 + other * (width + gap) + width / 2
            picture.arrow(left + width / 2, 40 + height + 22, to, below - 6)
    picture.words(8, 40 + height / 2, "before", 12)
    picture.words(8, below + height / 2, "after", 12)
    picture.words(
        60, below + height + 32, "tokens go down, heads to the right; colour: who had the token", 10
    )
    return str(picture)


if __name__ == "__main__":
    save(NAME, draw())
