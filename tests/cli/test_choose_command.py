"""``usp plan --model``: the ranking, the scaling, the code to paste, the machine at hand."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from pool import Pool
from torch import nn

from usp import cli, masks
from usp.cli import calibrate, choose
from usp.cli.paste import code_of
from usp.planning.choose import here
from usp.planning.choose.cluster import CLUSTERS
from usp.planning.choose.job import Choice, Job, Precision
from usp.planning.choose.model import MODELS, Model
from usp.planning.choose.search import predict, search
from usp.planning.choose.ways import meshes
from usp.planning.cost import Bias, Place, Shape, bytes_sent
from usp.planning.layout import DocumentZigzag

PLAN = "plan --model llama3-8b --seq-len 131072 --cluster h100 --devices 64 --batch 8"


def run(capsys: pytest.CaptureFixture[str], argv: str) -> tuple[int, str, str]:
    code = cli.main(argv.split())
    said = capsys.readouterr()
    return code, said.out, said.err


def test_the_ranking_is_by_time_and_names_bytes_and_limits(
    capsys: pytest.CaptureFixture[str],
) -> None:
    code, out, _ = run(capsys, f"{PLAN} --top 5 --json")
    assert code == 0
    found = json.loads(out)
    choices = found["choices"]
    assert len(choices) == 5 < found["meshes"]
    assert [c["seconds"] for c in choices] == sorted(c["seconds"] for c in choices)
    for choice in choices:
        degrees = [choice[name] for name in ("dp", "ring", "ulysses", "tp", "pp")]
        assert torch.tensor(degrees).prod() == 64
        assert sum(choice["seconds_of"].values()) == pytest.approx(choice["seconds"])
        assert sum(choice["bytes_of"].values()) == pytest.approx(choice["bytes"])
        assert choice["bytes"] <= 80 * 2**30 and choice["limit"] and choice["sent"]["total"] > 0
    code, out, _ = run(capsys, f"{PLAN} --top 2")
    assert code == 0
    for said in ("8.03e9 weights", "meshes fit", "attention", "GiB", "usp.LongContextAttention("):
        assert said in out


def test_only_some_meshes_and_masks(capsys: pytest.CaptureFixture[str]) -> None:
    found = json.loads(run(capsys, f"{PLAN} --only tp=1,pp=1,ring=8 --json")[1])
    assert {(c["tp"], c["pp"], c["ring"]) for c in found["choices"]} == {(1, 1, 8)}
    window = json.loads(run(capsys, f"{PLAN} --only tp=1,pp=1,ring=8 --window 4096 none --json")[1])
    assert "causal" in window["job"]["mask"] and "window" in window["job"]["mask"]
    less = (w["choices"][0]["seconds_of"]["attention"] for w in (window, found))
    assert next(less) < next(less) / 10
    packed = "plan --model vit-l --seq-len 4096 --cluster a800 --devices 4 --causal --cu-seqlens"
    argv = f"{packed} 0,1000,4096 --only ring=4,layout=document-zigzag"
    assert "layout=usp.DocumentZigzag(cu_seqlens=(0, 1000, 4096))" in run(capsys, argv)[1]
    choice = json.loads(run(capsys, f"{argv} --json")[1])["choices"][0]
    assert (choice["ring"], choice["layout"]) == (4, "document-zigzag")
    fp8 = json.loads(run(capsys, f"{PLAN} --fp8 --forward --json")[1])
    assert fp8["choices"][0]["seconds"] < found["choices"][0]["seconds"] / 3


def test_planning_takes_one_thread(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of small operations, which more would slow down; and leaves as many as there were."""
    threads = []
    before = torch.get_num_threads()
    monkeypatch.setattr(choose, "rank", lambda *_: threads.append(torch.get_num_threads()) or 1 / 0)
    try:
        torch.set_num_threads(3)
        with pytest.raises(ZeroDivisionError):
            run(capsys, PLAN)
        assert threads == [1] and torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_ones_own_model(capsys: pytest.CaptureFixture[str]) -> None:
    numbers = "layers=4,hidden=64,heads=4,mlp=128"
    argv = f"plan --model {numbers} --seq-len 4096 --cluster laptop --dtype float32 --json"
    model = json.loads(run(capsys, argv)[1])["job"]["model"]
    assert (model["kv_heads"], model["causal"], model["gated"]) == (4, False, False)


