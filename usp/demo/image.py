"""The photograph of the demo and the grid of patches cut from it.

The picture is the Hubble eXtreme Deep Field (NASA/ESA, 872 x 1000 pixels), which lies inside
scikit-image's wheel: nothing is downloaded.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class PatchGrid:
    """A grid of square patches; token `row * columns + column` is the patch at (row, column)."""

    rows: int
    columns: int
    patch_size: int

    @property
    def tokens(self) -> int:
        return self.rows * self.columns

    @property
    def patch_dim(self) -> int:
        return 3 * self.patch_size**2

    def coordinates(self, positions: Tensor) -> Tensor:
        """(L,) token positions to (L, 2) rows and columns."""
        return torch.stack((positions // self.columns, positions % self.columns), dim=-1)


def load_photograph() -> np.ndarray[Any, Any]:
    """(872, 1000, 3) uint8: the Hubble eXtreme Deep Field from scikit-image's wheel."""
    from skimage import data

    return data.hubble_deep_field()


def choose_grid(height: int, width: int, tokens: int) -> PatchGrid:
    """The smallest odd grid of at least `tokens` patches, of the largest patches that allow it.

    Odd on both sides, because a length that no even number of ranks divides is the usual case
    for images and the one that padding schemes get wrong.

    Raises:
        ValueError: the picture has too few pixels for that many patches.
    """
    for patch_size in range(min(height, width), 0, -1):
        most_rows, most_columns = height // patch_size, width // patch_size
        grids = [
            PatchGrid(rows, columns, patch_size)
            for rows in range(1, most_rows + 1, 2)
            for columns in range(1, most_columns + 1, 2)
            # Close to the picture's own shape.
            if rows * columns >= tokens and abs(rows * width - columns * height) <= 2 * width
        ]
        if grids:
            return min(grids, key=lambda grid: grid.tokens)
    raise ValueError(
        f"{tokens} tokens asked for, but the picture has only {height} x {width} pixels"
    )


def crop(photograph: np.ndarray[Any, Any], grid: PatchGrid) -> np.ndarray[Any, Any]:
    """The central part of the picture that the grid covers."""
    height, width = grid.rows * grid.patch_size, grid.columns * grid.patch_size
    top = (photograph.shape[0] - height) // 2
    left = (photograph.shape[1] - width) // 2
    return photograph[top : top + height, left : left + width]


def cut_patches(photograph: np.ndarray[Any, Any], grid: PatchGrid) -> Tensor:
    """(tokens, patch_dim) fp32, row by row; mean 0 and variance 1 over the picture."""
    pixels = torch.tensor(crop(photograph, grid)).float() / 255
    pixels = (pixels - pixels.mean()) / pixels.std()
    p = grid.patch_size
    tiles = pixels.reshape(grid.rows, p, grid.columns, p, 3).transpose(1, 2)
    return tiles.reshape(grid.tokens, grid.patch_dim).contiguous()
