"""The benchmark programs: what they compare usp with is right, and each runs and refuses."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import pytest
import torch
from programs import module, program

from usp.backends import native
from usp.bench.records import read
from usp.bench.timing import Times

needs_kernels = pytest.mark.skipif(
    native.unavailable() is not None, reason="the compiled extension was not built"
)


@needs_kernels
@pytest.mark.long
def test_cpu_sweep(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    file, picture = tmp_path / "sweep.json", tmp_path / "sweep.png"
    arguments = "--lengths 5 72 66 --head-dims 17 --rounds 3 --seconds 0.1 --dtypes fp32"
    done = program("cpu_sweep", *arguments.split(), "--json", str(file), "--plot", str(picture))
    points = read(file).of("points")
    shapes = {(p["length"], p["head_dim"]) for p in points}
    assert shapes == {(5, 64), (71, 64), (512, 17)}
    slow = [p for p in points if p["usp_over_sdpa"] > 1.1]
    assert read(file).of("left_out") == []
    assert done.returncode == len(slow), done.stderr
    assert f"{len(slow)} of {len(points)} points" in done.stdout
    assert picture.stat().st_size > 1000


@needs_kernels
@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
@pytest.mark.long
def test_cpu_gemm(tmp_path: Path) -> None:
    file = tmp_path / "gemm.json"
    arguments = "--head-dims 40 --rounds 3 --seconds 0.1 --optimize=-O0"
    done = program("cpu_gemm", *arguments.split(), "--json", str(file))
    assert done.returncode == 0, done.stderr
    found = read(file).of("products")
    names = ("scores", "values", "key gradients")
    assert [(p["dtype"], p["product"]) for p in found] == [
        (dtype, name) for dtype in ("fp32", "bf16") for name in names
    ]
    assert all(p["gflops"]["usp"] > 0 for p in found)


def test_a_wrong_product_is_not_timed() -> None:
    a, b = torch.randn(5, 7), torch.randn(7, 3)
    gemm = module("cpu_gemm")
    gemm.check("usp", a @ b, a, b)
    with pytest.raises(SystemExit, match=r"usp is off by .* not timed"):
        gemm.check("usp", (a @ b).roll(1), a, b)


@needs_kernels
def test_cpu_masks() -> None:
    benchmark = module("cpu_masks")
    args = argparse.Namespace(heads=1, head_dim=16, rounds=3, seconds=0.1, flex=False)
    cases = {"window of 32, 4 registers": "bf16", "neighbourhood 13 x 13, shifted": "fp32"}
    ends = {"": ("usp", "everything"), "_both": ("both", "everything, both")}
    for name, dtype in cases.items():
        mask = benchmark.all_masks(256)[name]
        found = benchmark.measure(name, mask, 256, dtype, args)
        assert found["dtype"] == dtype
        assert found["bands"] == (3 if "window" in name else 25)
        assert found["share_of_pairs"] == mask.dense(256, 256).double().mean()
        assert found["repeats"] == round(1 / found["share_of_pairs"]) > 1
        pairs = found["repeats"] * found["share_of_pairs"]
        calls, kernels = Times(found["seconds"]), Times(found["seconds_in_kernels"])
        for end, (over, under) in ends.items():
            assert found[f"of_its_share{end}"] == pytest.approx(calls.ratio(over, under) / pairs)
            share = found[f"of_its_share_in_kernels{end}"]
            assert share == pytest.approx(kernels.ratio(over, under) / pairs)
            for name in (over, under):
                inside = zip(kernels.seconds[name], calls.seconds[name], strict=True)
                assert all(0 < part < whole for part, whole in inside)
        assert set(found["ratios"]) == {"sdpa"} and len(found["seconds"]["usp"]) == 3
    wrong = torch.zeros(1, 256, 1, 16)
    for dtype, allowed in ((torch.float32, "1e-05"), (torch.bfloat16, "1e-02")):
        given = [torch.randn(1, 256, 1, 16).to(dtype)] * 3
        with pytest.raises(SystemExit, match=f"allowed {allowed}: not timed"):
            benchmark.check("wrong", wrong, *given, mask.dense(256, 256))


def test_cpu_masks_knows_its_masks(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        "sys.argv", ["cpu_masks", "--lengths", "256", "--masks", "documents", "none"]
    )
    with pytest.raises(SystemExit) as ended:
        module("cpu_masks").main()
    assert ended.value.code == 2
    assert "no mask 'none' at [256] tokens: there are causal, " in capsys.readouterr().err


@needs_kernels
@pytest.mark.long
def test_cpu_documents(tmp_path: Path) -> None:
    file = tmp_path / "documents.json"
    sizes = "--seq-len 192 --mean 32 --heads 2 --head-dim 8 --layers 1 --rounds 3 --seconds 0.1"
    done = program("cpu_documents", *sizes.split(), "--json", str(file))
    assert done.returncode == 0, done.stderr
    for found in read(file).of("ranks"):
        assert found["documents"] == 6 and found["error"] < 1e-4
        assert len(found["planning_seconds"]) == 3 and 0 < found["planning_share"] < 1
    with pytest.raises(SystemExit, match=r"table: off by 1.0e\+00, .* not timed"):
        module("cpu_documents").error("table", torch.zeros(3), torch.ones(3))


@needs_kernels
def test_cpu_vit() -> None:
    benchmark = module("cpu_vit")
    args = argparse.Namespace(width=32, heads=2, layers=1, batch=2, rounds=3, seconds=0.1)
    for dtype in benchmark.DTYPES:
        found = benchmark.measure(17, dtype, args)
        assert found["error"] <= benchmark.ALLOWED[dtype]
        assert all(found[phase]["ratio"] > 0 for phase in ("eval", "training"))
    whole, other = benchmark.ViT(32, 2, 1), benchmark.ViT(32, 2, 1)
    for model in (whole, other):
        benchmark.step(model, torch.ones(1, 5, 48))
    with pytest.raises(SystemExit, match=r"17 tokens: gradients are off .* not timed"):
        benchmark.check("17 tokens", whole, other, "fp32")


@pytest.mark.long
def test_tiles(tmp_path: Path) -> None:
    benchmark, report = module("tiles"), {"ways": []}
    sizes = {"tokens": 64, "width": 8, "inner": 32, "classes": 64, "dtype": "fp32", "device": "cpu"}
    how = {"tiles": [1, 8], "rounds": 3, "seconds": 0.0, "clock": "wall"}
    for subject in benchmark.SUBJECTS:
        found = benchmark.measure(subject, argparse.Namespace(**sizes, **how))
        assert [way["way"] for way in found] == ["plain", "1", "8"]
        assert found[2]["peak_bytes"] < found[1]["peak_bytes"] and found[2]["peak_over_plain"] < 0.6
        assert all(way["time_over_plain"] > 0 and len(way["seconds"]) == 3 for way in found)
        report["ways"] += found
    with pytest.raises(SystemExit, match=r"loss, 8: gradients are off by 1.0e-03, .* not timed"):
        benchmark.check("loss, 8", 1e-3, 1e-6)
    pytest.importorskip("matplotlib")
    benchmark.draw(report | {"sizes": sizes}, tmp_path / "tiles.png")
    assert (tmp_path / "tiles.png").stat().st_size > 1000
