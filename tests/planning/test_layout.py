"""Layouts: every token exactly once, in order, balanced, and found again."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from usp.planning.layout import DocumentZigzag, Held, Layout, check_layout, rows
from usp.planning.shares import local_positions, row_pieces, shares


@st.composite
def tables(draw: st.DrawFn) -> tuple[Layout, int, int]:
    seq_len, ring_degree = draw(st.integers(0, 60)), draw(st.integers(1, 6))
    name = draw(st.sampled_from(["contiguous", "zigzag", "striped", "documents", "held"]))
    if name == "held":
        return held(draw, seq_len, ring_degree), seq_len, ring_degree
    if name != "documents":
        return name, seq_len, ring_degree
    inner = sorted(draw(st.lists(st.integers(0, seq_len), max_size=5)))
    return DocumentZigzag((0, *inner, seq_len)), seq_len, ring_degree


def held(draw: st.DrawFn, seq_len: int, ranks: int) -> Held:
    """As many tokens on each rank as it happens, on some of them none."""
    cuts = [draw(st.integers(0, seq_len)) for _ in range(ranks - 1)]
    return Held(tuple(b - a for a, b in pairwise((0, *sorted(cuts), seq_len))))


@given(tables())
def test_every_token_is_held_once_and_rows_are_sorted(table: tuple[Layout, int, int]) -> None:
    layout, seq_len, ring_degree = table
    held = [row.tensor for row in rows(layout, seq_len, ring_degree)]
    assert len(held) == ring_degree
    assert sorted(torch.cat(held).tolist()) == list(range(seq_len))
    for row, positions in zip(rows(layout, seq_len, ring_degree), held, strict=True):
        assert (positions.diff() > 0).all()
        assert len(row) == len(positions)
        assert row.ends.tolist() == ([int(positions[0]), int(positions[-1])] if len(row) else [])


@given(tables(), st.lists(st.integers(-3, 70), max_size=20))
def test_count_below_counts(table: tuple[Layout, int, int], asked: list[int]) -> None:
    layout, seq_len, ring_degree = table
    asked_for = torch.tensor(asked, dtype=torch.int32).clamp(0, seq_len)
    for row in rows(layout, seq_len, ring_degree):
        cut = row.cut(len(row) // 3, len(row) - 1)
        assert cut.tensor.tolist() == row.tensor[len(row) // 3 : max(len(row) - 1, 0)].tolist()
        for some in (row, cut):
            expected = [int((some.tensor < p).sum()) for p in asked_for]
            assert some.count_below(asked_for).tolist() == expected
            assert some.count_below(asked_for, between=(0, seq_len)).tolist() == expected


@given(tables(), st.integers(1, 4), st.data())
def test_pieces_of_a_row_join_in_order(
    table: tuple[Layout, int, int], ulysses: int, data: st.DataObject
) -> None:
    layout, seq_len, ring_degree = table
    if isinstance(layout, Held):
        layout = held(data.draw, seq_len, ring_degree * ulysses)
        assert shares(layout, seq_len, ring_degree, ulysses) == layout.counts
    for r, row in enumerate(rows(layout, seq_len, ring_degree)):
        parts = [
            local_positions(layout, seq_len, ring_degree, ulysses, (r, u)) for u in range(ulysses)
        ]
        assert torch.cat(parts).tolist() == row.tensor.tolist()
        cut = row_pieces(layout, seq_len, ring_degree, ulysses)[r]
        assert [len(part) for part in parts] == list(cut)


def test_known_tables() -> None:
    def table(layout: Layout, seq_len: int, ring_degree: int) -> list[list[int]]:
        return [row.tensor.tolist() for row in rows(layout, seq_len, ring_degree)]

    assert table("contiguous", 7, 3) == [[0, 1, 2], [3, 4], [5, 6]]
    assert table("zigzag", 8, 2) == [[0, 1, 6, 7], [2, 3, 4, 5]]
    assert table("striped", 7, 3) == [[0, 3, 6], [1, 4], [2, 5]]
    assert table(DocumentZigzag((0, 4, 8)), 8, 2) == [[0, 3, 5, 6], [1, 2, 4, 7]]
    assert table(Held((0, 3, 2, 0)), 5, 2) == [[0, 1, 2], [3, 4]]


@given(st.integers(0, 500), st.integers(1, 8))
def test_rows_differ_by_at_most_one_token_per_run(seq_len: int, ring_degree: int) -> None:
    for layout, slack in (("contiguous", 1), ("striped", 1), ("zigzag", 1)):
        sizes = [len(row) for row in rows(layout, seq_len, ring_degree)]
        assert max(sizes) - min(sizes) <= slack


def test_many_short_documents_do_not_pile_up_on_one_rank() -> None:
    sizes = [len(row) for row in rows(DocumentZigzag(tuple(range(0, 701, 7))), 700, 3)]
    assert max(sizes) - min(sizes) <= 7


def test_unknown_or_unfitting_layouts_are_refused() -> None:
    with pytest.raises(ValueError, match=r"'spiral'.*contiguous, zigzag, striped"):
        check_layout("spiral")
    with pytest.raises(ValueError, match=r"holds 5 tokens.*has 6"):
        rows(DocumentZigzag((0, 5)), 6, 2)
    with pytest.raises(ValueError, match="must not decrease"):
        DocumentZigzag((0, 5, 4))
    with pytest.raises(ValueError, match=r"holds 5 tokens.*has 6"):
        rows(Held((3, 2)), 6, 2)
    with pytest.raises(ValueError, match=r"tokens of 3 ranks.*2 rows"):
        rows(Held((3, 2, 0)), 5, 2)
    with pytest.raises(ValueError, match=r"tokens of 2 ranks.*has 4 "):
        shares(Held((3, 2)), 5, 2, 2)
    with pytest.raises(ValueError, match="0 or more, got -1"):
        Held((3, -1))
    with pytest.raises(TypeError, match=r"2\.0"):
        Held((3, 2.0))
    with pytest.raises(ValueError, match="no counts"):
        Held(())
