"""The Hopper kernels beside the contract: mistakes that must show, whole meshes, what they take.

Their own source is run by the Gluon emulator: loads and products that run by themselves are done
at once or as late as can be, and partitions take turns at random.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from dataclasses import replace
from itertools import count
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from usp import kernels

if not kernels.has_gluon():
    pytest.skip("no Triton with Gluon for Hopper", allow_module_level=True)

import hopper_case
from cases import Case as MeshCase
from gluon.machine import Timing
from hopper_case import (
    TIMINGS,
    assert_right,
    attended,
    attended_on_a_mesh,
    emulated,
    errors,
    self_check,
    small_steps,
)
from judge import assert_close, join, oracle
from kernel_call import Call, computed, expected, largest, make_inputs, new_state, options
from pool import Pool
from torch import Tensor
from triton_interpreter import Kernels

from usp.kernels import configs, hopper, tune, tuned
from usp.kernels.arguments import BackwardInputs, KernelOptions
from usp.kernels.attention_backward import attention_backward
from usp.kernels.attention_forward import attention_forward
from usp.kernels.hopper import forward, key_gradients, launch, query_gradients

pytestmark = pytest.mark.device_code
SMALL = Call(
    batch=1,
    lq=131,
    lk=83,
    heads=(2, 0, 2),
    head_dim=64,
    value_head_dim=64,
    dtype=torch.bfloat16,
)
_turn = count()


def test_blocks_of_the_table() -> None:
    case = replace(SMALL, head_dim=128, value_head_dim=128, span="causal", lq=257, lk=257)
    with emulated(TIMINGS[0]), configs.pipelined():
        assert_right(case, computed(case, make_inputs(case), Kernels))


def test_usp_itself_would_find_them_right() -> None:
    """What a process on Hopper asks first, run by the emulator."""
    assert self_check(TIMINGS[0], 64) is None


@pytest.mark.parametrize("kernel", ["forward_kernel", "keys_kernel", "queries_kernel"])
def test_usp_itself_would_find_them_wrong(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that leaves its results as they were."""
    right = hopper_case.Kernel

    def spoiled(function: Any, timing: Timing) -> Any:
        return Idle() if function is getattr(launch, kernel) else right(function, timing)

    monkeypatch.setattr(hopper_case, "Kernel", spoiled)
    found = self_check(TIMINGS[0], 64)
    wanted = {"forward_kernel": "out", "keys_kernel": "dk", "queries_kernel": "dq"}[kernel]
    assert found is not None and found.startswith(wanted), found


class Idle:
    def __getitem__(self, grid: Any) -> Any:
        return lambda *_, **__: None


ON_A_MESH = MeshCase(
    backend="triton",
    dtype="bfloat16",
    seq_len=149,
    heads=2,
    kv_heads=1,
    head_dim=16,
    value_dim=24,
    causal=True,
    seed=3,
)
MESHES: dict[str, dict[str, Any]] = {
    "zigzag": {"ring": 2, "layout": "zigzag", "return_lse": True},
    "window": {"ulysses": 2, "window": (40, 0), "dtype": "float16"},
    "documents": {"ring": 2, "layout": "documents", "cu_seqlens": (0, 31, 31, 128, 149)},
}


@pytest.mark.parametrize("mesh", MESHES)
def test_whole_meshes(mesh: str, pool: Pool) -> None:
    case = replace(ON_A_MESH, **MESHES[mesh])
    results = pool.run(attended_on_a_mesh, case, TIMINGS[0], ranks=case.ranks)
    assert_close(case, join(case, results), oracle(case))


