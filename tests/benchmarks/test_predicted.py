"""The planner's bytes and memory are those that processes count for a small transformer's step."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pool import Pool
from programs import module
from torch import nn
from torch.distributed.fsdp import fully_shard

import usp
from usp.bench.records import read
from usp.planning.choose.cluster import CLUSTERS
from usp.planning.choose.search import predict
from usp.testing import WireBytes

SIZES = {"full": {}, "causal": {"causal": True}, "uneven": {"tokens": 250, "heads": 6}}
NAMES = "seconds", "attention", "gradients", "memory"
SMALL = {"layers": 3, "hidden": 48, "heads": 4, "mlp": 160, "tokens": 256}


def measured(size: dict[str, Any], number: int, ranks: int) -> dict[str, float]:
    """On a rank."""
    program = module("predicted")
    made = program.Size(**SMALL | size)
    return program.measure(made, program.choices(ranks, made)[number], 1)


@pytest.mark.long
@pytest.mark.parametrize(("name", "ranks"), [("full", 2), ("causal", 4), ("uneven", 4)])
def test_bytes_and_memory_of_a_step(pool: Pool, name: str, ranks: int) -> None:
    program = module("predicted")
    size = program.Size(**SMALL | SIZES[name])
    for number, choice in enumerate(program.choices(ranks, size)):
        found = pool.run(measured, SIZES[name], number, ranks, ranks=ranks)
        record = program.compared(size, choice, found)
        real, told = record["measured"], record["predicted"]
        print(choice, real, told)
        if name != "uneven":  # bytes are exact where all divide
            assert told["attention"] == real["attention"], choice
        assert told["attention"] == pytest.approx(real["attention"], rel=0.05), choice
        # a number a parameter says whether anybody used it
        marks = 4 * 6 * size.layers
        marks = sum(2 * marks * (axis.size - 1) // axis.size for axis in choice.reduced)
        assert told["gradients"] + marks == real["gradients"], choice
        assert told["memory"] == pytest.approx(real["memory"], rel=0.1), choice


@pytest.mark.parametrize(
    ("factor", "code", "said"), [(1.1, 0, "nothing"), (1.3, 1, ", ".join(4 * ["seconds"]))]
)
def test_exit_codes_say_what_is_off(
    factor: float,
    code: int,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    program, alone = module("predicted"), replace(CLUSTERS["laptop"], node=1)
    file = tmp_path / "found.json"

    def measured(work: Any, settings: Any, processes: int, *_: Any) -> list[dict[str, float]]:
        told = program.compared(settings[2], settings[3], [dict.fromkeys(NAMES, 1.0)], alone)
        exact = told["predicted"]
        return [exact | {"seconds": factor * exact["seconds"]}] * processes

    monkeypatch.setattr(program, "run_processes", measured)
    monkeypatch.setattr(program, "measured_now", lambda n, quick: replace(alone, node=n))
    monkeypatch.setattr(sys, "argv", f"predicted --processes 1 2 --json {file}".split())
    assert program.main() == code
    assert capsys.readouterr().out.endswith(f"of 4 meshes off: {said}\n")
    found = read(file)
    assert [one["node"] for one in found.of("cluster")] == [1, 2] and len(found.of("mesh")) == 4


def sent_under_fsdp(number: int, ranks: int) -> int:
    """On a rank: bytes of a forward and a backward whose weights all ranks share."""
    program = module("predicted")
    size = program.Size(**SMALL)
    choice = program.choices(ranks, size)[number]
    group = usp.init_mesh(choice.ulysses, choice.ring, device_type="cpu")
    attention = usp.LongContextAttention(
        group, seq_len=size.tokens, validate="never", transport=choice.transport
    )
    model = nn.Sequential(*(program.Block(size, attention) for _ in range(size.layers)))
    for part in (*model, model):
        fully_shard(part)
    x = torch.randn(1, size.tokens // ranks, size.hidden)
    with WireBytes() as wire:
        model(x).sum().backward()
    return wire.sent


@pytest.mark.long
def test_bytes_of_fsdp(pool: Pool) -> None:
    program, ranks = module("predicted"), 4
    size = program.Size(**SMALL)
    for number, choice in enumerate(program.choices(ranks, size)):
        told = predict(program.job_of(size, ranks), replace(choice, fsdp=ranks)).sent.total
        assert pool.run(sent_under_fsdp, number, ranks, ranks=ranks) == [told] * ranks
