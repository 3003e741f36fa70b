"""``usp trace``: every message and kernel of a step, when it was, and what is written of it."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from pool import Pool

from usp import cli, masks
from usp.diagnosis.shown import draw, trace_events
from usp.diagnosis.spans import COMPUTE, MEETING, RECEIVE, SEND, WAIT, Span, seconds_in, sums
from usp.diagnosis.step import Step, spans_of, step_on
from usp.planning.cost import Place, Shape, bytes_sent


def step_of(ulysses: int, ring: int, transport: str) -> Step:
    sizes = 67, 4, 2, 8, 1, ulysses, ring
    return Step(*sizes, "zigzag", transport, masks.causal(), "float32", "cpu", backward=True)


def traced(ulysses: int, ring: int, transport: str) -> str:
    rank = torch.distributed.get_rank()
    return step_on(step_of(ulysses, ring, transport), rank, ulysses * ring, lambda text: None)


@pytest.mark.parametrize("how", [(1, 2, "ring"), (2, 2, "direct"), (2, 2, "allgather")], ids=str)
def test_every_message_of_a_step_is_there_with_its_other_end(
    how: tuple[int, int, str], pool: Pool
) -> None:
    ulysses, ring, transport = how
    ranks = [spans_of(text) for text in pool.run(traced, *how, ranks=ulysses * ring)]
    shape = Shape(1, 67, 67, 4, 2, 8, 8, torch.float32)
    sent, came = Counter(), Counter()
    for rank, spans in enumerate(ranks):
        layouts = "zigzag", "zigzag"
        place = Place(
            ring, ulysses, rank // ulysses, rank % ulysses, layouts, masks.causal(), transport
        )
        formula = sum(bytes_sent(shape, place, backward).total for backward in (False, True))
        assert sum(s.size for s in spans if s.lane == SEND and s.name != MEETING) == formula
        sent += Counter((rank, s.peer, s.size) for s in spans if s.lane == SEND)
        came += Counter((s.peer, rank, s.size) for s in spans if s.lane == RECEIVE)
        computed = Counter(s.name.split(",")[0] for s in spans if s.lane == COMPUTE)
        assert computed["forward"] >= ring and computed["backward"] >= ring
        assert all(0 <= s.start <= s.stop for s in spans)
        found = sums(spans)
        assert 0 < found["computing"] <= found["step"] and found["hidden"] <= found["in_flight"]
    assert sent == came
    events = trace_events(ranks)["traceEvents"]
    arrows = Counter(e["ph"] for e in events)
    assert arrows["s"] == arrows["f"] == sent.total()
    assert arrows["X"] == sum(map(len, ranks))
    json.dumps(events, allow_nan=False)


def test_sums_count_each_second_once(tmp_path: Path) -> None:
    spans = [
        Span(COMPUTE, "forward", 1.0, 4.0),
        Span(COMPUTE, "backward", 5.0, 6.0),
        Span(SEND, "a block", 0.0, 3.0, 1, 10),
        Span(RECEIVE, "a block", 2.0, 5.5, 1, 10),
        Span(WAIT, "for a block", 4.0, 5.0),
    ]
    assert seconds_in(spans, SEND, RECEIVE) == [(0.0, 5.5)]
    expected = {"step": 6.0, "computing": 4.0, "waiting": 1.0, "in_flight": 5.5, "hidden": 3.5}
    assert sums(spans) == {**expected, "bytes_sent": 10}
    assert sums([])["step"] == 0
    pytest.importorskip("matplotlib")
    draw([spans, []], "title", tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.long
def test_the_command_writes_the_trace(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "trace.json"
    options = ["--ranks", "2", "--seq-len", "64", "--heads", "2", "--out", str(out), "--json"]
    assert cli.main(["trace", *options]) == 0
    told = json.loads(capsys.readouterr().out)
    assert len(told["ranks"]) == 2 and told["files"] == [str(out)]
    assert {e["pid"] for e in json.loads(out.read_text())["traceEvents"]} == {0, 1}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--ulysses 3", "--ulysses 3 does not divide the 4 ranks"),
        ("--seq-len 0", "--seq-len must be 1 or more, got 0"),
        ("--heads 7 --kv-heads 2", "--heads 7 is not a multiple of --kv-heads 2"),
        ("--mask caus()", "unknown mask 'caus'"),
        ("--mask documents((0,5)) --seq-len 9", "cu_seqlens ends at 5, but there are 9 queries"),
        ("--seconds nan", "--seconds must be positive, got nan"),
    ],
)
def test_what_cannot_be_traced(options: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["trace", "--device", "cpu", *options.split()]) == 2
    assert said in capsys.readouterr().err
