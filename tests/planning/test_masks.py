"""Masks that compose: against what each of them says of one query and one key."""

from __future__ import annotations

import pickle
from random import Random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mask_cases import any_mask, table_of

from usp import masks
from usp.masks import Mask
from usp.planning.masks.runs import runs_of
from usp.planning.masks.telling import from_told, told

seeds = st.integers(0, 2**32)


def drawn(seed: int) -> tuple[Mask, torch.Tensor]:
    random = Random(seed)
    query_len = random.randint(0, 40)
    key_len = query_len if random.random() < 0.7 else random.randint(0, 40)
    mask, sees = any_mask(random, query_len, key_len)
    return mask, table_of(sees, query_len, key_len)


@given(seeds)
def test_a_mask_sees_what_its_parts_say(seed: int) -> None:
    mask, expected = drawn(seed)
    assert torch.equal(mask.dense(*expected.shape), expected), mask


@given(seeds)
def test_bands_are_monotone_disjoint_and_ascending(seed: int) -> None:
    mask, expected = drawn(seed)
    first, stop = mask.bands(torch.arange(len(expected)), expected.shape[1])
    assert (first.diff(dim=1) >= 0).all() and (stop.diff(dim=1) >= 0).all()
    assert (first >= 0).all() and (first <= stop).all() and (stop <= expected.shape[1]).all()
    assert (stop[:-1] <= first[1:]).all()
    assert int((stop - first).sum()) == int(expected.sum())


@given(seeds)
def test_a_mask_that_is_told_is_the_same(seed: int) -> None:
    """In words, numbers and tensors; what other numbers say is another mask of the same form."""
    random = Random(seed)
    drawn = tuple(any_mask(random, 9, 9)[0] for _ in range(3))
    words, numbers, tensors = told(drawn)
    together = torch.cat([x.flatten() for x in tensors]) if tensors else None
    found = from_told(" ".join(words), numbers, together)
    assert found == drawn and list(map(repr, found)) == list(map(repr, drawn))
    if together is not None:
        together.zero_()  # memory of a graph, which may be used again
    for one, other in zip(found, drawn, strict=True):
        assert torch.equal(one.dense(9, 9), other.dense(9, 9))


def test_a_mask_of_another_class_is_not_told() -> None:
    class Own(Mask):
        pass

    with pytest.raises(NotImplementedError, match=r"Own is no mask that usp\.masks makes"):
        told(Own() & masks.causal())


@given(seeds, st.integers(1, 9))
def test_between_two_positions_bands_stay_between_their_ends(seed: int, length: int) -> None:
    """What planning relies on where it looks at some queries alone."""
    mask, expected = drawn(seed)
    queries = torch.arange(len(expected))
    low = queries[::length]
    high = torch.minimum(low + (length - 1), queries[-1:].expand_as(low))
    both = torch.stack((low, high), 1).flatten()
    bands = mask.bands(both, expected.shape[1], trim=False)
    keys = torch.arange(expected.shape[1])
    for i, (a, b) in enumerate(zip(low, high, strict=True)):
        covered = torch.zeros(expected.shape[1], dtype=torch.bool)
        for first, stop in zip(*bands, strict=True):
            covered |= (keys >= first[2 * i]) & (keys < stop[2 * i + 1])
        assert not (expected[a : b + 1].any(0) & ~covered).any(), mask


@given(seeds)
def test_masks_are_values(seed: int) -> None:
    mask, again = drawn(seed)[0], drawn(seed)[0]
    assert mask == again and hash(mask) == hash(again) and repr(mask) == repr(again)
    assert pickle.loads(pickle.dumps(mask)) == mask
    if "<" not in repr(mask):  # a table is not printed whole
        assert eval(repr(mask), vars(masks)) == mask


def test_order_and_repetition_do_not_matter() -> None:
    a, b, c = masks.causal(), masks.window(3, 1), masks.first_keys(2)
    assert a & b & c == c & (b & a) & b
    assert a | b | c == c | (b | a) | b
    assert ~~a == a
    assert a & masks.everything() == a and a | masks.nothing() == a
    assert a & masks.nothing() == masks.nothing() and a | masks.everything() == masks.everything()
    assert masks.window() == masks.everything()