def test_simulated_scaling(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "scaling.png"
    argv = "plan --model vit-10b --seq-len 65536 --cluster frontier --devices 64 --batch 8"
    argv += " --only tp=1,pp=1 --simulate 256"
    found = json.loads(run(capsys, f"{argv} --json")[1])["scaling"]
    weak, strong = found["weak"], found["strong"]
    assert [point["devices"] for point in weak] == [64, 128, 256]
    assert [point["batch"] for point in weak] == [8, 16, 32]
    assert 0.85 < weak[-1]["efficiency"] < 0.995 and weak[0]["efficiency"] == 1
    assert strong[-1]["efficiency"] < weak[-1]["efficiency"]
    pytest.importorskip("matplotlib")
    code, out, _ = run(capsys, f"{argv.replace('256', '128')} --png {file}")
    assert code == 0 and re.search(r"^ +128 +16 .* #+ +dp ", out, re.MULTILINE)
    assert file.read_bytes().startswith(b"\x89PNG")


def test_sources(capsys: pytest.CaptureFixture[str]) -> None:
    out = run(capsys, "plan --sources")[1]
    assert all(cluster.source in out for cluster in CLUSTERS.values())


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ("--model llama9 --seq-len 8", "unknown model 'llama9': there are llama2-7b"),
        ("--model layers=4,hidden=8 --seq-len 8", "--model lacks heads, mlp"),
        ("--model layers=4,width=8 --seq-len 8", "--model has 'width=8': there are"),
        ("--model llama2-7b --cluster h100", "--model needs --seq-len"),
        ("--model llama2-7b --seq-len 8 --cluster moon", "unknown cluster 'moon'"),
        ("--model llama2-7b --seq-len 8", "cluster here was not measured yet: usp plan --cal"),
        ("--model llama2-7b --seq-len 0 --cluster h100", "seq_len must be 1 or more, got 0"),
        ("--model llama2-7b --seq-len 8 --cluster h100 --top 0", "--top must be 1 or more, got 0"),
        ("--model llama2-7b --seq-len 8 --cluster h100 --only size=2", "--only takes dp, fsdp"),
        ("--model llama2-7b --seq-len 64 --cluster h100 --only ring=3", "no mesh of 8 devices has"),
        ("--model deepseek-v3 --seq-len 64 --cluster h100 --only ep=8", "--only takes dp, fsdp"),
        (
            "--model llama2-7b --seq-len 64 --cluster h100 --simulate 4",
            "--simulate 4 is below the 8 devices",
        ),
        (
            "--model llama2-7b --seq-len 64 --cluster h100 --dtype float32",
            "h100 has no rate for fp32: it has bf16, fp8",
        ),
        ("--model llama3-70b --seq-len 64 --cluster l20 --devices 1", "nothing fits 1 devices"),
        ("--model llama2-7b --seq-len 64 --cluster l20 --memory 0.1", "with 0.1 GiB each"),
        ("--model llama2-7b --seq-len 64 --cluster l20 --memory -1", "--memory must be above 0"),
        ("--seq-len 8 --memory 2", "--memory needs --model"),
        ("--seq-len 8 --simulate 64", "--simulate needs --model"),
        ("--calibrate --devices 1", "--devices must be 2 or more, got 1"),
        ("--calibrate no-such-file", "no-such-file is no result of usp bench comm --json"),
        ("--calibrate pyproject.toml", "pyproject.toml is no result of usp bench comm --json"),
    ],
)
def test_refusals_are_one_line(
    argv: str,
    said: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    code, out, err = run(capsys, f"plan {argv}")
    assert (code, out) == (2, "")
    assert re.fullmatch(rf"usp: error: .*{re.escape(said)}.*\n", err), err


def test_what_each_rank_does_as_json(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    argv = "plan --seq-len 24 --ring 2 --ulysses 2 --causal --layout zigzag --heads 4 --bias q"
    code, out, _ = run(capsys, f"{argv} --json")
    found = json.loads(out)
    assert code == 0 and found["command"] == "plan" and found["mask"] == "causal()"
    runs = found["positions"]
    assert runs == [[[0, 6, 1], [18, 24, 1]], [[6, 12, 1], [12, 18, 1]]]
    assert found["pairs"] == [150, 150] and [len(steps) for steps in found["steps"]] == [2, 2]
    places = [Place(2, 2, r, u, "zigzag", masks.causal()) for r in range(2) for u in range(2)]
    shape = Shape(1, 24, 24, 4, 4, 128, 128, torch.bfloat16, bias=Bias("q", torch.bfloat16))
    both = [bytes_sent(shape, p).total + bytes_sent(shape, p, backward=True).total for p in places]
    assert [one["total"] for one in found["sent"]] == both
    file = tmp_path / "plan.json"
    code, out, _ = run(capsys, f"{argv} --json {file}")
    assert code == 0 and "busiest rank" in out and json.loads(file.read_text()) == found
    code, out, err = run(capsys, "plan --seq-len 24 --ring 3 --ring-outer 2 --json")
    assert (code, out) == (2, "") and "--ring-outer 2 does not divide --ring 3" in err


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q = x.unflatten(-1, (4, 2))
        return x + self.mlp(self.attention(q, q, q).flatten(-2))


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


TINY = Model("tiny", 2, 8, 4, 4, 16, gated=False, causal=True)
CHOICES = [
    Choice(ring=2, ulysses=2, layout="zigzag", transport="allgather", tiles="mlp+loss"),
    Choice(dp=2, fsdp=4, ulysses=2, checkpointing="attention"),
    Choice(dp=2, fsdp=2, ring=2, layout="zigzag", checkpointing="full", offload="inputs"),
    Choice(ring=4, ring_outer=2, layout="zigzag", chunks=2, head_chunks=2),
    Choice(ring=4, ring_outer=2, fsdp=4, transport="grid"),
    Choice(ring=4, layout="zigzag", transport="query_ring"),
    Choice(ring=4, layout=DocumentZigzag((0, 12, 32)), transport="direct"),
]
MASK = masks.causal() & (masks.documents((0, 12, 32)) | masks.window(3, 0))


def job_of_tiny(choice: Choice) -> Job:
    fp32 = Precision(4, 4, 8, 4, "fp32")
    mask = MASK if choice.transport == "direct" else None
    return Job(TINY, 32, 2, CLUSTERS["laptop"], 4, mask, precision=fp32)


def pasted(number: int) -> int:
    """On a rank: run the code of a choice, and a step with what it makes."""
    torch.manual_seed(0)
    choice = CHOICES[number]
    names: dict[str, Any] = {"model": Tiny()}
    exec(code_of(predict(job_of_tiny(choice), choice)), names)
    mesh = names["mesh"]
    assert (mesh.ring_degree, mesh.ulysses_degree) == (choice.ring, choice.ulysses)
    import usp

    x = usp.shard_sequence(torch.randn(1, 32, 8), mesh, dim=1, layout=choice.layout)
    names["model"](x).square().sum().backward()
    return mesh.size


@pytest.mark.parametrize("number", range(len(CHOICES)))
def test_the_code_runs(pool: Pool, number: int) -> None:
    assert pool.run(pasted, number, ranks=4) == [CHOICES[number].sp] * 4


def test_the_code_of_latents_compiles() -> None:
    job = Job(MODELS["deepseek-v3"], 2**17, 32, CLUSTERS["h200"], 256)
    best = search(job, [c for c in meshes(job, ("tp", "pp")) if c.ring == 16])[0]
    assert best.choice.checkpointing != "attention"
    code = code_of(best)
    compile(code, "pasted", "exec")
    assert "usp.latent_attention(q, latent, rope_key, up_k, up_v, mesh, **options)" in code


@pytest.mark.long
def test_calibration_is_kept_and_planned_with(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    code, out, err = run(capsys, "plan --calibrate --devices 2 --json")
    assert (code, err) == (0, "")
    cluster = here.measured_here()
    assert cluster is not None and cluster.node == 2
    assert json.loads(out)["cluster"]["source"] == cluster.source
    argv = "plan --model vit-l --seq-len 256 --dtype float32"
    assert "2 x here" in run(capsys, argv)[1]
    here.file().write_text('{"here": {"node": 3}}')  # of another version
    assert here.measured_here() is None


def test_links_come_out_of_a_bench(tmp_path: Path) -> None:
    """With three processes a gather's latency is that of two other ranks."""
    fits = {"shift": (1e-4, 2e9), "all_gather": (4e-4, 1e9), "all_reduce": (0.0, None)}
    records = [{"record": "header", "arguments": {"processes": 3}}]
    records += [
        {"what": "fit", "candidate": name, "values": {"latency_s": s, "bytes_per_s": rate}}
        for name, (s, rate) in fits.items()
    ]
    file = tmp_path / "comm.json"
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    told = {"hop": 1e-4, "flow": 2e9, "latency": 2e-4, "rate": 1e9}
    assert calibrate.links_of(file) == (3, told)


def test_rates_come_out_of_times() -> None:
    times = {"products": 0.1, "layer": 0.15, "small layer": 4e-4, "optimizer": 0.01}
    times |= {"attention": 0.2, "small attention": 1e-3}
    for name in ("gather", "hop", "all_to_all", "all_reduce"):
        times |= {f"{name} small": 1e-4, f"{name} large": 1e-2}
    alone = here.cluster_from(calibrate._as_cluster(times, 1))
    cluster = here.cluster_from(calibrate._as_cluster(times, 4))
    assert alone.node == 1 and alone.attention_rate == cluster.attention_rate
    assert cluster.device == "cpu"
    assert cluster.attention_rate == pytest.approx(14 * 1024**2 * 512 / 0.199)
    assert cluster.launch == pytest.approx(1e-5) and cluster.call == pytest.approx(4.7e-4)
    assert cluster.levels[0].of_flow == pytest.approx((2**23 - 2**14) / (1e-2 - 1e-4))
