"""Kernels that nobody has measured here are tried before they are used, and left out if wrong."""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import families
import pool as worker
import pytest
import torch
from library_cases import label, on_cpu
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import usp
from usp import cli, kernels
from usp.backends import TABLE, _local, _self_check, native, reference, sdpa, select, triton, trust
from usp.backends.library.call import How
from usp.backends.library.record import Record
from usp.backends.library.table import ROWS
from usp.backends.preference import PREFERENCES, Preference
from usp.kernels import configs
from usp.kernels.hopper_configs import HOPPER
from usp.machine import cpu, kept, place, verdicts
from usp.planning.problem import Traits
from usp.testing import dense_attention

backends: Any = importlib.import_module("usp.backends")
preferences: Any = importlib.import_module("usp.backends.preference")
CPU = torch.device("cpu")
TRAITS = Traits("cpu", torch.float32, 16, 16, 0.25, architecture="cpu", device=CPU)
UNKNOWN = "cpu of another maker"
OURS = "native" if native.unavailable() is None else "sdpa"

Family = Callable[..., ModuleType]


@pytest.fixture(autouse=True)
def unknown_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """A CPU that no result covers, whose user has no cache yet."""
    monkeypatch.setenv("USP_SELF_CHECK", "1")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(cpu, "kind", lambda: UNKNOWN)
    trust.forget()
    _local.forget()
    yield
    trust.forget()
    _local.forget()
    preferences.sources.cache_clear()