@pytest.mark.parametrize(
    ("mask", "bands"),
    [
        (masks.causal() | masks.first_keys(7), 1),
        (masks.causal() & masks.window(4, 4) & masks.documents((0, 9, 30, 50)), 1),
        (masks.window(4, 4) | masks.first_keys(1), 2),
        (masks.window(4, 4) | masks.first_keys(1) | masks.first_queries(1), 3),
        (masks.neighbourhood((5, 10), 3), 3),
        (masks.neighbourhood((5, 10), 3, edges="shift"), 5),
        (~masks.window(2, 2), 2),
        (masks.shared_prefix((0, 10, 30, 50)) & masks.causal(), 2),
    ],
    ids=repr,
)
def test_as_few_bands_as_there_are(mask: Mask, bands: int) -> None:
    assert len(mask.bands(torch.arange(50), 50).first) == bands


@given(seeds)
def test_runs_of_a_table_are_its_values(seed: int) -> None:
    """Also of rows that are no whole words, of words that come again, and of views."""
    random, torch_random = Random(seed), torch.Generator().manual_seed(seed)
    rows, keys, skipped = random.randint(0, 9), random.randint(0, 40), random.randint(0, 9)
    table = torch.rand(rows, keys + skipped, generator=torch_random) < random.choice(
        [0.03, 0.5, 0.9]
    )
    if random.random() < 0.4:
        table = (torch.arange(keys + skipped) % random.choice([2, 3, 4, 8]) < 2).expand(rows, -1)
    table = table[:, skipped:]
    if random.random() < 0.3:
        table = table.mT
    found = torch.zeros_like(table)
    runs = runs_of(table).tolist()
    for row, first, stop in runs:
        assert first < stop and not found[row, max(0, first - 1) : stop + 1].any()
        found[row, first:stop] = True
    assert torch.equal(found, table) and runs == sorted(runs)


def test_a_function_of_positions() -> None:
    documents = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2])
    mask = masks.from_function(lambda b, h, i, j: (documents[i] == documents[j]) & (i >= j), (8, 8))
    expected = masks.documents((0, 3, 5, 8)) & masks.causal()
    assert torch.equal(mask.dense(8, 8), expected.dense(8, 8))
    with pytest.raises(TypeError, match="uses its head"):
        masks.from_function(lambda b, h, i, j: (i >= j) & (h < 2), (8, 8))


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (
            lambda: masks.from_dense(torch.eye(80).bool().flip(1)),
            ValueError,
            "80 bands.*32.*attn_bias",
        ),
        (lambda: masks.from_dense(torch.arange(99) % 2 == torch.zeros(9, 1)), ValueError, " 50 b"),
        (lambda: masks.from_dense(torch.eye(4)), TypeError, "bool"),
        (lambda: masks.from_dense(torch.ones(1, 4, 4).bool()), ValueError, r"\(1, 4, 4\)"),
        (lambda: masks.window(-1, 2), ValueError, "left=-1"),
        (lambda: masks.documents((1, 4)), ValueError, "cu_seqlens must be"),
        (lambda: masks.blocks((0, 4, 3)), ValueError, "bounds must not decrease"),
        (lambda: masks.first_keys(-1), ValueError, "count"),
        (lambda: masks.causal(1.5), TypeError, "offset"),
        (
            lambda: masks.neighbourhood((4, 4), (3, 3, 3)),
            ValueError,
            "kernel must be one number or 2",
        ),
        (lambda: masks.neighbourhood((4,) * 4, 3), ValueError, "1, 2 or 3 dims"),
        (lambda: masks.neighbourhood((4, 4), 3, edges="wrap"), ValueError, "clip, shift"),
        (lambda: masks.causal() & 3, TypeError, "unsupported operand"),
    ],
)
def test_bad_input_is_named(call, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        call()
