"""``usp bench kernels``, ``ring`` and ``comm``: what they compare is right, what is wrong is not
timed."""

from __future__ import annotations

import json
import re
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from pool import Pool

from usp import bench
from usp.backends import native
from usp.bench import attention, comm, documents, memory, model, ring, rivals, scaling
from usp.bench.attention import Problem
from usp.bench.case import Case
from usp.bench.document_lengths import LogNormal, Published, published_length
from usp.bench.exact import relative_error
from usp.bench.options import Run
from usp.bench.peers import PEERS, peer
from usp.bench.records import read
from usp.bench.world import World
from usp.testing import dense_attention

needs_kernels = pytest.mark.skipif(
    native.unavailable() is not None, reason="the compiled extension was not built"
)


def named(records: list[dict[str, Any]], what: str) -> set[str]:
    return {r["candidate"] for r in records if r["record"] == "time" and r["what"] == what}


@needs_kernels
def test_kernels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "kernels.json"
    argv = "--quick --dtypes fp32 --what forward backward both step exchange merge --json"
    assert bench.run("kernels", [*argv.split(), str(file)]) == 0
    report = read(file)
    assert report.header["program"] == "kernels" and report.header["arguments"]["quick"]
    assert report.of("roofline")[0]["flops_per_s"]["fp32"] > 0
    for what in ("forward", "backward", "both"):
        assert named(report.records, what) >= {"usp native", "usp sdpa", "sdpa", "matmul"}
    assert named(report.records, "ring step") >= {"usp native, no state", "cpu + fused merge"}
    for what in ("exchange, scatter", "exchange, gather", "merge"):
        assert named(report.records, what) >= {"usp native", "torch", "copy"}
    for record in report.of("time"):
        assert len(record["seconds"]) == 3 and record["p20"] <= record["median"] <= record["p80"]
        assert record["candidate"] in ("matmul", "copy") or record["of_roof"] > 0
    assert "roofline" not in capsys.readouterr().out


@needs_kernels
def test_a_wrong_kernel_is_not_timed_and_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = native.attention_once
    monkeypatch.setattr(native, "attention_once", lambda b: [x + 0.01 for x in right(b)])
    argv = "--quick --what forward --dtypes fp32 --candidates native sdpa --json"
    assert bench.run("kernels", argv.split()) == 1
    said = capsys.readouterr()
    records = [json.loads(line) for line in said.out.splitlines()]
    assert named(records, "forward") == {"usp sdpa", "sdpa", "matmul"}
    assert {r["candidate"] for r in records if r.get("wrong")} == {"usp native"}
    assert "WRONG: usp native, forward: out is off by" in said.err


MASKS = ["causal", "full", "window", "documents"]


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:flex_attention called without")
@pytest.mark.parametrize("mask", MASKS)
def test_flex_is_given_the_same_mask(mask: str) -> None:
    case = Case("fp32", 2, 48, 4, 2, 16, mask, window=11)
    flex = rivals.flex_attention(case, "cpu", compiled=False)
    assert Problem(case, "cpu", {}, {"flex": flex}).errors("flex", backward=False)["out"] < 2e-6


@pytest.mark.parametrize("mask", MASKS)
def test_every_rival_is_given_the_same_mask(mask: str) -> None:
    case = Case("fp32", 2, 48, 4, 2, 16, mask, window=11)
    own = attention.own(torch.float32, 16, "cpu")
    problem = Problem(case, "cpu", own, {"sdpa": rivals.sdpa(case, "cpu")})
    for name in problem.candidates:
        assert max(problem.errors(name).values()) < 2e-6, name
    assert set(rivals.rivals(case, "cpu", False)) == {"sdpa"}
    assert rivals.not_installed("cpu", False)["sdpa cudnn"] == "it is for GPUs"


PROGRAMS = {"ring": ring, "comm": comm, "model": model, "memory": memory, "scaling": scaling}


def told_by(program: str, argv: str) -> list[dict[str, Any]]:
    """On a worker: the records of a program whose processes are those of the pool."""
    args = PROGRAMS[program].arguments(argv.split())
    told: list[dict[str, Any]] = []

    def tell(news: Any) -> None:
        if not isinstance(news, str):
            told.extend(news)

    PROGRAMS[program].measure_cases(World(args, args.processes, 2, "cpu", ""), tell)
    return told


