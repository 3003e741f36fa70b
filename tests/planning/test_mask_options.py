"""The options that are short for masks, against the plain reading of each, position by position."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from usp.planning.masks.options import make_mask

lengths = st.integers(0, 23)


@st.composite
def boundaries(draw: st.DrawFn, total: int) -> tuple[int, ...]:
    inner = draw(st.lists(st.integers(0, total), max_size=4))
    return (0, *sorted(inner), total)


@st.composite
def problems(draw: st.DrawFn) -> tuple[int, int, dict]:
    query_len, key_len = draw(lengths), draw(lengths)
    options: dict = {"causal": draw(st.booleans())}
    bound = st.none() | st.integers(0, 8)
    options["window_size"] = (draw(bound), draw(bound))
    if options["causal"]:
        options["prefix_len"] = draw(st.none() | st.integers(0, 9))
    if draw(st.booleans()):
        key_len = query_len
        options["cu_seqlens"] = draw(boundaries(query_len))
    return query_len, key_len, options


def sees(q: int, k: int, options: dict) -> bool:
    """The public options, one by one, as the docstring says them."""
    left, right = options["window_size"]
    if options["causal"] and k > q and k >= (options.get("prefix_len") or 0):
        return False
    if (left is not None and k < q - left) or (right is not None and k > q + right):
        return False
    cu_seqlens = options.get("cu_seqlens")
    if cu_seqlens is None:
        return True
    of_query, of_key = (sum(p >= bound for bound in cu_seqlens) for p in (q, k))
    return of_query == of_key


@given(problems())
def test_masks_are_exactly_what_the_options_say(problem: tuple[int, int, dict]) -> None:
    query_len, key_len, options = problem
    mask = make_mask(**options)
    expected = [[sees(q, k, options) for k in range(key_len)] for q in range(query_len)]
    assert mask.dense(query_len, key_len).tolist() == expected
    assert len(mask.bands(torch.arange(query_len), key_len).first) <= 1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"prefix_len": -1, "causal": True}, "-1"),
        ({"prefix_len": 3}, "causal=True"),
        ({"window_size": (-2, None)}, "left=-2"),
        ({"window_size": (None, -3)}, "right=-3"),
        ({"window_size": (1, 2, 3)}, "pair"),
        ({"cu_seqlens": (1, 4)}, "0, ..., total"),
        ({"cu_seqlens": (0,)}, "two boundaries"),
        ({"cu_seqlens": (0, 5, 3)}, r"\[1\]=5 and \[2\]=3"),
    ],
)
def test_bad_options_are_named(options: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make_mask(**options)


def test_boundaries_may_be_a_host_tensor() -> None:
    assert make_mask(cu_seqlens=torch.tensor([0, 2, 5])) == make_mask(cu_seqlens=[0, 2, 5])
    with pytest.raises(ValueError, match="host integers"):
        make_mask(cu_seqlens=torch.zeros(2, dtype=torch.int64, device="meta"))
