"""Each row of the table over what stands in for its kernels, against the fp64 oracle."""

from __future__ import annotations

from dataclasses import replace
from random import Random
from typing import Any

import pytest
import stand_ins
import torch
from cases import Case
from judge import assert_close, join, oracle
from library_cases import (
    Ring,
    assert_near,
    label,
    on_cpu,
    put_in_table,
    run_over_stand_in,
)
from mask_cases import any_mask, table_of
from pool import Pool

import usp
from usp import masks as of_usp
from usp.attention import block
from usp.backends import TABLE
from usp.backends.library.backend import LibraryBackend
from usp.backends.library.flash2 import Flash2, checked
from usp.backends.library.record import Record
from usp.backends.library.table import ROWS
from usp.planning.heads import Heads
from usp.planning.masks.options import make_mask
from usp.planning.problem import Block, Gradients, Scoring
from usp.planning.samples import masks_of
from usp.planning.visit import whole_visit

TOLERANCE = {torch.float16: 3e-3, torch.bfloat16: 2e-2, torch.float32: 1e-5}


def tensors(n: int, m: int, heads: tuple[int, int], dims: tuple[int, int], **about: Any) -> list:
    generator = torch.Generator().manual_seed(about.pop("seed", 0))
    shapes = (n, heads[0], dims[0]), (m, heads[1], dims[0]), (m, heads[1], dims[1])
    shapes = *shapes, (n, heads[0], dims[1])
    dtype = about.get("dtype", torch.float16)
    return [torch.randn(2, *shape, generator=generator).to(dtype) for shape in shapes]


@pytest.mark.parametrize("record", ROWS, ids=label)
def test_random_masks_layouts_and_rings(record: Record) -> None:
    """Uneven lengths, shared key heads, windows and documents."""
    backend, random = on_cpu(record), Random(7)
    for seed in range(5):
        n = random.randint(1, 60)
        m = n if random.random() < 0.6 else random.randint(1, 60)
        mask, sees = any_mask(random, n, m)
        x = tensors(n, m, random.choice(((4, 2), (3, 3), (6, 1))), (16, 16), seed=seed)
        layout = random.choice(("contiguous", "zigzag", "striped"))
        ring = Ring(masks_of(mask), layout, random.randint(1, 4), *x)
        want = ring.expected(attn_mask=table_of(sees, n, m))
        assert_near(ring.results(backend), want, TOLERANCE[torch.float16], (seed, mask))


DOCUMENTS = (0, 13, 14, 31, 50, 61)


@pytest.mark.parametrize("options", [{}, {"window_size": (9, 0)}], ids=str)
@pytest.mark.parametrize("record", ROWS, ids=label)
def test_packed_documents(record: Record, options: dict[str, Any]) -> None:
    """In one call of a kind, where the kernel takes several sequences."""
    options = {"causal": True, "cu_seqlens": DOCUMENTS, **options}
    masks = masks_of(make_mask(**options))
    ring = Ring(masks, "zigzag", 2, *tensors(61, 61, (4, 2), (16, 16)))
    assert_near(ring.results(on_cpu(record)), ring.expected(**options), 3e-3)


def test_documents_are_one_call() -> None:
    counted = Counted(stand_ins.flash2_functions())
    backend = on_cpu(ROWS[0], load=lambda: Flash2(counted))
    masks = masks_of(make_mask(causal=True, cu_seqlens=(0, 13, 31, 33, 61)))
    Ring(masks, "contiguous", 1, *tensors(61, 61, (4, 2), (16, 16))).results(backend)
    assert counted.calls == ["_flash_attn_varlen_forward", "_flash_attn_varlen_backward"]


@pytest.mark.parametrize("options", [{}, {"causal": True}, {"window_size": (4, 9)}], ids=str)
@pytest.mark.parametrize("documents", [None, DOCUMENTS])
def test_flash_attn_2_6(options: dict[str, Any], documents: Any) -> None:
    backend = on_cpu(ROWS[0], load=lambda: checked(stand_ins.flash26_functions(), "there"))
    options = options | {"cu_seqlens": documents}
    x = tensors(61, 61, (4, 2), (16, 16))
    ring = Ring(masks_of(make_mask(**options)), "zigzag", 2, *x, softcap=2.0)
    assert_near(ring.results(backend), ring.expected(**options), 4e-3)


class Counted:
    def __init__(self, functions: Any) -> None:
        self.functions, self.calls = functions, []

    def __getattr__(self, name: str) -> Any:
        self.calls.append(name)
        return getattr(self.functions, name)