@needs_kernels
def test_ring(pool: Pool) -> None:
    argv = "--quick --seq-len 64 --heads 4 --kv-heads 4 --dtypes bf16 --peers plain"
    argv += " --masks full window --window 20 --seconds 0"
    records, *others = pool.run(told_by, "ring", argv, ranks=4)
    meshes = {"usp 2 x 2", "usp 1 x 4", "usp 4 x 1"}
    for which in ("forward", "both"):
        found = [r for r in records if r["what"] == which and r["case"]["mask"] == "full"]
        assert named(found, which) == meshes | {"usp, one process", "plain torch ring"}
        window = [r for r in records if r["what"] == which and r["case"]["mask"] == "window"]
        assert named(window, which) == meshes | {"usp, one process"}
        (out,) = [r for r in window if r["record"] == "not_timed"]
        assert out["why"] == "it knows no window" and not out["wrong"]
    # 16 tokens of K and V of 4 x 64 elements: 3 hops
    block = 2 * 16 * 4 * 64
    sent = {
        (r["what"], r["candidate"]): r["bytes_sent"]
        for r in records
        if r["record"] == "time" and r["case"]["mask"] == "full"
    }
    assert sent["forward", "usp 1 x 4"] == block * 3 * 2
    # back queries travel: q and dout, lse and delta in fp32, and dq in fp32, half as wide
    back = block * 2 + 2 * 16 * 4 * 4 + block // 2 * 4
    assert sent["both", "usp 1 x 4"] == 3 * (block * 2 + back)
    # the field's ring sends K and V home, too
    assert sent["both", "plain torch ring"] == block * (3 * 2 + 3 * 2 + 4 * 4)
    assert sent["both", "usp, one process"] == 0
    seconds = [r["seconds"] for r in records if r["record"] == "time"]
    assert all([r["seconds"] for r in o if r["record"] == "time"] == seconds for o in others)


def plain_errors(length: int, dtype: str, mask: str, size: int) -> dict[str, float]:
    """On a worker: of the plain ring, against the oracle; {} but on rank 0."""
    from usp.bench import world as worlds
    from usp.bench.ring_case import differentiated

    case, rank, plain = Case(dtype, 2, length, 3, 3, 16, mask), worlds.axis().rank, peer("plain")
    generator = torch.Generator().manual_seed(3)
    whole = [
        torch.randn(2, length, 3, 16, generator=generator).to(attention.DTYPES[dtype])
        for _ in range(4)
    ]
    index = plain.positions(case, rank, size)
    *leaves, dout = (x[:, index] for x in whole)
    leaves = [x.requires_grad_() for x in leaves]
    found = worlds.rows_of_all(index, differentiated(plain.make(case), leaves, dout, "both"))
    if rank > 0:
        return {}
    exact = [x.double().requires_grad_() for x in whole[:3]]
    out, _ = dense_attention(*exact, causal=case.is_causal)
    wanted = [out.detach(), *torch.autograd.grad(out, exact, whole[3].double())]
    pairs = zip(("out", "dq", "dk", "dv"), found, wanted, strict=True)
    return {name: relative_error(x, right) for name, x, right in pairs}


@pytest.mark.parametrize("mask", ["full", "causal"])
@pytest.mark.parametrize(("dtype", "allowed"), [("fp32", 3e-6), ("bf16", 2e-2)])
def test_the_plain_ring_is_exact_attention(
    pool: Pool, dtype: str, allowed: float, mask: str
) -> None:
    errors = pool.run(plain_errors, 2 * 4 * 13, dtype, mask, 4, ranks=4)[0]
    assert set(errors) == {"out", "dq", "dk", "dv"} and max(errors.values()) < allowed


@pytest.mark.library
@pytest.mark.parametrize("name", [name for name in PEERS if name != "plain"])
def test_peers_that_are_here_agree(name: str, pool: Pool) -> None:
    """Or are known not to: ring-attention-pytorch 0.5.20 returns wrong dK and dV."""
    why = peer(name).unavailable()
    if why is not None:
        pytest.skip(why)
    argv = f"--quick --mesh 1x2 --seq-len 64 --dtypes fp32 --peers {name}"
    records = pool.run(told_by, "ring", argv, ranks=2)[0]
    assert peer(name).NAME in named(records, "forward")
    assert name == "lucidrains" or peer(name).NAME in named(records, "both")