@pytest.fixture
def family(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Family:
    """family(name, changes): one that "auto" asks first of all."""
    monkeypatch.syspath_prepend(tmp_path)

    def make(name: str, changes: str = "") -> ModuleType:
        made = families.make(tmp_path, name, changes)
        monkeypatch.setattr(backends, "TABLE", (made, *TABLE))
        monkeypatch.setitem(preferences.GUESSES, "cpu", (name, "native", "sdpa"))
        preferences.sources.cache_clear()
        return made

    return make


@pytest.fixture
def like_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Families are checked in a process of their own."""
    monkeypatch.setattr(trust, "in_own_process", lambda traits: True)


@pytest.fixture
def checks(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The families that were checked, one name a check."""
    done: list[str] = []
    check = _self_check.wrong_with

    def counted(family: Any, traits: Traits, device: torch.device) -> str | None:
        done.append(family.NAME)
        return check(family, traits, device)

    monkeypatch.setattr(_self_check, "wrong_with", counted)
    return done


def chosen(traits: Traits = TRAITS, name: str = "auto") -> tuple[str, list[str]]:
    """Whom "auto" takes, and the warnings."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found = select(name, traits).NAME
    return found, [str(warning.message) for warning in said]


def attention(dtype: torch.dtype = torch.float32, **options: Any) -> float:
    """How far out of the public function is off dense attention."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 23, 2, 8, generator=generator).to(dtype) for _ in range(3))
    out = usp.long_context_attention(q, k, v, causal=True, **options)
    wanted = dense_attention(*(x.double() for x in (q, k, v)), causal=True)[0]
    return (out - wanted).abs().max().item()


@pytest.mark.parametrize("name", families.WRONG)
def test_a_wrong_family_is_left_out_and_said_once(name: str, family: Family) -> None:
    changes, seen = families.WRONG[name]
    family(name, changes)
    found, (message,) = chosen()
    assert found == OURS
    assert message.startswith(f"backend {name!r} is left out here: ")
    assert seen in message and f"{OURS!r} runs instead" in message
    assert chosen() == (OURS, [])
    assert chosen(replace(TRAITS, softmax_scale=0.5)) == (OURS, [])
    trust.forget()  # as a new process would: it reads what was kept, and says it too
    assert chosen() == (OURS, [message])
    assert attention() < 1e-5


@pytest.mark.parametrize("where", ["thread", pytest.param("process", marks=pytest.mark.long)])
def test_a_variant_is_used_if_it_is_right(
    where: str, family: Family, request: pytest.FixtureRequest, checks: list[str]
) -> None:
    if where == "process":
        request.getfixturevalue("like_a_gpu")
    made: Any = family("two_kinds", families.WITH_VARIANT.format("out, lse"))
    half = replace(TRAITS, dtype=torch.bfloat16)
    assert chosen(half) == chosen(half) == ("two_kinds", [])
    assert made.in_use == {(CPU, torch.bfloat16, 16)}
    assert chosen(replace(TRAITS, dtype=torch.float64)) == ("two_kinds", [])
    assert made.in_use == {(CPU, torch.bfloat16, 16)}
    if where == "thread":
        assert checks == ["two_kinds"] * 3


@pytest.mark.parametrize(
    ("wrong", "seen"),
    [("out * 1.3, lse", "out is off by"), ("out, lse + 1", "lse"), ("os.abort(), 0", "code -6")],
)
def test_a_variant_that_is_wrong_is_left_out(
    wrong: str, seen: str, family: Family, request: pytest.FixtureRequest
) -> None:
    if "abort" in wrong:
        request.getfixturevalue("like_a_gpu")
    made: Any = family("two_kinds", families.WITH_VARIANT.format(wrong))
    found, (message,) = chosen()
    assert found == "two_kinds" and not made.in_use
    assert message.startswith("other kernels of backend 'two_kinds' are left out here: ")
    assert seen in message and "its others run instead" in message
    assert chosen() == ("two_kinds", [])


def test_a_variant_must_be_checked(
    family: Family, monkeypatch: pytest.MonkeyPatch, checks: list[str]
) -> None:
    """A row is of the family as a whole, and who asks for no checks gets what needs none."""
    made: Any = family("two_kinds", families.WITH_VARIANT.format("out, lse"))
    monkeypatch.setenv("USP_SELF_CHECK", "0")
    assert chosen() == ("two_kinds", []) and not made.in_use
    monkeypatch.setenv("USP_SELF_CHECK", "1")
    monkeypatch.setitem(PREFERENCES, UNKNOWN, Preference(("two_kinds",), ("some.json",)))
    with FakeTensorMode():
        assert chosen() == ("two_kinds", []) and not made.in_use
    assert chosen() == ("two_kinds", []) and made.in_use
    assert checks == ["two_kinds"]


def test_the_variant_of_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "has_gluon", lambda: True)
    hopper = Traits("cuda", torch.bfloat16, 96, 64, 0.1, architecture="sm_90", device=CPU)
    assert triton.variant(hopper) == "Gluon"
    assert triton.variant(replace(hopper, dtype=torch.float16)) == "Gluon"
    others = [{name: True} for name in _self_check.OPTIONS]
    others += [{"dtype": torch.float32}, {"softmax_scale": -0.1}, {"architecture": "sm_80"}]
    for other in others:
        assert triton.variant(replace(hopper, **other)) is None, other
    found: set[Any] = set()
    monkeypatch.setattr(configs, "_found_right", found)
    triton.use_variant(hopper)
    assert found == {(CPU, torch.bfloat16, 96)}
    with triton.only_variant():
        assert configs._asked.keys() == HOPPER.keys()
    monkeypatch.setattr(kernels, "has_gluon", lambda: False)
    assert triton.variant(hopper) is None


@pytest.mark.long
def test_a_right_family_is_taken(family: Family) -> None:
    family("right")
    assert chosen(replace(TRAITS, dtype=torch.bfloat16)) == ("right", [])
    assert chosen(replace(TRAITS, bias=True, dropout=True)) == ("right", [])
    # what it refuses is not its to compute
    assert chosen(replace(TRAITS, softcap=True)) == (OURS, [])


@pytest.mark.parametrize(
    "name",
    [pytest.param(x, marks=() if x == "dies" else pytest.mark.long) for x in families.FATAL],
)
def test_what_takes_its_process_with_it_is_left_out(
    name: str, family: Family, like_a_gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verdicts, "PATIENCE", 12.0 if name == "hangs" else 100.0)
    changes, seen = families.FATAL[name]
    family(name, changes)
    found, (message,) = chosen()
    assert found == OURS and seen in message and repr(name) in message
    trust.forget()
    with mock.patch.object(verdicts, "run_apart", side_effect=AssertionError("asked again")):
        assert chosen() == (OURS, [message])


