"""Draws docs/masks.png: every mask over 48 tokens of a contiguous ring of 4, by their plans.

python scripts/draw_masks.py        (needs matplotlib)
"""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure

from usp import masks
from usp.cli.picture import draw, in_colours
from usp.planning.plan import make_plan
from usp.planning.samples import masks_of

TOKENS, RING = 48, 4
PARTS = (0, 10, 22, 23, 40, 48)
MASKS = {
    "everything()": masks.everything(),
    "causal()": masks.causal(),
    "window(6, 6)": masks.window(6, 6),
    "causal() & (window(6) | first_keys(3))": masks.causal()
    & (masks.window(6) | masks.first_keys(3)),
    "documents(...)": masks.documents(PARTS),
    "causal() & documents(...)": masks.causal() & masks.documents(PARTS),
    "blocks(...)": masks.blocks(PARTS),
    "causal() & shared_prefix(...)": masks.causal() & masks.shared_prefix(PARTS),
    "window(3, 3) | first_keys(2) | first_queries(2)": masks.window(3, 3)
    | masks.first_keys(2)
    | masks.first_queries(2),
    "neighbourhood((6, 8), 3)": masks.neighbourhood((6, 8), 3),
    'neighbourhood((6, 8), 3, edges="shift")': masks.neighbourhood((6, 8), 3, edges="shift"),
    "~window(6, 6)": ~masks.window(6, 6),
}


def main() -> None:
    figure = Figure(figsize=(12, 9.6), layout="constrained")
    for axes, (name, mask) in zip(figure.subplots(3, 4).flat, MASKS.items(), strict=True):
        lengths = TOKENS, TOKENS
        plans = [
            make_plan(masks_of(mask), "contiguous", lengths, RING, rank) for rank in range(RING)
        ]
        picture = draw(plans, TOKENS, TOKENS)
        assert picture is not None
        steps = max(map(len, picture.pairs))
        axes.imshow(in_colours(picture, steps), extent=(0, TOKENS, TOKENS, 0))
        for edge in range(TOKENS // RING, TOKENS, TOKENS // RING):
            axes.axhline(edge, color="black", linewidth=0.4)
        axes.set_xticks([])
        axes.set_yticks([])
        axes.set_title(name, fontsize=8)
    path = Path(__file__).resolve().parents[1] / "docs" / "masks.png"
    figure.savefig(path, dpi=75, format="png", metadata={"Software": None})
    print(f"{path}: {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
