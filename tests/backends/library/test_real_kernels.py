"""flash-attn's own Python, and the Triton kernels of flash-attn and aiter, through their adapters.

The kernels run in Triton's interpreter, forward and backward.
"""

from __future__ import annotations

from collections.abc import Iterator
from random import Random
from typing import Any

import pytest
import real_libraries as real
import torch
from cases import Case
from judge import assert_close, join, oracle
from library_cases import Ring, assert_near
from mask_cases import any_mask, table_of
from pool import Pool

from usp.backends.library.table import ROWS
from usp.planning.masks.options import make_mask
from usp.planning.samples import masks_of

pytestmark = pytest.mark.library
TOLERANCE = {torch.float16: 3e-3, torch.bfloat16: 2e-2, torch.float32: 1e-5}


@pytest.fixture(scope="module")
def flash_attn() -> Iterator[Pool]:
    """Workers with flash-attn's Python over a stand-in for its extension."""
    real.folder()
    pool = Pool(size=4, setup=real.start_over_stand_in)
    yield pool
    pool.close()


@pytest.fixture(scope="module")
def interpreted() -> Iterator[Pool]:
    """Workers with flash-attn's and aiter's Triton kernels."""
    real.folder()
    pool = Pool(size=4, setup=real.start_interpreted)
    assert pool.run(real.uses_triton, ranks=1) == [True]
    yield pool
    pool.close()


def ring_of(
    masks: Any, layout: str, ranks: int, n: int, m: int, dim: int, dtype: torch.dtype, seed: int = 0
) -> Ring:
    generator = torch.Generator().manual_seed(seed)
    shapes = (n, 4), (m, 2), (m, 2), (n, 4)
    x = [torch.randn(1, *shape, dim, generator=generator).to(dtype) for shape in shapes]
    return Ring(masks, layout, ranks, *x)


@pytest.mark.parametrize("seed", range(12))
def test_flash_attn_over_a_stand_in(flash_attn: Pool, seed: int) -> None:
    """Random masks, layouts and rings: every call in the signature that 2.8 has."""
    random = Random(seed)
    n = random.randint(1, 70)
    m = n if random.random() < 0.6 else random.randint(1, 70)
    mask, sees = any_mask(random, n, m)
    layout = random.choice(("contiguous", "zigzag", "striped"))
    ranks = random.randint(1, 4)
    ring = ring_of(masks_of(mask), layout, ranks, n, m, 16, torch.float16, seed)
    (got,) = flash_attn.run(real.ring_results, "flash_attn", ring, ranks=1)
    assert_near(got, ring.expected(attn_mask=table_of(sees, n, m)), TOLERANCE[torch.float16], mask)


DOCUMENTS = (0, 30, 37, 90, 113)


def test_flash_attn_over_a_stand_in_on_a_mesh(flash_attn: Pool) -> None:
    case = Case(
        ulysses=2, ring=2, seq_len=113, heads=6, kv_heads=2, head_dim=16, value_dim=16,
        dtype="bfloat16", causal=True, cu_seqlens=DOCUMENTS, layout="documents",
        backend="flash_attn",
    )  # fmt: skip
    results = flash_attn.run(real.case_results, case, ranks=4)
    assert_close(case, join(case, results), oracle(case))


CASES: dict[str, tuple[dict[str, Any], str, int, int, int]] = {
    "causal": ({"causal": True}, "zigzag", 2, 77, 77),
    "full": ({}, "contiguous", 1, 45, 77),
    "causal, fewer queries": ({"causal": True}, "striped", 2, 45, 77),
    "causal, fewer keys": ({"causal": True}, "contiguous", 2, 77, 45),
    "documents": ({"causal": True, "cu_seqlens": (0, 30, 37, 77)}, "contiguous", 1, 77, 77),
    "window": ({"causal": True, "window_size": (20, 0)}, "zigzag", 2, 77, 77),
}


HALF, BF16, FULL = TOLERANCE
DTYPES = [
    *((case, HALF) for case in CASES),
    ("documents", BF16),
    ("causal", BF16),
    ("window", FULL),
]


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", ["flash_attn", "aiter"])
@pytest.mark.parametrize(("case", "dtype"), DTYPES, ids=str)
def test_kernels_in_the_interpreter(
    interpreted: Pool, case: str, name: str, dtype: torch.dtype
) -> None:
    options, layout, ranks, n, m = CASES[case]
    dim = 40 if case == "full" else 32
    ring = ring_of(masks_of(make_mask(**options)), layout, ranks, n, m, dim, dtype)
    (got,) = interpreted.run(real.ring_results, name, ring, ranks=1, timeout=500)
    assert_near(got, ring.expected(**options), TOLERANCE[dtype], (case, name))


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", ["flash_attn", "aiter"])
def test_kernels_in_the_interpreter_on_a_mesh(interpreted: Pool, name: str) -> None:
    case = Case(
        ulysses=2, ring=2, seq_len=101, heads=4, kv_heads=2, head_dim=32, value_dim=32,
        dtype="float16", causal=True, layout="zigzag", backend=name,
    )  # fmt: skip
    results = interpreted.run(real.case_results, case, ranks=4, timeout=500)
    assert_close(case, join(case, results), oracle(case))


def test_rows_that_see_nothing_are_answered_as_the_table_says(interpreted: Pool) -> None:
    """No call of ours has one; the table says it all the same."""
    (found,) = interpreted.run(real.empty_rows, ranks=1, timeout=500)
    (record,) = (record for record in ROWS if record.title == real.FLASH_ATTN_TRITON)
    assert set(found) == {*record.empty_lse}


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", ["flash_attn", "aiter"])
def test_windows_that_are_ignored_are_found_before_a_kernel_is_used(
    interpreted: Pool, name: str
) -> None:
    """The table does not give them any, and with reason."""
    for windows in (False, True):
        (said,) = interpreted.run(real.wrong_with, name, windows, ranks=1, timeout=500)
        assert (said is not None and "(a window)" in said) is windows, said
