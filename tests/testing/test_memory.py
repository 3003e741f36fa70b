"""The counter of bytes that live at a time."""

from __future__ import annotations

import torch

from usp.testing import StorageBytes


def test_what_is_made_counts_while_it_lives() -> None:
    before = torch.zeros(1000)
    with StorageBytes() as memory:
        a = before + 1  # 4000 bytes
        a.mul_(2)
        view = a[:10]
        del a
        assert memory.live == 4000  # a view keeps it
        b = torch.ones(50, dtype=torch.float64)
        del view
        assert memory.live == 400
        before.add_(1)
        c = [torch.zeros(25) for _ in range(4)]
        assert memory.live == 800
        del c
    assert (memory.peak, memory.largest, memory.live) == (4400, 4000, 400)
    assert b.sum() == 50