@pytest.mark.long
def test_several_share_a_process_and_none_suffers_for_another(
    family: Family, like_a_gpu: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """One that raises may have lost the device, one that dies has: who comes next gets another."""
    family("right")
    changes = {name: families.WRONG[name][0] for name in ("wrong_dq", "raises")}
    changes |= {"dies": families.FATAL["dies"][0], "right_too": "", "right_as_well": ""}
    made = [families.make(tmp_path, name, text) for name, text in changes.items()]
    begun: list[int] = []
    run = verdicts.run_apart

    def counted(task: str, arguments: Any, patience: float) -> Any:
        begun.append(len(arguments))
        return run(task, arguments, patience)

    monkeypatch.setattr(verdicts, "run_apart", counted)
    pairs = [(each, TRAITS) for each in (backends.TABLE[0], *made, reference)]
    right, dq, raised, died, *others = trust.check_again(pairs)
    assert right is None and others == [None, None, None]
    assert dq and dq.startswith("dq is off by")
    assert raised and raised.startswith("it raised RuntimeError: no kernel image")
    assert died and "exit code -6" in died
    assert begun == [6, 3, 2]


def test_where_no_second_process_has_the_device_this_one_checks(
    family: Family, like_a_gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    family("wrong_out", families.WRONG["wrong_out"][0])
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    found, (message,) = chosen()
    assert found == OURS and "out is off by" in message


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_verdict_holds_for_a_dtype(dtype: torch.dtype, family: Family) -> None:
    family("right_in_16_bits", families.NOT_FP32)
    wanted = OURS if dtype == torch.float32 else "right_in_16_bits"
    assert chosen(replace(TRAITS, dtype=dtype))[0] == wanted


@pytest.mark.parametrize("backend", [b for b in (native, sdpa) if not b.unavailable()])
@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str
)
def test_no_false_alarm(backend: ModuleType, dtype: torch.dtype) -> None:
    kinds = [{}, *({name: True} for name in _self_check.OPTIONS)]
    kinds.append(dict.fromkeys(_self_check.OPTIONS, True))
    for options in kinds:
        for dims in ((40, 40), (64, 24), (128, 128)):
            traits = Traits("cpu", dtype, *dims, dims[0] ** -0.5, **options)
            if not backend.reasons_against(traits):
                assert _self_check.wrong_with(backend, traits, CPU) is None, traits


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("record", ROWS, ids=label)
def test_no_false_alarm_of_a_library(
    record: Record, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its adapter over a stand-in, which keeps its conventions."""
    monkeypatch.setattr(_self_check, "ON_CPU", _self_check.ON_GPU)
    backend = on_cpu(record)
    for options in ({}, {"softcap": True}):
        traits = Traits("cpu", dtype, 64, 64, 0.125, **options)
        if not backend.reasons_against(traits):
            assert _self_check.wrong_with(backend, traits, CPU) is None


@pytest.mark.parametrize("record", [r for r in ROWS if r.windows], ids=label)
def test_a_library_that_ignores_windows_is_found(record: Record) -> None:
    backend = on_cpu(record)
    found = backend.found()
    assert not isinstance(found, str)

    def blind(call: Any) -> Any:
        def without(q: Any, k: Any, v: Any, *rest: Any) -> Any:
            return call(
                q, k, v, *(replace(x, left=None) if isinstance(x, How) else x for x in rest)
            )

        return without

    kernel = SimpleNamespace(forward=blind(found[1].forward), backward=found[1].backward)
    backend._found = found[0], kernel
    traits = Traits("cpu", torch.bfloat16, 64, 64, 0.125)
    seen = _self_check.wrong_with(backend, traits, CPU)
    assert seen is not None and seen.endswith("(a window)"), seen


def test_the_sizes_of_a_gpu_are_right_too() -> None:
    with mock.patch.object(_self_check, "ON_CPU", _self_check.ON_GPU):
        for backend in (sdpa, reference, *([native] if OURS == "native" else [])):
            assert _self_check.wrong_with(backend, TRAITS, CPU) is None


def test_nothing_is_checked_where_that_is_not_asked_for(
    family: Family, monkeypatch: pytest.MonkeyPatch, checks: list[str]
) -> None:
    family("wrong_out", families.WRONG["wrong_out"][0])
    monkeypatch.setenv("USP_SELF_CHECK", "0")
    assert chosen() == ("wrong_out", [])
    assert checks == [] and not verdicts.store().exists()
    monkeypatch.setenv("USP_SELF_CHECK", "1")
    assert chosen()[0] == OURS
    monkeypatch.setenv("USP_SELF_CHECK", "0")
    assert chosen() == ("wrong_out", [])


def test_what_a_committed_result_covers_is_not_checked(
    family: Family, monkeypatch: pytest.MonkeyPatch, checks: list[str]
) -> None:
    family("wrong_out", families.WRONG["wrong_out"][0])
    monkeypatch.setitem(PREFERENCES, UNKNOWN, Preference(("wrong_out",), ("some.json",)))
    assert chosen() == ("wrong_out", [])
    # the row says nothing of others
    assert chosen(replace(TRAITS, softcap=True)) == (OURS, [])
    assert checks == [OURS]


def test_a_backend_that_was_asked_for_by_name_raises(family: Family) -> None:
    family("wrong_dv", families.WRONG["wrong_dv"][0])
    with pytest.raises(NotImplementedError, match=r"(?s)wrong_dv.*dv of block.*USP_SELF_CHECK=0"):
        attention(backend="wrong_dv")
    assert attention(backend="reference") < 1e-5
    assert chosen(name=OURS) == (OURS, [])


def test_the_reference_is_what_others_are_compared_with(checks: list[str]) -> None:
    assert chosen(name="reference") == ("reference", [])
    assert checks == []


def test_a_verdict_is_kept(family: Family, checks: list[str]) -> None:
    family("right")
    chosen()
    trust.forget()
    chosen()
    assert checks == ["right"]
    (key,) = json.loads(verdicts.store().read_text())
    for part in ("right, float32", cpu.model(), cpu.level(), torch.__version__, usp.__version__):
        assert part in key


def test_info_says_what_was_checked(
    family: Family, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    family("wrong_out", families.WRONG["wrong_out"][0])
    chosen()
    cli.main(["info"])
    said = capsys.readouterr().out
    assert re.search(r"cpu: wrong_out, float32, .*  left out: out is off by", said)
    assert re.search(rf"cpu: {OURS}, float32, .*  right", said)
    monkeypatch.setattr(place, "driver", lambda device: "another")
    cli.main(["info"])
    assert "wrong_out, float32" not in capsys.readouterr().out


@pytest.mark.parametrize("what", ["driver", "version_of", "name_of", "_software"])
def test_a_verdict_of_another_place_is_not_trusted(
    what: str, family: Family, checks: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    family("right").PACKAGES = ("numpy",)
    chosen()
    trust.forget()
    monkeypatch.setattr(place, what, lambda *_: "another")
    chosen()
    assert checks == ["right", "right"]


@pytest.mark.parametrize("text", ["{", "[]", '{"KEY": 3}', '{"KEY": {}}', "\xff"])
def test_a_file_that_says_nothing_is_no_error(text: str, family: Family, checks: list[str]) -> None:
    key = trust.subject(family("right"), TRAITS).key
    verdicts.store().parent.mkdir(parents=True)
    verdicts.store().write_bytes(text.replace("KEY", key).encode("latin-1"))
    assert chosen() == ("right", [])
    assert checks == ["right"]
    assert kept.read(verdicts.store())[key] == {"wrong": None}


def test_where_nothing_can_be_kept_it_holds_for_this_process(
    family: Family, checks: list[str]
) -> None:
    verdicts.store().parent.write_text("a file where the folder should be")
    family("right")
    assert chosen() == chosen() == ("right", [])
    assert checks == ["right"]


def test_what_memory_was_short_for_is_asked_again_later(family: Family, checks: list[str]) -> None:
    full = 'def seen(block): raise torch.OutOfMemoryError("the device is full")'
    family("hungry", full)
    found, (message,) = chosen()
    assert found == OURS and "the device is full" in message
    assert chosen() == (OURS, [])
    trust.forget()
    chosen()
    assert checks.count("hungry") == 2


class Watching(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(str(func))
        return func(*args, **kwargs or {})


class WatchingFunctions(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(str(func))
        return func(*args, **kwargs or {})


def test_a_check_leaves_the_number_of_threads(family: Family, checks: list[str]) -> None:
    """It computes with one, which no other thread must notice."""
    seen: list[int] = []
    family("right")
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        chosen()
        assert torch.get_num_threads() == 2
        later = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
        later.start()
        later.join()
    finally:
        torch.set_num_threads(before)
    assert checks == ["right"] and seen == [2]


@pytest.mark.parametrize("around", ["modes", "no_grad", "inference", "autocast", "defaults"])
def test_a_check_neither_sees_nor_changes_the_state_of_its_caller(
    around: str, family: Family, checks: list[str]
) -> None:
    family("right")
    before = torch.random.get_rng_state()
    watching, functions = Watching(), WatchingFunctions()
    if around == "modes":
        with watching, functions:
            assert chosen() == ("right", [])
        assert watching.seen == functions.seen == []
    elif around == "defaults":
        dtype = torch.get_default_dtype()
        torch.set_default_dtype(torch.float16)
        try:
            with torch.device("meta"):
                assert chosen() == ("right", [])
            assert torch.get_default_dtype() == torch.float16
        finally:
            torch.set_default_dtype(dtype)
    else:
        context = {
            "no_grad": torch.no_grad(),
            "inference": torch.inference_mode(),
            "autocast": torch.autocast("cpu", torch.bfloat16),
        }[around]
        with context:
            state = torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")
            assert chosen() == ("right", [])
            assert (torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")) == state
    assert checks == ["right"]
    assert torch.equal(torch.random.get_rng_state(), before)


def test_nothing_is_checked_while_a_graph_is_made(family: Family, checks: list[str]) -> None:
    family("wrong_out", families.WRONG["wrong_out"][0])
    with FakeTensorMode():
        assert chosen() == ("wrong_out", [])
    with mock.patch.object(torch.compiler, "is_compiling", lambda: True):
        assert chosen() == ("wrong_out", [])
    assert checks == []
    assert chosen()[0] == OURS  # when it runs, it is asked again


def test_a_compiled_call_checks_when_it_runs(family: Family, checks: list[str]) -> None:
    family("wrong_lse", families.WRONG["wrong_lse"][0])
    torch.compiler.reset()
    q, k, v = (torch.randn(1, 19, 2, 8) for _ in range(3))

    @torch.compile(backend="aot_eager", fullgraph=True)
    def compiled(q: torch.Tensor) -> torch.Tensor:
        return usp.long_context_attention(q, k, v, causal=True)

    with pytest.warns(UserWarning, match="wrong_lse"):
        out = compiled(q)
    wanted = dense_attention(*(x.double() for x in (q, k, v)), causal=True)[0]
    assert (out - wanted).abs().max() < 1e-5
    assert "wrong_lse" in checks
    torch.compiler.reset()


def differing(first: tuple[str, ...], second: tuple[str, ...]) -> tuple[str, float]:
    """On a worker: attention and gradients on a mesh whose ranks prefer other kernels."""
    mesh = worker.mesh(1, 2)
    order = (first, second)[mesh.rank]
    generator = torch.Generator().manual_seed(0)
    q, k, v, dout = (
        torch.randn(1, 23, 2, 8, generator=generator, dtype=torch.float64) for _ in range(4)
    )
    leaves = [x.requires_grad_() for x in (q, k, v)]
    mine = [usp.shard_sequence(x, mesh, 1) for x in leaves]
    with mock.patch.dict(PREFERENCES, {cpu.kind(): Preference(order)}):
        took = select("auto", replace(TRAITS, dtype=torch.float64)).NAME
        out = usp.long_context_attention(*mine, mesh, causal=True)
        found = torch.autograd.grad(out, leaves, usp.shard_sequence(dout, mesh, 1))
    wanted = dense_attention(q, k, v, causal=True)[0]
    expected = torch.autograd.grad(wanted, leaves, dout)
    errors = [(out - usp.shard_sequence(wanted, mesh, 1)).abs().max()]
    for a, b in zip(found, expected, strict=True):
        a, b = (usp.shard_sequence(x, mesh, 1) for x in (a, b))
        errors.append((a - b).abs().max())
    return took, max(map(float, errors))


def test_ranks_may_take_other_kernels(pool: worker.Pool) -> None:
    """As where one machine's are wrong, or another CPU was measured."""
    results = pool.run(differing, (OURS,), ("reference",), ranks=2)
    assert [took for took, _ in results] == [OURS, "reference"]
    assert max(error for _, error in results) < 1e-9


def test_a_family_that_is_no_module_is_found_by_its_name() -> None:
    told = trust.subject(native, TRAITS).argument
    assert trust.check(told | {"family": "sdpa", "module": None}) is None


FIRST_CALL = """
import warnings
warnings.simplefilter("error")
import torch, usp
state = torch.random.get_rng_state()
q = torch.ones(1, 3, 2, 4)
assert torch.equal(usp.long_context_attention(q, q, q, causal=True), q)
assert torch.equal(torch.random.get_rng_state(), state)
"""


AT_ONCE = """
import importlib, sys
from pathlib import Path

import torch

backends = importlib.import_module("usp.backends")
from usp.planning.problem import Traits

backends.TABLE = (importlib.import_module("family_counted"), *backends.TABLE)
Path(sys.argv[1], f"ready{sys.argv[2]}").touch()
while len(list(Path(sys.argv[1]).glob("ready*"))) < 3:
    pass
traits = Traits("cpu", torch.float32, 16, 16, 0.25, architecture="cpu", device=torch.device("cpu"))
assert backends.select("counted", traits).NAME == "counted"
"""


@pytest.mark.long
def test_processes_that_ask_at_once_find_out_once(tmp_path: Path) -> None:
    """As the ranks of a node do."""
    counts = """
    def seen(block):
        time.sleep(0.1)
        with open(os.environ["COUNTED"], "a") as file:
            file.write(f"{os.getpid()}\\n")
        return block
    """
    families.write(tmp_path, "counted", counts)
    path = os.pathsep.join([str(tmp_path), *filter(None, sys.path)])
    environ = os.environ | {"PYTHONPATH": path, "COUNTED": str(tmp_path / "counted")}
    command = [sys.executable, "-c", AT_ONCE, str(tmp_path)]
    # in a folder without sources of usp, which -c would import
    ranks = [
        subprocess.Popen([*command, str(rank)], env=environ, cwd=tmp_path) for rank in range(3)
    ]
    assert [rank.wait(timeout=250) for rank in ranks] == [0, 0, 0]
    assert len(set((tmp_path / "counted").read_text().split())) == 1


def test_the_first_call_of_a_process_says_nothing(tmp_path: Path) -> None:
    environ = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-c", FIRST_CALL]
    for _ in range(2):
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=250, cwd=tmp_path, env=environ
        )
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.skipif(native.unavailable() is not None, reason="no compiled extension")
@pytest.mark.parametrize("op", ["attention_once", "attention_once_backward"])
def test_ops_that_make_their_results_are_checked_too(
    monkeypatch: pytest.MonkeyPatch, op: str
) -> None:
    right = getattr(native, op)
    assert _self_check.wrong_with(native, TRAITS, CPU) is None
    monkeypatch.setattr(native, op, lambda *args: [1.1 * x for x in right(*args)])
    found = _self_check.wrong_with(native, TRAITS, CPU)
    assert found is not None and found.endswith(f"({_self_check.ONE_BLOCK})")
