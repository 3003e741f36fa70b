"""The benchmark programs: what they compare usp with is right, and each runs and refuses."""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from pool import Pool, mesh
from programs import module, program

from usp.backends import native
from usp.testing import dense_attention

needs_kernels = pytest.mark.skipif(
    native.unavailable() is not None, reason="the compiled extension was not built"
)
RING, TOLERANCE = 4, {torch.float32: 3e-6, torch.bfloat16: 2e-2}


def inputs(length: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """q, k, v, dout (B, S, H, D)."""
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(2, length, 3, 16, generator=generator).to(dtype) for _ in range(4)]


def exact(tensors: list[torch.Tensor], causal: bool) -> list[torch.Tensor]:
    leaves = [x.double().requires_grad_() for x in tensors[:3]]
    out, _ = dense_attention(*leaves, causal=causal)
    return [out.detach(), *torch.autograd.grad(out, leaves, tensors[3].double())]


def plain_ring(length: int, dtype: torch.dtype, causal: bool) -> list[torch.Tensor]:
    """On one rank: out, dq, dk, dv of its zigzag chunks, and which tokens these are."""
    import torch.distributed as dist

    ring = module("_plain_ring")
    index = torch.arange(length).view(2 * RING, -1)
    index = index[[dist.get_rank(), 2 * RING - 1 - dist.get_rank()]].flatten()
    *leaves, dout = (x[:, index].transpose(1, 2).contiguous() for x in inputs(length, dtype))
    leaves = [x.requires_grad_() for x in leaves]
    out = ring.plain_ring_attention(*leaves, causal)
    found = [out.detach(), *torch.autograd.grad(out, leaves, dout)]
    return [index, *(x.transpose(1, 2) for x in found)]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_the_plain_ring_is_exact_attention(pool: Pool, dtype: torch.dtype, causal: bool) -> None:
    length = 2 * RING * 13
    parts = pool.run(plain_ring, length, dtype, causal, ranks=RING)
    order = torch.cat([part[0] for part in parts]).argsort()
    expected = exact(inputs(length, dtype), causal)
    for tensor, reference in enumerate(expected, 1):
        whole = torch.cat([part[tensor] for part in parts], 1)[:, order]
        error = (whole.double() - reference).norm() / reference.norm()
        assert error <= TOLERANCE[dtype]


@pytest.mark.parametrize("causal", [False, True])
def test_sampled_rows_are_the_oracles(causal: bool) -> None:
    length, tensors = 101, inputs(101, torch.float32)
    sampled = module("_exact_rows")
    at = sampled.sampled_positions(length, 20)
    assert at[0] == 0 and at[-1] == length - 1 and len(at) >= 20
    *leaves, dout = (x.transpose(1, 2) for x in tensors)
    found = sampled.exact_rows(leaves, dout, at, causal)
    for rows, reference in zip(found, exact(tensors, causal), strict=True):
        torch.testing.assert_close(rows.transpose(1, 2), reference[:, at], rtol=1e-9, atol=1e-11)


def test_turns_are_taken_in_both_orders_and_paired_by_round() -> None:
    order: list[str] = []
    seconds = iter([1.0, 2.0, 4.0, 1.0, 3.0, 3.0])
    times = module("_measure").take_turns(
        {"a": lambda: order.append("a"), "b": lambda: order.append("b")},
        rounds=3,
        budget=1e9,
        seconds=lambda run: (run(), next(seconds))[1],
    )
    assert "".join(order) == "ab" + "ab" + "ba" + "ab"  # the first two do not count
    assert times.seconds == {"a": [1.0, 1.0, 3.0], "b": [2.0, 4.0, 3.0]}
    assert times.ratio("b", "a") == 2.0