# What could be wrong: in which file, what stands there, and what would stand there instead.
MISTAKES = {
    "keys_not_awaited": (forward, "mbarrier.wait(k_full.index(stage), u // STAGES & 1)", "pass"),
    "values_not_awaited": (forward, "mbarrier.wait(v_full.index(before), (u", "abs((u"),
    "queries_not_awaited": (forward, "mbarrier.wait(q_full.index(C), 0)", "pass"),
    "full_stage_overwritten": (
        forward,
        "mbarrier.wait(k_empty.index(stage), u // STAGES & 1 ^ 1)",
        "pass",
    ),
    "wrong_parity": (query_gradients, "free = u // STAGES & 1 ^ 1", "free = u // STAGES & 1"),
    "values_released_too_early": (
        forward,
        "acc = warpgroup_mma_wait(0, deps=[acc])\n"
        "        mbarrier.arrive(v_empty.index(before), count=1)\n",
        "mbarrier.arrive(v_empty.index(before), count=1)\n"
        "        acc = warpgroup_mma_wait(0, deps=[acc])\n",
    ),
    "keys_released_too_early": (
        forward,
        "s = warpgroup_mma_wait(1, deps=[s])\n"
        "        mbarrier.arrive(k_empty.index(stage), count=1)\n",
        "mbarrier.arrive(k_empty.index(stage), count=1)\n"
        "        s = warpgroup_mma_wait(1, deps=[s])\n",
    ),
    "scores_not_awaited": (forward, "s = warpgroup_mma_wait(1,", "s = warpgroup_mma_wait(2,"),
    "sum_not_awaited": (forward, "acc = warpgroup_mma_wait(0,", "acc = warpgroup_mma_wait(1,"),
    "released_twice": (
        forward,
        "v_empty.index(before), count=1",
        "v_empty.index(before), count=2",
    ),
    "never_released": (forward, "mbarrier.arrive(v_empty.index(before), count=1)", "pass"),
    "turn_kept": (forward, "        mbarrier.arrive(turn.index(1 - C), count=1)\n", ""),
    "more_bytes_expected": (
        forward,
        "k_full.index(stage), k.block_type.nbytes",
        "k_full.index(stage), 16 + k.block_type.nbytes",
    ),
    "edge_not_masked": (forward, "if is_edge(u, walk):", "if u > walk[1] + walk[3]:"),
    "maximum_of_nothing": (forward, 'gl.where(higher == float("-inf"), 0.0, higher)', "higher"),
    "rows_of_another_stage": (
        key_gradients,
        "delta_rows.index(stage).load",
        "delta_rows.index(0).load",
    ),
    "rows_not_awaited": (
        key_gradients,
        "mbarrier.wait(full.index(stage), visit // STAGES & 1)",
        "pass",
    ),
    "rows_overwritten": (
        key_gradients,
        "mbarrier.wait(empty.index(stage), visit // STAGES & 1 ^ 1)",
        "pass",
    ),
    "held_keys_not_awaited": (key_gradients, "mbarrier.wait(held.index(C), 0)", "pass"),
    "edge_of_rows_not_masked": (
        key_gradients,
        "if (visit < full_begin) | (visit >= full_end):",
        "if False:",
    ),
    "rows_released_too_early": (
        key_gradients,
        "dk_sum, dv_sum = warpgroup_mma_wait(0, deps=[dk_sum, dv_sum])\n"
        "        mbarrier.arrive(empty.index(stage), count=1)\n",
        "mbarrier.arrive(empty.index(stage), count=1)\n"
        "        dk_sum, dv_sum = warpgroup_mma_wait(0, deps=[dk_sum, dv_sum])\n",
    ),
    "keys_of_dq_released_too_early": (
        query_gradients,
        "        dq_sum = warpgroup_mma_wait(0, deps=[dq_sum])\n"
        "        mbarrier.arrive(k_empty.index(before), count=1)\n",
        "        mbarrier.arrive(k_empty.index(before), count=1)\n"
        "        dq_sum = warpgroup_mma_wait(0, deps=[dq_sum])\n",
    ),
}