def test_peers_say_why_they_are_not_there_and_what_they_cannot() -> None:
    case = Case("fp32", 1, 100, 8, 2, 16, "documents")
    for name in PEERS:
        module = peer(name)
        said = module.unavailable()
        assert said is None or "pip install" in said
        assert module.reason_against(case, 4)
    assert "do not divide by 8" in peer("plain").reason_against(
        Case("fp32", 1, 100, 2, 2, 16, "full"), 4
    )


@pytest.mark.parametrize(
    ("program", "argv", "said"),
    [
        ("ring", "--mesh 2x2 1x3", r"--mesh has \[3, 4\] processes"),
        ("ring", "--mesh 2by2", "'2by2' is no ULYSSESxRING"),
        ("ring", "--heads 6 --kv-heads 4", "--heads 6 is not a multiple of --kv-heads 4"),
        ("model", "--batch 3", "--batch 3 does not divide by 2 data ranks"),
        ("model", "--mesh 8x1", "vit has 6 heads, a Ulysses degree of 8 needs as many"),
        ("model", "--mesh 1x0x2", r"'1x0x2' is no \[DPx\]ULYSSESxRING"),
        ("memory", "--layers 0", "argument --layers: must be 1 or more, got 0"),
        ("scaling", "--processes 1", "--processes must be 2 or more, got 1"),
        ("scaling", "--batch 4 --accumulate 2", "--batch 4 must divide by 8: data ranks times"),
        ("comm", "--processes 1", "--processes must be 2 or more, got 1"),
        ("comm", "--sizes 8", "--sizes must be 32 or more for 4 ranks, got 8"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    program: str, argv: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        bench.run(program, argv.split())
    assert end.value.code == 2 and re.search(said, capsys.readouterr().err)


def test_comm(pool: Pool) -> None:
    records = pool.run(told_by, "comm", "--quick --processes 3 --sizes 96 960", ranks=3)[0]
    assert {r["record"] for r in records} == {"time"}, records
    links = named(records, "link")
    assert links == {f"{a} to {b}" for a in range(3) for b in range(3) if a != b}
    sent = {(r["what"], r["case"]["bytes"]): r["sent"] for r in records}
    assert sent["all_gather", 960] == 2 * 960 and sent["all_to_all", 960] == 2 * 320
    assert sent["all_reduce", 96] == 4 * 32 and sent["shift", 96] == sent["link", 96] == 96
    fits = comm.fits(records)
    assert len(fits) == len(links) + 4 and all(r["values"]["latency_s"] >= 0 for r in fits)


def documents_records(argv: str) -> list[dict[str, Any]]:
    """On a worker: what rank 0 tells."""
    args = documents.arguments(argv.split())
    told: list[dict[str, Any]] = []
    documents.measure_batches(World(args, args.processes, 2, "cpu", ""), told.extend)
    return told


def test_documents(pool: Pool) -> None:
    argv = "--quick --processes 2 --tokens 400 --seeds 0 1 --dtypes fp32 --clock cpu"
    argv += " --lengths log-normal published"
    records = pool.run(documents_records, argv, ranks=2)[0]
    layouts = ("contiguous", "zigzag", "striped", "zigzag of documents")
    static = {f"usp static 1x2 {layout}" for layout in layouts} | {"usp static 2x1 contiguous"}
    ours = {"usp scheduled 1x2", "usp scheduled 2x1", "usp whole"}
    assert named(records, "layer, both") == static | ours
    first = records[0]
    assert sum(first["degrees"].values()) == first["case"]["documents"] > 3
    assert first["cost"]["token"] > 0 and first["tokens_per_s"] > 0
    times = [r for r in records if r["record"] == "time"]
    assert all(len(r["cpu_s_of_ranks"]) == 2 and min(r["cpu_s_of_ranks"]) > 0 for r in times)
    best = [r for r in records if r["candidate"] == "best static"]
    assert [r["case"]["seed"] for r in best] == [0, 1]
    ratios = [r["values"] for r in records if r["record"] == "value" and r["case"]["seed"] == 0]
    assert best[0]["values"]["wall"] == min(r["wall"] for r in ratios[1:])  # the first is "whole"
    run = SimpleNamespace(sink=SimpleNamespace(records=records))
    mean = {r["candidate"]: r["values"] for r in documents.means(cast(Run, run))}["best static"]
    product = best[0]["values"]["wall"] * best[1]["values"]["wall"]
    assert mean["wall"] == pytest.approx(product**0.5) and mean["bound"] > 0


def test_a_batch_of_documents_has_its_longest_and_no_longer_one() -> None:
    lengths = LogNormal(8192, 1024, 64.0, 1.25)
    cuts = [lengths.boundaries(seed) for seed in range(5)]
    assert len(set(cuts)) == 5 and cuts[0] == lengths.boundaries(0)
    for each in cuts:
        assert each[0] == 0 and each[-1] == 8192
        assert max(b - a for a, b in pairwise(each)) == 1024
        assert min(b - a for a, b in pairwise(each)) >= 1


def test_published_documents_are_as_long_as_those_of_their_source() -> None:
    each = [published_length((i + 0.5) / 10_000) for i in range(10_000)]
    assert sum(each) / 10_000 == pytest.approx(3962, rel=0.03)  # of 99,519 documents
    assert sum(n for n in each if n <= 8192) / sum(each) == pytest.approx(0.776, abs=0.01)
    long, short = Published(131_072).boundaries(0), Published(8192).boundaries(0)
    assert short[-1] == 8192 and len(short) == pytest.approx(len(long), abs=2)
    assert short == Published(8192).boundaries(0) != Published(8192).boundaries(1)


def test_a_line_through_times_finds_what_made_them() -> None:
    points = [(float(n), 1e-5 + n / 2e9) for n in (1e3, 1e5, 1e7)]
    latency, each = comm.line_through(points)
    assert latency == pytest.approx(1e-5) and 1 / each == pytest.approx(2e9)
    assert comm.line_through([(10.0, 2e-5), (100.0, 1e-5)])[1] == 0.0  # noise is no speed


@pytest.mark.long
def test_model(pool: Pool) -> None:
    argv = "--quick --models llm --seq-len 24 --mesh 1x2 2x1x1"
    records = pool.run(told_by, "model", argv + " --dtypes fp32", ranks=2)[0]
    assert {r["record"] for r in records} == {"time"}, records
    everyone = {"torch, one process", "usp, one process", "usp 1 x 2", "usp dp 2, 1 x 1"}
    assert named(records, "step") == everyone
    assert all(r["errors"]["gradients"] < 1e-6 for r in records)


@pytest.mark.long
def test_memory_is_the_planners_formula(pool: Pool) -> None:
    """Of a ViT, whose loss holds no logits: within a fifth, as its messages are not in it."""
    argv = "--seq-len 512 --layers 2 --models vit --mesh 1x1 2x1 1x2 --peers plain"
    records = pool.run(told_by, "memory", argv + " --dtypes fp32", ranks=2)[0]
    steps = {r["candidate"]: r["values"] for r in records if r["what"] == "step"}
    assert set(steps) == {
        *("torch, one process", "usp, one process", "usp 1 x 1", "usp 2 x 1", "usp 1 x 2")
    }
    assert steps["usp 1 x 1"]["of_formula"] == pytest.approx(1.0, abs=0.05)
    assert all(0.9 < values["of_formula"] < 1.25 for values in steps.values()), steps
    attention = {r["candidate"]: r["values"] for r in records if r["what"] == "attention"}
    assert 0 < attention["usp 1 x 2"]["both"] < attention["plain torch ring"]["both"]


def test_scaling(pool: Pool) -> None:
    argv = "--quick --seq-len 16 --processes 2 --models vit --accumulate 2"
    records = pool.run(told_by, "scaling", argv + " --dtypes fp32", ranks=2)[0]
    assert {r["record"] for r in records} == {"time"}, records
    for kind in ("strong", "weak"):
        found = {r["candidate"]: r for r in records if r["what"] == kind}
        assert set(found) == {"usp 1 x 1", "usp 1 x 2", "usp dp 2, 1 x 1"}
        assert found["usp 1 x 1"]["efficiency"] == pytest.approx(1.0)
        sizes = {n: (r["processes"], r["length"], r["samples"]) for n, r in found.items()}
        weak = kind == "weak"
        assert sizes["usp 1 x 2"] == (2, 32 if weak else 16, 4)
        assert sizes["usp dp 2, 1 x 1"] == (2, 16, 8 if weak else 4)


@needs_kernels
@pytest.mark.long
def test_ring_in_processes_of_its_own(tmp_path: Path) -> None:
    file = tmp_path / "ring.json"
    argv = "--quick --mesh 1x2 --dtypes fp32 --masks causal --passes both --peers plain --json"
    assert bench.run("ring", [*argv.split(), str(file)]) == 0
    assert len(read(file).of("time")) == 3
