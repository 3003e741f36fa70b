"""Why a library cannot take a problem, or is not there: said in words, and nothing is imported."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from importlib import metadata
from types import ModuleType
from typing import Any

import pytest
import stand_in_ops
import torch
from library_cases import label, on_cpu

import usp
from usp.backends import TABLE, in_order, select
from usp.backends.library import LIBRARIES, flash2, flash3, flash4, trusted
from usp.backends.library.backend import LibraryBackend
from usp.backends.library.call import Missing, is_there, version_of
from usp.backends.library.record import Record
from usp.backends.library.table import ROWS, TRUSTED
from usp.planning.problem import Traits

PLAIN = Traits("cpu", torch.bfloat16, 64, 64, 0.125)
ON_GPU = replace(PLAIN, device_type="cuda", architecture="sm_90")


@pytest.mark.parametrize("record", ROWS, ids=label)
def test_what_no_library_takes_is_refused_with_the_reason(record: Record) -> None:
    backend = on_cpu(record)
    assert backend.reasons_against(PLAIN) == ()
    for change, said in (
        ({"bias": True}, "no bias or key padding mask"),
        ({"alibi": True}, "no ALiBi"),
        ({"dropout": True}, "dropout draws numbers of its own"),
        ({"softmax_scale": -0.1}, "positive softmax_scale, not -0.1"),
        ({"dtype": torch.float64}, "q is torch.float64"),
        ({"head_dim": 60, "value_head_dim": 60}, "multiple of 8 up to .*, and one is 60"),
        ({"head_dim": 264, "value_head_dim": 264}, "and one is 264"),
    ):
        reasons = backend.reasons_against(replace(PLAIN, **change))
        assert len(reasons) == 1, (change, reasons)
        with pytest.raises(AssertionError, match=said):
            raise AssertionError(reasons[0])


@pytest.mark.parametrize("record", ROWS, ids=label)
def test_what_only_some_take(record: Record) -> None:
    backend = on_cpu(record)
    for trait, taken in (("softcap", record.softcap), ("returns_lse", record.dlse)):
        assert (backend.reasons_against(replace(PLAIN, **{trait: True})) == ()) is taken
    fp32 = backend.reasons_against(replace(PLAIN, dtype=torch.float32))
    assert (fp32 == ()) is (record.name == "aten_efficient")
    other = backend.reasons_against(replace(PLAIN, value_head_dim=32))
    assert (other == ()) is (record.name in ("aten_cudnn", "aten_efficient"))


def test_devices_and_head_dims_by_architecture() -> None:
    of = {record.title: record for record in ROWS}
    four, three, two = (of[f"flash-attn {n}"] for n in (4, 3, 2))

    def said(record: Record, architecture: str, d: int = 64, dv: int | None = None) -> str:
        traits = replace(PLAIN, architecture=architecture, head_dim=d, value_head_dim=dv or d)
        return "; ".join(record.reasons_against(traits))

    assert "made for sm_90, sm_100, sm_103, and this is sm_80" in said(four, "sm_80")
    assert said(four, "sm_90", 256) == said(four, "sm_100", 128) == said(four, "", 64) == ""
    assert said(four, "sm_100", 192, 128) == ""
    assert "up to 128, and one is 256" in said(four, "sm_100", 256)
    assert "must be equal" in said(four, "sm_90", 192, 128)
    assert said(three, "sm_90") == "" and "this is sm_100" in said(three, "sm_100")
    assert said(two, "sm_80") == said(two, "sm_120") == "" and "this is sm_75" in said(two, "sm_75")
    assert said(of["aiter (Triton)"], "gfx942") == ""
    assert "this is gfx906" in said(of["aiter (Triton)"], "gfx906")


def test_libraries_never_take_tensors_on_a_cpu_and_auto_is_as_it_was() -> None:
    for backend in LIBRARIES:
        (reason,) = backend.reasons_against(replace(PLAIN, architecture="cpu"))
        assert reason == "its kernels run on a GPU, the tensors are on cpu"
    names = [backend.NAME for backend in TABLE]
    assert names[:4] == ["triton", "native", "sdpa", "reference"]
    assert [b.NAME for b in in_order("cpu")][:2] == ["native", "sdpa"]
    q = torch.zeros(1, 3, 2, 8)
    with pytest.raises(NotImplementedError, match="flash_attn: its kernels run on a GPU"):
        usp.long_context_attention(q, q, q, backend="flash_attn")


def test_every_library_has_a_place_in_the_order_of_trust() -> None:
    names = {backend.NAME for backend in LIBRARIES}
    assert set().union(*TRUSTED.values()) == names
    for architecture in ("sm_90", "sm_100", "sm_120"):
        assert trusted(architecture)[:3] == ("flash_attn_4", "flash_attn_3", "aten_cudnn")
    assert trusted("sm_86")[0] == trusted("gfx942")[0] == "flash_attn"
    assert trusted("cpu") == ()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_each_says_what_is_missing() -> None:
    told = usp.backends()
    for backend in LIBRARIES:
        reason = told[backend.NAME]
        assert "is not installed: " in reason or "torch sees no GPU" in reason, reason
        assert backend.reasons_against(ON_GPU) == (reason,)
    with pytest.raises(NotImplementedError, match="aten_flash: torch sees no GPU"):
        select("aten_flash", ON_GPU)


def test_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = {"flash-attn": "2.6.3", "flash-attn-4": "4.0.0b36+cu13"}

    def version(name: str) -> str:
        if name not in installed:
            raise metadata.PackageNotFoundError(name)
        return installed[name]

    monkeypatch.setattr(metadata, "version", version)
    assert version_of("flash-attn-4") == (4, 0, 0)
    assert version_of("other") is None
    assert flash2.missing() is None
    assert "is 2.6.3, and from 2.7 on" in str(flash2.missing_on_amd())
    installed["flash-attn"] = "2.5.9"
    assert "is 2.5.9, and from 2.6 on" in str(flash2.missing())
    installed["flash-attn"] = "2.8.3.post2"
    assert version_of("flash-attn") == (2, 8, 3) and flash2.missing() is None
    assert flash4.missing() is None
    # flash-attn 4 alone makes a package flash_attn, too
    del installed["flash-attn"]
    assert "flash-attn is not installed: pip install" in str(flash2.missing())


@pytest.mark.parametrize("error", [ImportError("no symbol"), RuntimeError(""), KeyError("arch")])
def test_whatever_an_import_raises_is_a_reason(error: Exception) -> None:
    asked = []

    def load() -> Any:
        asked.append(1)
        raise error

    backend = on_cpu(ROWS[0], load=load)
    said = str(error) or "RuntimeError"
    assert backend.unavailable() == f"flash-attn 2: {said}"
    assert backend.reasons_against(PLAIN) == (f"flash-attn 2: {said}",)
    assert len(asked) == 1


def test_the_first_row_that_is_there_counts() -> None:
    def absent() -> Any:
        raise Missing("not here")

    def row(record: Record) -> Record:
        (found,) = on_cpu(record).records
        return found

    rows = replace(row(ROWS[0]), load=absent), row(ROWS[2])
    found = LibraryBackend(rows).found()
    assert not isinstance(found, str) and found[0] is rows[1]
    both = LibraryBackend((rows[0], replace(rows[1], load=absent)))
    assert both.unavailable() == "flash-attn 2: not here; flash-attn 2 (Triton): not here"


def test_a_flash_attn_that_lacks_a_function_says_which(monkeypatch: pytest.MonkeyPatch) -> None:
    package, interface = ModuleType("flash_attn"), ModuleType("flash_attn.flash_attn_interface")
    package.flash_attn_interface = interface  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    monkeypatch.setitem(sys.modules, "flash_attn.flash_attn_interface", interface)
    with pytest.raises(Missing, match="flash_attn_interface has no _flash_attn_forward, "):
        flash2.interface()
    monkeypatch.setitem(sys.modules, "flash_attn_2_cuda", None)
    assert not is_there("flash_attn_2_cuda")
    with pytest.raises(Missing, match="without its compiled extension"):
        flash2.load_cuda()


def test_a_flash_attn_3_without_defaults_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flash_attn_interface", ModuleType("flash_attn_interface"))
    stand_in_ops.define_flash3()
    assert isinstance(flash3.load(), flash3.Flash3)
    early = torch.library.Library("flash_attn_3_early", "DEF")
    early.define("fwd(Tensor q, Tensor k, Tensor v, Tensor? k_new, bool is_causal) -> Tensor")
    monkeypatch.setattr(torch.ops, "flash_attn_3", torch.ops.flash_attn_3_early)
    with pytest.raises(Missing, match="fwd wants k_new, is_causal, which have defaults since"):
        flash3.load()
    monkeypatch.setattr(torch.ops, "flash_attn_3", torch.ops.flash_attn_3_none)
    with pytest.raises(Missing, match="brought no op flash_attn_3::fwd"):
        flash3.load()


def test_nothing_is_imported_before_it_is_asked_for() -> None:
    code = (
        "import sys, torch, usp\n"
        "usp.backends()\n"
        "names = ('flash_attn', 'flash_attn_interface', 'aiter', 'kernels', 'huggingface_hub')\n"
        "print([name for name in names if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path[:0] = {sys.path!r}\n{code}"],
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert done.stdout.strip() == "[]", done.stderr
