"""The PTX interpreter: what threads do together, where they go, and what memory they may touch."""

from __future__ import annotations

from typing import Any

import numpy as np
import ptx
import pytest
import torch
from ptx_programs import entry, run

Array = np.ndarray[Any, Any]
NOTHING = np.zeros((32, 0), np.uint32)
LANES = np.arange(32, dtype=np.uint32)


# -- warps


def shuffled(mode: str, b: int, c: int) -> tuple[list[int], list[int]]:
    body = f"""
  ld.global.b32 %r1, [%rd20];
  shfl.sync.{mode}.b32 %r2|%p1, %r1, {b}, {c}, -1;
  selp.b32 %r3, 1, 0, %p1;
  st.global.v2.b32 [%rd21], {{%r2, %r3}};"""
    got = run(body, 100 + LANES[:, None], "<u4", 2)
    return (got[:, 0] - 100).tolist(), got[:, 1].tolist()


def test_shuffles() -> None:
    lanes = LANES.tolist()
    assert shuffled("bfly", 5, 31)[0] == [lane ^ 5 for lane in lanes]
    assert shuffled("idx", 7, 31) == ([7] * 32, [1] * 32)
    up, inside = shuffled("up", 3, 0)
    assert up == [0, 1, 2, *lanes[:-3]]
    assert inside == [0] * 3 + [1] * 29
    down, inside = shuffled("down", 3, 31)
    assert down == [*lanes[3:], 29, 30, 31]
    assert inside == [1] * 29 + [0] * 3
    # segments of 8 lanes, as __shfl_*_sync(..., width=8) asks for them
    assert shuffled("idx", 2, 0x181F)[0] == [lane // 8 * 8 + 2 for lane in lanes]
    assert shuffled("up", 1, 0x1800)[0] == [max(lane - 1, lane // 8 * 8) for lane in lanes]
    assert shuffled("down", 1, 0x181F)[0] == [min(lane + 1, lane // 8 * 8 + 7) for lane in lanes]


def fragments_of(rows_and_columns: Any, matrix: Array, elements: int) -> Array:
    """(32, elements) of a matrix, by the formulas of one lane."""
    return np.array(
        [[matrix[rows_and_columns(lane, i)] for i in range(elements)] for lane in range(32)]
    )


def a_of(lane: int, i: int) -> tuple[int, int]:
    """PTX ISA, "Matrix Fragments for mma.m16n8k16 with floating point type"."""
    row = lane // 4 if (0 <= i < 2 or 4 <= i < 6) else lane // 4 + 8
    return row, lane % 4 * 2 + (i & 1) + (8 if i >= 4 else 0)


def b_of(lane: int, i: int) -> tuple[int, int]:
    return lane % 4 * 2 + (i & 1) + (8 if i >= 2 else 0), lane // 4


def c_of(lane: int, i: int) -> tuple[int, int]:
    return lane // 4 + (8 if i >= 2 else 0), lane % 4 * 2 + (i & 1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("together", [0, 1])
def test_a_matrix_product(dtype: torch.dtype, together: int) -> None:
    """Two warps, each its own matrices."""
    generator = torch.Generator().manual_seed(0)
    parts, wants = [], []
    for _ in range(2):
        a, b = (torch.randn(n, generator=generator).to(dtype) for n in ((16, 16), (16, 8)))
        c = torch.randn(16, 8, generator=generator)
        a_bits, b_bits = (x.view(torch.uint16).numpy() for x in (a, b))
        words = [
            fragments_of(a_of, a_bits, 8).view(np.uint32),
            fragments_of(b_of, b_bits, 4).view(np.uint32),
            np.zeros((32, 2), np.uint32),
            fragments_of(c_of, c.numpy(), 4).view(np.uint32),
        ]
        parts.append(np.concatenate(words, 1))
        want = (a.double() @ b.double() + c.double()).numpy()
        wants.append(fragments_of(c_of, want, 4))
    kind = "f16" if dtype == torch.float16 else "bf16"
    body = f"""
  ld.global.v4.b32 {{%r1, %r2, %r3, %r4}}, [%rd20];
  ld.global.v2.b32 {{%r5, %r6}}, [%rd20+16];
  ld.global.v4.f32 {{%f1, %f2, %f3, %f4}}, [%rd20+32];
  mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32
    {{%f1, %f2, %f3, %f4}}, {{%r1, %r2, %r3, %r4}}, {{%r5, %r6}}, {{%f1, %f2, %f3, %f4}};
  st.global.v4.f32 [%rd21], {{%f1, %f2, %f3, %f4}};"""
    got = run(body, np.concatenate(parts), "<f4", 4, threads=64, together=together)
    np.testing.assert_allclose(got, np.concatenate(wants), rtol=0, atol=2e-6)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_matrices_are_loaded(count: int, transposed: bool) -> None:
    """Rows lie in any order, 16 bytes each; a lane's address is that of row lane."""
    rows = np.random.default_rng(1).permutation(32)
    numbers = np.arange(32 * 8, dtype=np.uint16).reshape(32, 8)  # of each lane's row
    given = np.concatenate(
        [numbers.view(np.uint32), rows[:, None].astype(np.uint32), np.zeros((32, 3), "<u4")], 1
    )
    trans, names = (
        ".trans" if transposed else "",
        ", ".join(["%r11", "%r12", "%r13", "%r14"][:count]),
    )
    body = f"""
  ld.global.v4.b32 {{%r1, %r2, %r3, %r4}}, [%rd20];
  ld.global.b32 %r5, [%rd20+16];
  shl.b32 %r5, %r5, 4;
  mov.u32 %r6, memory;
  add.u32 %r5, %r5, %r6;
  st.shared.v4.b32 [%r5], {{%r1, %r2, %r3, %r4}};
  bar.warp.sync -1;
  ldmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16 {{{names}}}, [%r5];
  st.global.v4.b32 [%rd21], {{%r11, %r12, %r13, %r14}};"""
    got = run(body, given.astype("<u4"), "<u4", 4, shared_bytes=512)[:, :count]
    for matrix in range(count):
        part = numbers[8 * matrix : 8 * matrix + 8]
        for lane in range(32):
            r, c = lane // 4, lane % 4 * 2
            low, high = (part[c, r], part[c + 1, r]) if transposed else (part[r, c], part[r, c + 1])
            assert got[lane, matrix] == int(high) << 16 | int(low)


@pytest.mark.parametrize(
    "instruction",
    [
        "shfl.sync.bfly.b32 %r2, %r1, 1, 31, -1;",
        "bar.sync 0;",
        "ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r2}, [%r1];",
    ],
)
def test_half_a_warp_is_refused(instruction: str) -> None:
    body = f"""
  setp.lt.u32 %p1, %r60, 16;
  @%p1 bra end;
  {instruction}
end:"""
    with pytest.raises(ptx.Refused, match="threads of one warp are not together") as refused:
        run(body, NOTHING, "<u4")
    assert instruction.rstrip(";") in str(refused.value)
    assert "threads 16-31" in str(refused.value)


# -- where threads go


def test_threads_part_and_meet() -> None:
    """Each its own number of rounds, with a guarded instruction, then a shuffle of all."""
    body = """
  mov.u32 %r1, 0;
  mov.u32 %r2, %r60;
again:
  setp.eq.u32 %p1, %r2, 0;
  @%p1 bra done;
  and.b32 %r3, %r2, 1;
  setp.ne.u32 %p2, %r3, 0;
  @%p2 add.u32 %r1, %r1, 100;
  @!%p2 add.u32 %r1, %r1, 1;
  sub.u32 %r2, %r2, 1;
  bra again;
done:
  shfl.sync.bfly.b32 %r4, %r1, 1, 31, -1;
  st.global.v2.b32 [%rd21], {%r1, %r4};
  setp.lt.u32 %p3, %r60, 5;
  @%p3 ret;
  st.global.b32 [%rd21+8], %r60;"""
    got = run(body, np.zeros((64, 0), "<u4"), "<u4", 4, threads=64)
    sums = [100 * ((lane + 1) // 2) + lane // 2 for lane in range(64)]
    assert got[:, 0].tolist() == sums
    assert got[:, 1].tolist() == [sums[lane ^ 1] for lane in range(64)]
    assert got[:, 2].tolist() == [0] * 5 + list(range(5, 64))


EXCHANGE = """
  mov.u32 %r1, memory;
  shl.b32 %r2, %r60, 2;
  add.u32 %r3, %r1, %r2;
  st.shared.b32 [%r3], %r60;
  {barrier}
  xor.b32 %r4, %r2, 252;
  add.u32 %r5, %r1, %r4;
  ld.shared.b32 %r6, [%r5];
  st.global.b32 [%rd21], %r6;"""


@pytest.mark.parametrize("order", ["ascending", "descending", "random"])
@pytest.mark.parametrize("barrier", ["bar.sync 0;", "bar.sync 3, 64;", ""])
def test_a_missing_barrier_shows(barrier: str, order: ptx.Order) -> None:
    """The first warp that runs reads what the other has not written: poison."""
    body = EXCHANGE.format(barrier=barrier)
    given = np.zeros((64, 0), "<u4")
    got = run(body, given, "<u4", threads=64, shared_bytes=256, order=order)[:, 0].tolist()
    poisoned = got.count(0xFFFFFFFF)
    if barrier:
        assert got == list(range(63, -1, -1))
    else:
        assert poisoned == 32
        assert (got[0] == 0xFFFFFFFF) == (order == "ascending") or order == "random"


@pytest.mark.parametrize("order", ["ascending", "descending"])
def test_races_are_found_whatever_the_numbers(order: ptx.Order) -> None:
    given = np.zeros((64, 0), "<u4")
    settings: dict[str, Any] = {"threads": 64, "shared_bytes": 256, "order": order, "races": True}
    run(EXCHANGE.format(barrier="bar.sync 0;"), given, "<u4", **settings)
    with pytest.raises(ptx.Refused, match=r"a race: warp [01] (reads|writes) at \+.*warp [01]"):
        run(EXCHANGE.format(barrier=""), given, "<u4", **settings)
    again = EXCHANGE.format(barrier="bar.sync 0;") + "st.shared.b32 [%r3], %r60;"
    with pytest.raises(
        ptx.Refused, match=r"warp [01] (reads|writes) .* and nothing orders the two"
    ):
        run(again, given, "<u4", **settings)
    with pytest.raises(ptx.Refused, match="not looked for across a barrier of 32 threads"):
        run("bar.sync 1, 32;", given, "<u4", **settings)


ONE_READS = """
  mov.u32 %r1, %ctaid.x;
  setp.eq.u32 %p1, %r1, 0;
  @%p1 ld.global.b32 %r2, [%rd31];
  @!%p1 st.global.b32 [%rd31], %r60;"""


def test_blocks_that_write_the_same() -> None:
    """%rd31 points to the output of all of them."""
    body = "st.global.b32 [%rd31], %r60;"
    assert run(body.replace("[%rd31]", "[%rd21]"), NOTHING, "<u4", races=True).any()
    run(body, NOTHING, "<u4")
    run(body, NOTHING, "<u4", races=True)  # threads of one warp
    for first, race in (
        (body, "block 1 writes at [+]0 of output what block 0 wrote"),
        (
            "ld.global.b32 %r1, [%rd31];" + body,
            "block 1 reads at [+]0 of output what block 0 wrote",
        ),
        (ONE_READS, "block 1 writes at [+]0 of output what block 0 read"),
    ):
        with pytest.raises(ptx.Refused, match=race):
            run(first, NOTHING, "<u4", races=True, blocks=2)


def test_a_barrier_for_which_somebody_does_not_come() -> None:
    body = """
  setp.ge.u32 %p1, %r60, 32;
  @%p1 ret;
  bar.sync 0;"""
    with pytest.raises(
        ptx.Refused, match=r"no thread .* can go on(.|\n)*threads 0-31 wait .*bar.sync"
    ):
        run(body, np.zeros((64, 0), "<u4"), "<u4", threads=64)


# -- memory


COPY = """
  mov.u32 %r1, memory;
  shl.b32 %r2, %r60, 4;
  add.u32 %r3, %r1, %r2;
  and.b32 %r4, %r60, 1;
  shl.b32 %r4, %r4, 4;
  cp.async.cg.shared.global [%r3], [%rd20], 16, %r4;
  cp.async.commit_group;
  cp.async.cg.shared.global [%r3+512], [%rd20], 16;
  cp.async.commit_group;
  {wait}
  ld.shared.b32 %r5, [%r3+4];
  ld.shared.b32 %r6, [%r3+516];
  st.global.v2.b32 [%rd21], {{%r5, %r6}};"""
POISON = 0xFFFFFFFF


@pytest.mark.parametrize(
    ("wait", "landed"),
    [
        ("cp.async.wait_all;", (True, True)),
        ("cp.async.wait_group 0;", (True, True)),
        ("cp.async.wait_group 1;", (True, False)),
        ("cp.async.wait_group 2;", (False, False)),
        ("", (False, False)),
    ],
)
def test_asynchronous_copies_land_at_their_wait(wait: str, landed: tuple[bool, bool]) -> None:
    given = np.arange(128, dtype=np.uint32).reshape(32, 4)
    got = run(COPY.format(wait=wait), given, "<u4", 2, shared_bytes=1024)
    first = np.where(LANES % 2, given[:, 1], 0)  # of even lanes no byte is read
    np.testing.assert_array_equal(got[:, 0], first if landed[0] else POISON)
    np.testing.assert_array_equal(got[:, 1], given[:, 1] if landed[1] else POISON)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (
            "ld.global.b32 %r1, [%rd20+4];",
            r"4 bytes at .* are in no tensor: \+128 from input of 128 bytes",
        ),
        ("ld.global.b32 %r1, [%rd30+-4];", "in no tensor"),
        ("st.global.b32 [%rd20], %r60;", "a write to input, which is only read"),
        ("st.global.b64 [%rd21], %rd20;", "not aligned to 8 bytes|in no tensor"),
        ("ld.global.v2.b32 {%r1, %r2}, [%rd20];", "not aligned to 8 bytes|in no tensor"),
        (
            "ld.shared.b32 %r1, [memory+64];",
            r"4 bytes are outside .*: \+64 from shared memory of 64",
        ),
        ("ld.shared.b32 %r1, [memory+2];", "not aligned to 4 bytes"),
        ("mov.u32 %r1, memory; cp.async.ca.shared.global [%r1], [%rd20+128], 4;", "in no tensor"),
        ("mov.u32 %r1, 8; ld.shared.b32 %r2, [%r1];", "outside of what there is"),
        ("ld.local.b32 %r1, [%rd20];", "modifier not known: ld.local"),
        ("frobnicate.b32 %r1, %r2;", "instruction not known: frobnicate"),
        ("add.sat.s32 %r1, %r2, %r3;", "modifier not known: add.sat"),
        ("mov.u32 %r1, %clock;", "register not known: %clock"),
        ("add.f32 %f1, %f2, %rd1;", "%rd1 has not the width of f32"),
        ("add.s64 %rd1, %r1, %rd2;", "%r1 has not the width of u64"),
        ("again: bra again;", "a loop without end"),
    ],
)
def test_refusals(body: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ptx.frame._JUMPS", 1000)
    with pytest.raises(ptx.Refused, match=message):
        run(body, np.zeros((32, 1), "<u4"), "<u4", shared_bytes=64)


def test_an_edit_must_find_its_text() -> None:
    assert "xor" in entry("  and.b32 %r1, %r2, %r3;").edited(r"and\.b32", "xor.b32").text
    with pytest.raises(ValueError, match="no 'mma' in kernel"):
        entry("").edited("mma", "")