@needs_kernels
@pytest.mark.long
def test_cpu_sweep(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    file, picture = tmp_path / "sweep.json", tmp_path / "sweep.png"
    arguments = "--lengths 5 72 66 --head-dims 17 --rounds 3 --seconds 0.1 --dtypes fp32"
    done = program("cpu_sweep", *arguments.split(), "--json", str(file), "--plot", str(picture))
    report = json.loads(file.read_text())
    shapes = {(p["length"], p["head_dim"]) for p in report["points"]}
    assert shapes == {(5, 64), (71, 64), (512, 17)}
    slow = [p for p in report["points"] if p["usp_over_sdpa"] > 1.1]
    assert report["not_timed"] == []
    assert done.returncode == len(slow), done.stderr
    assert f"{len(slow)} of {len(report['points'])} points" in done.stdout
    assert picture.stat().st_size > 1000


def ring_results(*argv: str) -> list[dict[str, Any]]:
    program = module("cpu_ring")
    args = program.parse(argv)
    return program.measure(args, {name: mesh(*program.MESHES[name]) for name in args.meshes})


@needs_kernels
def test_cpu_ring(pool: Pool) -> None:
    arguments = "--seq-len 64 --heads 4 --rounds 3 --dtypes bf16 --masks full"
    results, *others = pool.run(ring_results, *arguments.split(), ranks=4)
    assert [result["pass"] for result in results] == ["forward", "both"]
    for result in results:
        assert set(result["ratios"]) == {"2 x 2", "1 x 4", "4 x 1"}
        assert all(len(taken) == 3 for taken in result["seconds"].values())
        assert all(set(found) == {"out", "dq", "dk", "dv"} for found in result["errors"].values())
    # 16 tokens of K and V of 4 x 64 elements: 3 hops in each pass, and of fp32 gradients
    block = 2 * 16 * 4 * 64
    assert results[0]["bytes_sent"]["1 x 4"] == block * 3 * 2
    # back queries travel: q and dout, lse and delta in fp32, and dq in fp32, half as wide
    back = block * 2 + 2 * 16 * 4 * 4 + block // 2 * 4
    assert results[1]["bytes_sent"]["1 x 4"] == 3 * (block * 2 + back)
    assert all(theirs[1]["seconds"] == results[1]["seconds"] for theirs in others)


@needs_kernels
@pytest.mark.long
def test_cpu_ring_draws_a_timeline(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    file, picture = tmp_path / "ring.json", tmp_path / "timeline.png"
    done = program("cpu_ring", "--seq-len", "256", "--json", str(file), "--trace", str(picture))
    assert done.returncode == 0, done.stderr
    trace = json.loads(file.read_text())["trace"]
    assert 0 < trace["hidden_share"] < 1
    for row in trace["milliseconds"]:
        assert 0 < row["hidden"] <= row["computing"] < row["pass"]
        assert row["hidden"] + row["waiting"] <= row["in_flight"] * 1.0001 < 1.0002 * row["pass"]
    assert picture.stat().st_size > 1000


def test_the_hidden_share_counts_each_second_once() -> None:
    timeline = module("_timeline")
    one, two = timeline.Timeline(), timeline.Timeline()
    one.intervals["attention_forward"] = [(1.0, 4.0)]
    one.intervals["attention_backward"] = [(5.0, 6.0)]
    one.intervals["blocks"] = [(0.0, 2.0), (2.0, 3.0)]
    one.intervals["gradients"] = [(2.5, 5.5)]
    two.intervals["blocks"] = [(0.0, 4.5)]  # nothing computed meanwhile
    assert one.in_flight == [(0.0, 5.5)] and one.computing == [(1.0, 4.0), (5.0, 6.0)]
    assert timeline.common(one.in_flight, one.computing) == 3.5
    assert timeline.hidden_share([one, two]) == 3.5 / (5.5 + 4.5)


def test_cpu_ring_refuses_what_it_cannot_cut(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        module("cpu_ring").parse(["--seq-len", "100"])
    assert "--seq-len must be a multiple of 8, got 100" in capsys.readouterr().err


@needs_kernels
@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
@pytest.mark.long
def test_cpu_gemm(tmp_path: Path) -> None:
    file = tmp_path / "gemm.json"
    arguments = "--head-dims 40 --rounds 3 --seconds 0.1 --optimize=-O0"
    done = program("cpu_gemm", *arguments.split(), "--json", str(file))
    assert done.returncode == 0, done.stderr
    found = json.loads(file.read_text())["products"]
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


def test_a_wrong_ring_is_not_timed() -> None:
    ring = module("cpu_ring")
    case = ring.RingCase("fp32", 64, 1024, "full", 8)
    ring.check(case, {"1 x 4": {"out": 1e-7}})
    for error in (1e-3, float("nan")):
        with pytest.raises(ValueError, match=r"dk of 1 x 4 is off by .* not timed"):
            ring.check(case, {"1 x 4": {"out": 1e-7, "dk": error}})


def test_zero_gradients_are_judged_by_what_is_left_of_them() -> None:
    case = module("_attention_case")
    one, nothing = torch.full((4,), 1e-7), torch.full((4,), 1e-17, dtype=torch.float64)
    assert case.relative_error(one, nothing) == pytest.approx(1e-7)
    assert case.relative_error(2 * one, 1e-7 * torch.ones(4).double()) == pytest.approx(1.0)


@needs_kernels
def test_cpu_masks() -> None:
    benchmark = module("cpu_masks")
    args = argparse.Namespace(heads=1, head_dim=16, rounds=3, seconds=0.1, flex=False)
    for name in ("window of 32, 4 registers", "neighbourhood 13 x 13, shifted"):
        mask = benchmark.all_masks(256)[name]
        found = benchmark.measure(name, mask, 256, args)
        assert found["bands"] == (3 if "window" in name else 25)
        assert found["share_of_pairs"] == mask.dense(256, 256).double().mean()
        assert set(found["ratios"]) == {"sdpa"} and len(found["seconds"]["usp"]) == 3
    wrong = torch.zeros(1, 256, 1, 16)
    with pytest.raises(SystemExit, match="not timed"):
        benchmark.check("wrong", wrong, *[torch.randn(1, 256, 1, 16)] * 3, mask.dense(256, 256))


@needs_kernels
@pytest.mark.long
def test_cpu_documents(tmp_path: Path) -> None:
    file = tmp_path / "documents.json"
    sizes = "--seq-len 192 --mean 32 --heads 2 --head-dim 8 --layers 1 --rounds 3 --seconds 0.1"
    done = program("cpu_documents", *sizes.split(), "--json", str(file))
    assert done.returncode == 0, done.stderr
    for found in json.loads(file.read_text())["ranks"]:
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