@pytest.fixture
def changed(tmp_path: Path) -> Iterator[Any]:
    """Makes a module like another one, with some of its source changed."""
    made = []

    def change(module: ModuleType, old: str, new: str) -> ModuleType:
        source = Path(str(module.__file__)).read_text()
        assert old in source, f"{old!r} no longer stands in {module.__name__}"
        path = tmp_path / f"changed_{next(_turn)}.py"
        path.write_text(source.replace(old, new))
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec is not None and spec.loader is not None
        found = importlib.util.module_from_spec(spec)
        sys.modules[path.stem] = found
        made.append(path.stem)
        spec.loader.exec_module(found)
        return found

    yield change
    for name in made:
        del sys.modules[name]


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_would_show(mistake: str, changed: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    module, old, new = MISTAKES[mistake]
    names = {forward: "forward_kernel", key_gradients: "keys_kernel"}
    name = names.get(module, "queries_kernel")
    wrong = getattr(changed(module, old, new), name)
    case = replace(SMALL, span="strictly_causal", lk=131, heads=(1, 0, 1))

    def shows(timing: Timing) -> bool:
        monkeypatch.setattr(launch, name, wrong)
        try:
            return not all(error <= 1 for error in errors(case, attended(case, timing)).values())
        except AssertionError:  # a Hazard is one
            return True

    assert any(shows(replace(timing, seed=seed)) for seed in range(3) for timing in TIMINGS)


def test_tuning_sees_what_is_wrong(changed: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    trials = tune.problem((1, 70, 2, 1, 64), torch.bfloat16, torch.device("cpu"))
    with small_steps(TIMINGS[3]):
        wanted = [trial.answer() for trial in trials]
        assert trials[0].agrees(wanted[0]) and trials[1].agrees(wanted[1])
    wrong = changed(forward, "if is_edge(u, walk):", "if u > walk[1] + walk[3]:")
    monkeypatch.setattr(launch, "forward_kernel", wrong.forward_kernel)
    with small_steps(TIMINGS[3]):
        assert not trials[0].agrees(wanted[0])


NOT_TAKEN: dict[str, dict[str, Any]] = {
    "fp32": {"dtype": torch.float32},
    "bias": {"bias": "BHQK"},
    "softcap": {"softcap": 2.0},
    "alibi": {"alibi": "1H"},
    "dropout": {"dropout_p": 0.1},
    "rows_not_aligned": {"head_dim": 20, "heads": (1, 0, 1)},
    "expanded": {"batch": 2, "layout": "expanded"},
    "no_keys": {"lk": 0},
}


class Portable:
    """Stands in for the portable launches: which were asked for."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def __getattr__(self, name: str) -> Any:
        return lambda *_: self.asked.append(name)


@pytest.fixture
def portable(monkeypatch: pytest.MonkeyPatch) -> Iterator[Portable]:
    stand_in = Portable()
    importlib.import_module("usp.kernels.portable.launch")
    monkeypatch.setattr("usp.kernels.portable.launch", stand_in)
    monkeypatch.setattr(configs, "device_name", lambda device: "some GPU")
    configs.forget()
    yield stand_in
    configs.forget()


def called(case: Call, x: Any) -> list[Tensor]:
    """Forward and backward by the doors; what they have updated."""
    shared = KernelOptions(*options(case, x, slice(None), masked=True))
    out, lse = new_state(case)
    sums = [torch.zeros(t.shape) for t in (x.q, x.k, x.v)]
    attention_forward(x.q, x.k, x.v, shared, out, lse)
    given = BackwardInputs(x.dout, x.q, x.k, x.v, x.dlse, x.dlse)
    attention_backward(given, shared, None, *sums)
    return [out, *sums]


BACKWARD = ["add_key_gradients", "add_query_gradients"]
ALL = ["attention_forward", *BACKWARD]


@pytest.mark.parametrize("reason", [None, *NOT_TAKEN])
def test_the_portable_kernels_take_the_rest(reason: str | None, portable: Portable) -> None:
    case = replace(SMALL, **NOT_TAKEN[reason]) if reason else SMALL
    x = make_inputs(case)
    with small_steps(TIMINGS[0]):
        updated = called(case, x)
    # a backward without keys has nothing to do
    rest = ALL[:1] if reason == "no_keys" else ALL
    assert portable.asked == ([] if reason is None else rest)
    assert all(t.any() for t in updated) if reason is None else not any(t.any() for t in updated)
    shared = KernelOptions(*options(case, x, slice(None), masked=True))
    assert hopper.takes("forward", shared, x.q, x.k, x.v) == (reason is None)
    assert not hopper.takes("forward", replace(shared, softmax_scale=-1.0), x.q, x.k, x.v)


@pytest.mark.parametrize("dims", [(136, 136), (256, 64), (64, 256)])
def test_forward_takes_wider_heads(dims: tuple[int, int], portable: Portable) -> None:
    case = replace(SMALL, lq=70, head_dim=dims[0], value_head_dim=dims[1], span="causal")
    x = make_inputs(case)
    with small_steps(TIMINGS[0]):
        out, *_ = called(case, x)
    assert portable.asked == BACKWARD
    assert largest(out - expected(case, x)["out"]) <= 1e-2


def test_no_head_is_wider() -> None:
    x = make_inputs(replace(SMALL, head_dim=264))
    shared = KernelOptions(*options(SMALL, x, slice(None), masked=True))
    assert not hopper.takes("forward", shared, x.q, x.k, x.v)


def test_a_base_that_is_not_aligned_is_not_taken() -> None:
    x = make_inputs(SMALL)
    shared = KernelOptions(*options(SMALL, x, slice(None), masked=True))
    moved = torch.empty(x.k.numel() + 1, dtype=x.k.dtype)[1:].view(x.k.shape)
    assert hopper.takes("forward", shared, x.q, x.k, x.v)
    assert not hopper.takes("forward", shared, x.q, moved, x.v)


def test_by_default_they_are_not_asked(monkeypatch: pytest.MonkeyPatch, portable: Portable) -> None:
    monkeypatch.setattr(tuned, "recall", lambda *_: None)
    monkeypatch.setattr(configs, "family", lambda device: "sm_90")
    called(SMALL, make_inputs(SMALL))
    assert portable.asked == ALL


def test_an_older_triton_has_no_gluon_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = kernels.has_gluon.__wrapped__
    assert asked()
    monkeypatch.setattr("triton.__version__", "3.5.1")
    assert not asked()
    monkeypatch.setattr("triton.__version__", "4.0.0+git")
    assert asked()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert not asked()
