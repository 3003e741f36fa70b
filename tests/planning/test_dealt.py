"""Who holds which token of a sequence that grows: data that every rank works out alike."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from usp.planning.dealt import Dealt, Run
from usp.planning.layout import check_held, from_told, rows, told
from usp.planning.shares import local_row, owners, row_pieces

CHANGES = st.lists(
    st.tuples(st.sampled_from(["grow", "extend", "crop", "thin"]), st.integers(0, 23)), max_size=9
)


@settings(max_examples=40)
@given(st.integers(1, 4), st.integers(1, 5), CHANGES)
def test_changes_are_those_of_a_list_of_owners(ranks, page, changes) -> None:
    """A list with the owner of each position, None where it was dropped."""
    layout, owner = Dealt(ranks), []
    for change, n in changes:
        if change == "grow":
            layout = layout.grown(n, page)
            added = [None] * n
            for run_owner, a, b in layout.runs:
                for i in range(max(a, len(owner)), b):
                    added[i - len(owner)] = run_owner
            assert None not in added
            owner += added
        elif change == "extend":
            ends = [n * i // ranks for i in range(ranks + 1)]
            runs = [Run(r, ends[r], ends[r + 1]) for r in reversed(range(ranks))]
            layout = layout.extended(n, runs)
            owner += [r for r in range(ranks) for _ in range(ends[r], ends[r + 1])]
        elif change == "crop":
            n = min(n, len(owner))
            layout, owner = layout.cropped(n), owner[:n]
        else:
            before = layout
            layout = layout.thinned(2, n, page)
            for r in range(ranks):
                held = [i for i, o in enumerate(owner) if o == r]
                kept = [i for i in held if not 2 <= i < n]
                if len(held) - len(kept) >= len(kept) + page:
                    indices = [i for a, b in before.indices(r, 2, n) for i in range(a, b)]
                    assert [held[i] for i in indices] == kept
                    owner = [None if o == r and 2 <= i < n else o for i, o in enumerate(owner)]
        found = [None] * len(owner)
        for r, row in enumerate(rows(layout, len(owner), ranks)):
            for i in row.tensor.tolist():
                found[i] = r
        assert found == owner and layout.seq_len == len(owner)
        assert layout.counts == tuple(owner.count(r) for r in range(ranks))
        assert from_told(*told(layout)) == layout


def test_tokens_go_round_by_pages_and_many_at_once_in_pieces() -> None:
    layout = Dealt(3)
    for _ in range(12):
        layout = layout.grown(1, page=2)
    # the third holds a page more than the least, as did the first
    assert layout.runs == ((0, 0, 2), (1, 2, 4), (2, 4, 8), (0, 8, 10), (1, 10, 12))
    assert layout.counts == (4, 4, 4)
    assert Dealt(3).grown(100, page=2).runs == ((0, 0, 34), (1, 34, 68), (2, 68, 100))
    # a rank that came with less is filled first
    uneven = Dealt(2).extended(10, [Run(0, 0, 9), Run(1, 9, 10)]).grown(9, page=2)
    assert uneven.counts == (9, 10)


def test_a_mesh_with_rows_holds_it_by_rank() -> None:
    layout = Dealt(4).grown(11, page=2)
    assert row_pieces(layout, 11, 2, 2) == ((3, 3), (3, 2))
    places = [local_row(layout, 11, (2, 2), (r, u)).tensor for r in range(2) for u in range(2)]
    assert torch.equal(torch.cat(places).sort().values, torch.arange(11))
    where = torch.arange(11)
    owner, index = owners(layout, 11, (4, 1), where)
    assert [places[o][i] for o, i in zip(owner, index, strict=True)] == list(range(11))
    with pytest.raises(NotImplementedError, match="4 ranks, which are no 2 rows"):
        rows(layout, 11, 2)
    with pytest.raises(ValueError, match="holds 11 tokens, but the sequence has 12"):
        check_held(layout, 12)
