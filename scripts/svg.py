"""Small pictures of rectangles, words and arrows, the same to the byte wherever they are drawn."""

from __future__ import annotations

from pathlib import Path

PICTURES = Path(__file__).resolve().parents[1] / "docs" / "pictures"
# told apart by people who see few colours too (Okabe and Ito)
RANKS = ("#56B4E9", "#E69F00", "#009E73", "#CC79A7")
INK, PALE = "#222222", "#e8e8e8"


class Svg:
    """Lengths are pixels; (0, 0) is the upper left corner."""

    def __init__(self, width: int, height: int) -> None:
        self._head = (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
            f'width="{width}" height="{height}" font-family="sans-serif">\n'
            '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" '
            f'markerHeight="7" orient="auto"><path d="M0,0L8,4L0,8z" fill="{INK}"/></marker></defs>'
        )
        self._parts = [f'<rect width="{width}" height="{height}" fill="white"/>']

    def box(self, x: float, y: float, width: float, height: float, fill: str) -> None:
        self._parts.append(
            f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" fill="{fill}" '
            'stroke="white"/>'
        )

    def frame(self, x: float, y: float, width: float, height: float) -> None:
        self._parts.append(
            f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" fill="none" '
            f'stroke="{INK}"/>'
        )

    def words(self, x: float, y: float, text: str, size: int = 13, anchor: str = "start") -> None:
        text = text.replace("&", "&amp;").replace("<", "&lt;")
        self._parts.append(
            f'<text x="{x:g}" y="{y:g}" font-size="{size}" text-anchor="{anchor}" '
            f'fill="{INK}">{text}</text>'
        )

    def arrow(self, x: float, y: float, to_x: float, to_y: float) -> None:
        self._parts.append(
            f'<path d="M{x:g},{y:g}L{to_x:g},{to_y:g}" stroke="{INK}" fill="none" '
            'marker-end="url(#tip)"/>'
        )

    def __str__(self) -> str:
        return "\n".join((self._head, *self._parts, "</svg>\n"))


def save(name: str, picture: str) -> None:
    path = PICTURES / name
    path.write_text(picture)
    print(f"{path}: {path.stat().st_size} bytes")