@pytest.mark.parametrize("record", [r for r in ROWS if r.packed], ids=label)
def test_packed_calls_in_which_sequences_lie_apart(record: Record) -> None:
    """Rows between them see nothing, and are left as they were."""
    i, j = torch.arange(40)[:, None], torch.arange(40)
    seen = (i // 10 == j // 10) & (j <= i) & (i // 10 != 2) & (j % 10 < 9)
    ring = Ring(
        masks_of(of_usp.from_dense(seen)), "contiguous", 1, *tensors(40, 40, (2, 2), (8, 8))
    )
    got = ring.results(on_cpu(record))
    assert_near(got, ring.expected(attn_mask=seen), 3e-3)
    assert got["lse"][:, :, 20:30].eq(-torch.inf).all() and got["out"][:, 20:30].eq(0).all()


@pytest.mark.parametrize("record", ROWS, ids=label)
def test_single_rows(record: Record) -> None:
    """Each query sees a key of its own: sequences of one row."""
    seen = torch.eye(23, dtype=torch.bool) | torch.eye(23, dtype=torch.bool).roll(11, 1).triu(9)
    diagonal = Ring(
        masks_of(of_usp.from_dense(seen)), "striped", 2, *tensors(23, 23, (4, 2), (8, 8))
    )
    assert_near(diagonal.results(on_cpu(record)), diagonal.expected(attn_mask=seen), 3e-3)


@pytest.mark.parametrize("record", [r for r in ROWS if r.softcap], ids=label)
def test_softcap(record: Record) -> None:
    x = tensors(37, 37, (4, 2), (16, 16))
    x[0] *= 4
    ring = Ring(masks_of(make_mask(causal=True)), "zigzag", 2, *x, softcap=2.0)
    assert_near(ring.results(on_cpu(record)), ring.expected(causal=True), 4e-3)


@pytest.mark.parametrize("options", [{"causal": True}, {"cu_seqlens": DOCUMENTS}], ids=str)
@pytest.mark.parametrize("record", [r for r in ROWS if r.dlse], ids=label)
def test_a_returned_lse_is_differentiated(record: Record, options: dict[str, Any]) -> None:
    ring = Ring(masks_of(make_mask(**options)), "zigzag", 2, *tensors(61, 61, (4, 2), (16, 16)))
    ring.dlse = torch.randn(2, 4, 61)
    assert_near(ring.results(on_cpu(record)), ring.expected(**options), 4e-3)


@pytest.mark.parametrize(
    "record", [r for r in ROWS if not r.dims(32, 16, "") or torch.float32 in r.dtypes], ids=label
)
def test_other_head_dims_and_dtypes(record: Record) -> None:
    for dtype in record.dtypes:
        x = tensors(37, 41, (4, 2), (32, 16), dtype=dtype)
        ring = Ring(masks_of(make_mask(causal=True)), "contiguous", 2, *x)
        assert_near(ring.results(on_cpu(record)), ring.expected(causal=True), TOLERANCE[dtype])


@pytest.mark.parametrize(
    ("heads", "index"),
    [(Heads(1, 3, 6, 2), (0, 1, 1)), (Heads(2, 4, 6, 3), (0, 1, 1, 1))],
    ids=repr,
)
@pytest.mark.parametrize("record", [ROWS[0], ROWS[-2]], ids=label)
def test_key_heads_that_are_shared_unevenly(
    record: Record, heads: Heads, index: tuple[int, ...]
) -> None:
    """A rank may hold query heads 1 to 3 of groups of two: one reads a key head, two the next."""
    q, k, v, dout = tensors(11, 13, (len(index), 2), (16, 16))
    assert heads.kv_index == index
    piece = Block(q, k, v, whole_visit(11, 13), heads, Scoring(0.25))
    backend, state = on_cpu(record), block.new_state(q, 16)
    block.attention_forward(piece, state, backend)
    assert state.out is not None
    leaves = [x.double().requires_grad_() for x in (q, k, v)]
    spread = [leaves[0], *(x[:, :, list(heads.kv_index)] for x in leaves[1:])]
    p = torch.einsum("bihd,bjhd->bhij", *spread[:2]).mul(0.25).softmax(-1)
    out = torch.einsum("bhij,bjhd->bihd", p, spread[2])
    want = dict(
        zip(("dq", "dk", "dv"), torch.autograd.grad(out, leaves, dout.double()), strict=True)
    )
    saved = block.saved_for_backward(dout, None, state.out.half(), state.lse, backend)
    sums = [torch.zeros_like(x, dtype=torch.float32) for x in (q, k, v)]
    block.attention_backward(piece, saved, Gradients(*sums), backend)
    got = dict(zip(("dq", "dk", "dv"), sums, strict=True))
    assert_near(got | {"out": state.out}, want | {"out": out.detach()}, 3e-3)


def test_an_lse_that_lies_strided_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The stand-in reads it as the extension does; what the adapter makes contiguous matters."""
    from usp.backends.library.handing import Call

    masks = masks_of(make_mask(causal=True, cu_seqlens=(0, 20, 61)))
    backend = on_cpu(replace(ROWS[0], packed=None))
    ring = Ring(masks, "contiguous", 1, *tensors(61, 61, (4, 2), (16, 16)))
    want = ring.expected(causal=True, cu_seqlens=(0, 20, 61))
    assert_near(ring.results(backend), want, 3e-3)
    monkeypatch.setattr(Call, "given_lse", lambda self, lse: self.group.rows.of(lse, 2))
    with pytest.raises(AssertionError, match=r"d[qkv]: "):
        assert_near(ring.results(backend), want, 3e-3)


@pytest.fixture
def flash_attn_on_cpu() -> Any:
    before = TABLE
    put_in_table(on_cpu(ROWS[0]))
    yield
    put_in_table(*(backend for backend in before if isinstance(backend, LibraryBackend)))


@pytest.mark.parametrize(
    "options",
    [{}, {"causal": True}, {"causal": True, "cu_seqlens": DOCUMENTS}, {"window_size": (4, 9)}],
    ids=str,
)
def test_by_name_on_one_device(flash_attn_on_cpu: None, options: dict[str, Any]) -> None:
    """Where gradients are written, and not added up."""
    q, k, v, dout = tensors(61, 61, (4, 2), (16, 16))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out = usp.long_context_attention(*leaves, **options, backend="flash_attn")
    got = dict(zip(("dq", "dk", "dv"), torch.autograd.grad(out, leaves, dout), strict=True))
    ring = Ring(masks_of(make_mask(**options)), "contiguous", 1, q, k, v, dout)
    want = {name: x for name, x in ring.expected(**options).items() if name != "lse"}
    assert_near({"out": out.detach(), **got}, want, 3e-3)


def test_rows_that_nobody_has_and_keys_that_nobody_sees(flash_attn_on_cpu: None) -> None:
    q, k, v, dout = tensors(61, 61, (4, 2), (16, 16))
    assert usp.long_context_attention(q[:, :0], k, v, backend="flash_attn").shape == (2, 0, 4, 16)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out = usp.long_context_attention(*leaves, key_lengths=[7, 0], backend="flash_attn")
    dq, dk, dv = torch.autograd.grad(out, leaves, dout)
    for empty in (out[1], dq[1], dk[1], dv[1], dk[0, 7:], dv[0, 7:]):
        assert empty.eq(0).all()
    lower = of_usp.from_dense(torch.ones(61, 61, dtype=torch.bool).tril(-5))
    (dq,) = torch.autograd.grad(
        usp.long_context_attention(*leaves, mask=lower, backend="flash_attn"), leaves[:1], dout
    )
    assert dq[:, :5].eq(0).all() and dq[:, 6:].ne(0).any(3).all()
    alone = usp.long_context_attention(q[:1], k[:1, :7], v[:1, :7], backend="reference")
    torch.testing.assert_close(out[:1], alone, rtol=0, atol=3e-3)


GQA = {"dtype": "float16", "heads": 6, "kv_heads": 2, "head_dim": 16, "value_dim": 16}
MESHES = [
    ("flash-attn 2", Case(
        ulysses=2, ring=2, seq_len=53, causal=True, layout="zigzag", backend="flash_attn", **GQA
    )),
    ("flash-attn 3", Case(
        ulysses=1, ring=4, seq_len=61, causal=True, window=(20, 0), layout="striped",
        backend="flash_attn_3", **GQA,
    )),
    ("flash-attn 4", Case(
        ulysses=2, ring=2, seq_len=61, causal=True, layout="documents", cu_seqlens=DOCUMENTS,
        return_lse=True, backend="flash_attn_4", transport="allgather", **GQA,
    )),
    ("flash-attn 4", Case(
        ring=4, batch=2, seq_len=37, unions="each", return_lse=True, backend="flash_attn_4", **GQA
    )),
    ("flash-attn 4", Case(
        ring=4, seq_len=41, transport="queries", return_lse=True, backend="flash_attn_4", **GQA
    )),
    ("flash-attn 2", Case(
        ulysses=4, seq_len=23, causal=True, backend="flash_attn", **(GQA | {"heads": 2})
    )),
    ("torch's flash attention", Case(
        ulysses=4, seq_len=37, key_len=41, batch=2, unions="each", backend="aten_flash", **GQA
    )),
    ("torch's cuDNN attention", Case(
        ring=4, seq_len=41, transport="queries", backend="aten_cudnn", **GQA
    )),
    ("torch's memory-efficient attention", Case(
        ulysses=2, ring=2, seq_len=41, window=(7, 3), backend="aten_efficient",
        **(GQA | {"dtype": "float32", "value_dim": 24}),
    )),
]  # fmt: skip


@pytest.mark.parametrize(("title", "case"), MESHES, ids=repr)
def test_meshes(pool: Pool, title: str, case: Case) -> None:
    results = pool.run(run_over_stand_in, title, case, ranks=4)
    assert_close(case, join(case, results), oracle(case))
