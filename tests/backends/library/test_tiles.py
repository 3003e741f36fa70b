"""A visit is cut into calls that are legal and hold each of its pairs once."""

from __future__ import annotations

from itertools import pairwise
from random import Random

import pytest
import torch
from mask_cases import any_mask
from torch import Tensor

from usp.backends.library.tiles import Places, Rectangle, groups, rectangles
from usp.planning.plan import make_plan
from usp.planning.samples import masks_of
from usp.planning.visit import Visit, whole_visit

LAYOUTS = ("contiguous", "zigzag", "striped")


def visits(seed: int) -> list[Visit]:
    """Of each rank of a ring under a drawn mask."""
    random = Random(seed)
    n = random.randint(1, 70)
    m = n if random.random() < 0.7 else random.randint(1, 70)
    mask, _ = any_mask(random, n, m)
    ring, layout = random.randint(1, 4), random.choice(LAYOUTS)
    plans = [make_plan(masks_of(mask), layout, (n, m), ring, r) for r in range(ring)]
    return [v for plan in plans for step in plan.steps for load in step.loads for v in load.visits]


def seen_in(visit: Visit) -> Tensor:
    table = torch.ones(visit.num_queries, visit.num_keys, dtype=torch.int64)
    if visit.span is None:
        return table
    j = torch.arange(visit.num_keys)
    return table * ((j >= visit.span.first[:, None]) & (j < visit.span.stop[:, None]))


def seen_by_kernel(each: Rectangle, windows: bool) -> Tensor:
    """What a library's kernel sees, (rows, keys) of the rectangle in their own order."""
    n, m = each.q1 - each.q0, each.k1 - each.k0
    apart = torch.arange(m) - (torch.arange(n)[:, None] + m - n)  # from the bottom right corner
    seen = torch.ones(n, m, dtype=torch.bool)
    if each.left is not None:
        seen &= apart >= -each.left
    if each.right is not None:
        seen &= apart <= each.right
    if not windows:
        assert each.left is None and each.right in (None, 0)
        assert each.right is None or n == m > 1, "both corners agree on squares alone"
    return seen.flip(0, 1) if each.turned else seen


@pytest.mark.parametrize("windows", [True, False])
def test_every_pair_of_a_visit_is_in_one_call_and_no_row_is_empty(windows: bool) -> None:
    found = 0
    for seed in range(40):
        for visit in visits(seed):
            table = torch.zeros(visit.num_queries, visit.num_keys, dtype=torch.int64)
            for each in rectangles(visit, windows=windows):
                seen = seen_by_kernel(each, windows)
                assert seen.any(1).all() and seen.any(0).all(), each
                table[each.q0 : each.q1, each.k0 : each.k1] += seen
                found += 1
            assert torch.equal(table, seen_in(visit)), seed
    assert found > 200


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("windows", [True, False])
def test_a_group_is_of_one_kind_and_shares_nothing(windows: bool, packed: bool) -> None:
    largest = 0
    for seed in range(30):
        for visit in visits(seed):
            found = groups(visit, windows=windows, packed=packed)
            each = sorted(rectangles(visit, windows=windows), key=repr)
            assert sorted((r for group in found for r in group.rectangles), key=repr) == each
            for group in found:
                assert len({r.kind for r in group.rectangles}) == 1
                assert packed or len({r.size for r in group.rectangles}) == 1
                for runs in (group.rows.runs, group.keys.runs):
                    assert all(one[1] <= other[0] for one, other in pairwise(runs))
                largest = max(largest, len(group.rectangles))
            assert found is groups(visit, windows=windows, packed=packed)
    assert largest > (1 if windows and not packed else 2)


def test_a_group_is_not_larger_than_a_launch() -> None:
    from usp.planning.masks.options import make_mask

    mask = masks_of(make_mask(causal=True, cu_seqlens=tuple(range(0, 4201, 2))))
    (step,) = make_plan(mask, "contiguous", (4200, 4200), 1, 0).steps
    (visit,) = step.loads[0].visits
    sizes = [len(g.rectangles) for g in groups(visit, windows=True, packed=True)]
    assert sizes == [1024, 1024, 52]


def test_packed_documents_are_one_call_of_a_kind() -> None:
    from usp.planning.masks.options import make_mask

    cu = (0, 30, 37, 90, 160)
    mask = masks_of(make_mask(causal=True, cu_seqlens=cu))
    (step,) = make_plan(mask, "contiguous", (160, 160), 1, 0).steps
    (visit,) = step.loads[0].visits
    (group,) = groups(visit, windows=True, packed=True)
    assert group.rows.lengths == group.keys.lengths == [30, 7, 53, 70]
    assert len(groups(visit, windows=True, packed=False)) == 4


def test_a_window_without_windows_is_few_squares() -> None:
    from usp.planning.masks.options import make_mask

    mask = masks_of(make_mask(causal=True, window_size=(15, 0)))
    (step,) = make_plan(mask, "contiguous", (160, 160), 1, 0).steps
    (visit,) = step.loads[0].visits
    found = list(rectangles(visit, windows=False))
    assert len(found) == 1 + 2 * 9  # the first 16 rows; then runs of 16: a triangle at each end
    assert len(groups(visit, windows=False, packed=False)) == 3
    assert len(groups(visit, windows=False, packed=True)) == 2
    assert len(list(rectangles(whole_visit(3, 5), windows=False))) == 1


def test_places() -> None:
    x = torch.arange(20.0).view(2, 10)
    apart, adjoining = Places(((1, 3), (5, 6))), Places(((1, 3), (3, 6)))
    assert apart.of(x, 1).tolist() == [[1, 2, 5], [11, 12, 15]]
    assert adjoining.of(x, 1).data_ptr() == x[:, 1:].data_ptr()
    total = torch.zeros(2, 10)
    apart.add(total, apart.of(x, 1), 1)
    assert total.nonzero()[:, 1].unique().tolist() == [1, 2, 5]
    assert torch.equal(apart.of(total, 1), apart.of(x, 1))
    assert apart.around == slice(1, 6)
    assert apart.spread(apart.of(x, 1), 1, -1.0)[0].tolist() == [1, 2, -1, -1, 5]
