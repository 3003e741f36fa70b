"""Memory of the interpreter of AMD's machine code: what is waited for, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gcn.machine import STEPS_OF_A_WAVE, run_waves
from gcn.memory import Lds, Memory
from gcn.wave import Hazard, Wave
from gcn_text import LANE, integers, program, run, wave
from numpy.typing import NDArray


def words(w: Wave, first: int, count: int) -> NDArray[np.uint32]:
    return np.stack(w.u32[first : first + count], -1)


@pytest.mark.parametrize("late", [False, True])
def test_local_memory(late: bool) -> None:
    w = wave(late)
    w.u32[0][:] = LANE * 16
    for register in range(1, 5):
        w.u32[register][:] = integers()
    text = """ds_write_b128 v0, v[1:4] offset:32
              ds_read_b128 v[5:8], v0 offset:32
              ds_read2_b64 v[9:12], v0 offset0:5 offset1:4
              ds_read_u16 v13, v0 offset:38
              ds_read2st64_b32 v[14:15], v0 offset0:1 offset1:2
              ds_write_b16 v0, v1 offset:2000
              ds_write_b16_d16_hi v0, v1 offset:2002
              ds_read_b32 v16, v0 offset:2000
              s_waitcnt lgkmcnt(0)"""
    run(text, w)
    given = words(w, 1, 4)
    assert np.array_equal(words(w, 5, 4), given)
    assert np.array_equal(words(w, 9, 4), given[:, [2, 3, 0, 1]])
    assert np.array_equal(w.u32[13], given[:, 1] >> 16)
    assert np.array_equal(w.u32[16], given[:, 0])
    flat = given.ravel()
    assert np.array_equal(w.u32[14][:32], flat[(256 - 32) // 4 :: 4][:32])
    assert np.array_equal(w.u32[15][:32], flat[(512 - 32) // 4 :: 4][:32])


@pytest.mark.parametrize("late", [False, True])
def test_global_memory(late: bool) -> None:
    memory, x = Memory(), torch.arange(256, dtype=torch.int32)
    y = torch.zeros(64, 2, dtype=torch.bfloat16)
    memory.allow(x)
    memory.allow(y[:, 1], writable=True)
    w = wave(late, memory=memory)
    w.set_pair(0, x.data_ptr())
    w.u32[0][:] = LANE * 4
    places = np.uint64(y.data_ptr()) + LANE.astype(np.uint64) * np.uint64(4)
    w.u32[2][:], w.u32[3][:] = places.view(np.uint32).reshape(-1, 2).T
    text = """s_load_dwordx4 s[4:7], s[0:1], 0x10
              global_load_dword v1, v0, s[0:1] offset:8
              s_waitcnt vmcnt(0)
              v_mov_b32_e32 v4, 0x3f803f00
              global_store_short_d16_hi v[2:3], v4, off offset:2
              s_waitcnt lgkmcnt(0)"""
    run(text, w)
    assert w.s[4:8] == [4, 5, 6, 7]
    assert np.array_equal(w.u32[1], LANE + 2)
    assert torch.equal(y, torch.tensor([0.0, 1.0]).expand(64, 2))


@pytest.mark.parametrize("late", [False, True])
def test_buffers(late: bool) -> None:
    memory, x, y = Memory(), torch.arange(96, dtype=torch.int32), torch.zeros(96, dtype=torch.int32)
    memory.allow(x)
    memory.allow(y, writable=True)
    w = wave(late, memory=memory)
    for first, tensor in ((0, x), (4, y)):
        w.s[first : first + 4] = [
            *divmod(tensor.data_ptr(), 2**32)[::-1],
            64 * 4,
            0x27000,
        ]
    w.u32[0][:] = np.where(LANE % 3 == 0, 0x8000_0000, LANE * 4)
    w.s[8] = 4
    text = """buffer_load_dword v1, v0, s[0:3], s8 offen offset:4
              s_waitcnt vmcnt(0)
              buffer_store_dword v1, v0, s[4:7], 0 offen"""
    run(text, w)
    got = np.where((LANE % 3 > 0) & (LANE < 62), LANE + 2, 0)
    assert np.array_equal(w.u32[1], got)
    assert np.array_equal(y.numpy()[:64], got)


@pytest.mark.parametrize("late", [False, True])
def test_scratch(late: bool) -> None:
    w = Wave(Memory(), Lds(0), late, scratch_bytes=24)
    w.u32[0][:], w.u32[1][:] = integers(), integers()
    text = """scratch_store_dwordx2 off, v[0:1], off offset:12
              scratch_load_dword v2, off, off offset:16
              s_waitcnt vmcnt(0)"""
    assert np.array_equal(run(text, w).u32[2], w.u32[1])
    w.pc = 0
    with pytest.raises(Hazard, match="8 bytes at 20 of 24"):
        run("scratch_load_dwordx2 v[2:3], off, off offset:20", w)


LOAD = "global_load_dword v1, v0, s[0:1]"


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize(
    "text",
    [
        f"{LOAD} \n v_add_u32_e32 v2, v1, v1",
        f"{LOAD} \n {LOAD.replace('v1', 'v2')} \n s_waitcnt vmcnt(1) \n v_mov_b32_e32 v3, v2",
        f"{LOAD} \n s_waitcnt lgkmcnt(0) \n v_mov_b32_e32 v1, 0",
        f"{LOAD} \n ds_read_b32 v1, v0",
        "s_load_dword s4, s[0:1], 0x0 \n s_waitcnt lgkmcnt(1) \n s_mov_b32 s5, s4",
        "s_load_dwordx2 vcc, s[0:1], 0x0 \n s_cbranch_vccz .LBB0_1 \n.LBB0_1:",
        "ds_read_b32 v1, v0 \n ds_read_b32 v2, v0 \n s_waitcnt lgkmcnt(1) \n v_mov_b32_e32 v3, v2",
        "ds_bpermute_b32 v1, v0, v0 \n v_mfma_f32_16x16x16_f16 a[0:3], v[0:1], v[2:3], 0",
    ],
)
def test_a_register_that_is_not_waited_for(text: str, late: bool) -> None:
    memory, x = Memory(), torch.zeros(64)
    memory.allow(x)
    w = wave(late, memory=memory)
    w.set_pair(0, x.data_ptr())
    w.u32[0][:] = LANE * 4
    with pytest.raises(Hazard, match="under way"):
        run(text, w)


def test_what_is_waited_for_is_there() -> None:
    w = wave()
    w.u32[0][:] = LANE * 4
    text = """ds_write_b32 v0, v0
              ds_read_b32 v1, v0
              ds_read_b32 v2, v0
              s_waitcnt lgkmcnt(1)
              v_mov_b32_e32 v3, v1"""
    assert np.array_equal(run(text, w).u32[3], LANE * 4)


EXCHANGE = """ds_write_b32 v0, v1
              s_waitcnt lgkmcnt(0)
              s_barrier
              ds_read_b32 v3, v2
              s_waitcnt lgkmcnt(0)"""


def exchanged(text: str, descending: bool) -> bool:
    """Whether two waves see in local memory what the other has written."""
    lds = Lds(512)
    waves = [wave(lds=lds) for _ in range(2)]
    for n, w in enumerate(waves):
        mine, others = 256 * n, 256 * (1 - n)
        w.u32[0][:], w.u32[2][:] = LANE * 4 + mine, LANE * 4 + others
        w.u32[1][:] = LANE + 1000 * n
    run(text, *(waves[::-1] if descending else waves))
    return all(np.array_equal(w.u32[3], LANE + 1000 * (1 - n)) for n, w in enumerate(waves))


@pytest.mark.parametrize("missing", [None, "s_barrier", "s_waitcnt lgkmcnt(0)"])
def test_a_missing_barrier_or_wait_is_seen(missing: str | None) -> None:
    text = EXCHANGE if missing is None else EXCHANGE.replace(missing, "s_nop 0", 1)
    seen = [exchanged(text, descending) for descending in (False, True)]
    assert all(seen) == (missing is None)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("global_load_dword v1, v0, s[0:1] offset:4", "of no tensor"),
        ("global_load_dword v1, v0, s[0:1] offset:-4", "of no tensor"),
        ("global_load_dwordx2 v[2:3], v0, s[2:3]", "between the elements"),
        ("global_load_dword v1, v0, s[0:1] offset:2", "not aligned"),
        ("global_store_dword v0, v0, s[0:1]", "may not"),
        ("ds_read_b32 v1, v0 offset:3844", "of LDS"),
        ("ds_read_b64 v[2:3], v0", "not aligned"),
        ("ds_write_b32 v0, v0 offset:3844", "of LDS"),
    ],
)
def test_other_memory_is_refused(text: str, reason: str) -> None:
    memory, x, y = Memory(), torch.zeros(64), torch.zeros(64, 2)
    memory.allow(x)
    memory.allow(y[:, 0])
    w = wave(memory=memory)
    w.set_pair(0, x.data_ptr())
    w.set_pair(2, y.data_ptr())
    w.u32[0][:] = LANE * 4
    with pytest.raises(Hazard, match=reason):
        run(text, w)


def test_lanes_that_are_not_active_touch_nothing() -> None:
    w = wave()
    w.exec = 0
    w.u32[1][:] = 3
    run("global_load_dword v1, v0, s[0:1] \n s_waitcnt vmcnt(0)", w)
    assert (w.u32[1] == 3).all()


def test_a_wave_that_does_not_end() -> None:
    assert STEPS_OF_A_WAVE > 1_000_000
    with pytest.raises(Hazard, match="does not end in 1000 steps"):
        run_waves(program(".LBB0_1:\ns_branch .LBB0_1"), [wave()], steps=1000)
