"""``usp doctor``: all is right, and faults that it must find and name."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest
from faults import examined_with, faulty
from pool import Pool

import usp
from usp import cli
from usp.diagnosis import links
from usp.diagnosis.ranks import Local, on_ranks
from usp.diagnosis.report import Link, Outcome, RankReport, Report
from usp.distributed.launch import launched_by


def report_with(pool: Pool, fault: str, seconds: float = 20.0) -> Report:
    return Report([RankReport.of_text(t) for t in pool.run(examined_with, fault, seconds, ranks=2)])


def test_all_is_right(pool: Pool) -> None:
    report = report_with(pool, "none")
    assert report.sentences() == [] and not report.is_silent
    names = list(report.checks())
    usable = {name for name, state in usp.backends().items() if state == "can run here"}
    assert {name.split()[1] for name in names if name.startswith("backend")} == usable
    meshes = {"1 ulysses x 2 ring", "2 ulysses x 1 ring"}
    transports = {f"attention, 1 ulysses x 2 ring, {t}" for t in ("ring", "direct", "allgather")}
    assert transports | {"messages", "links", *(f"groups of {m}" for m in meshes)} <= set(names)
    (link,) = report.links
    assert link.ranks == (0, 1) and link.within and link.rate > 0 < link.latency


def test_a_rank_that_corrupts_messages_is_found_where_they_arrive(pool: Pool) -> None:
    report = report_with(pool, "corrupts")
    assert not report.is_silent
    (sentence, *_) = report.sentences()
    assert sentence.startswith("messages, ranks 0: wrong, shift: 1 of 1009 bytes are not those")
    assert "torch.distributed itself" in sentence
    assert any("1 ulysses x 2 ring, ring, ranks 0, 1: wrong" in s for s in report.sentences())


def test_another_version_on_a_rank_is_said(pool: Pool) -> None:
    report = report_with(pool, "old torch")
    assert any(
        "ranks differ in torch: " in s and "2.10.0 on ranks 1" in s for s in report.sentences()
    )


@pytest.mark.long
def test_a_rank_that_hangs_or_raises_is_named_and_ends_nothing_else() -> None:
    for fault, said in (("hangs", "ranks 0, 1 got no further in 2 s"), ("raises", "lost")):
        # the threads that got no further wake up again: no other test may meet them
        with closing(Pool(2)) as alone:
            report = report_with(alone, fault, 2.0)
        assert report.is_silent
        told = " ".join(report.sentences())
        assert "attention, 1 ulysses x 2 ring, direct" in told and said in told


@pytest.mark.long
def test_a_process_that_dies_is_named_with_what_it_did() -> None:
    found = on_ranks(faulty, ("dies", 3.0), Local(2, "cpu", 60.0), 5.0)
    assert found is not None
    texts, failure = found
    assert texts[1] is None
    assert "process 1 of 2 ended with exit code 7" in failure
    assert "rank 1 in 'attention, 1 ulysses x 2 ring, direct'" in failure
    report = Report([None if t is None else RankReport.of_text(t) for t in texts], failure)
    assert report.is_silent and "Look at what that rank printed" in report.sentences()[0]


def of_rank(rank: int, *outcomes: Outcome, links: tuple[Link, ...] = ()) -> RankReport:
    about = {"host": "a", "device type": "cuda", "torch": "2", "usp": "1", "compiled ops": "there"}
    return RankReport(rank, about, list(outcomes), list(links))


def test_who_never_comes_keeps_the_others_waiting() -> None:
    first, stuck = Outcome("a", "right", "", 0.1), Outcome("b", "no answer", "no further", 20.0)
    raised = Outcome("a", "raised", "KeyError", 0.1)
    report = Report([of_rank(0, first, stuck), of_rank(1, raised), of_rank(2, first, stuck)])
    hang, cause = report.sentences()
    assert hang.startswith("b: ranks 0, 2 got no further in 20 s, and ranks 1 never came to it")
    assert cause.startswith("a, ranks 1: raised, KeyError. ")
    assert (
        "ranks 0, 1 got no further"
        in Report([of_rank(r, first, stuck) for r in (0, 1)]).sentences()[0]
    )
    lost = Report([of_rank(0, first), None])
    assert lost.is_silent and lost.sentences() == [
        "no answer at all from ranks 1. Look at what they printed."
    ]


def test_a_link_far_below_the_others_is_named() -> None:
    rates = {(0, 1): 10e9, (0, 2): 9e9, (1, 2): 2e9}
    found = tuple(Link(pair, 1e-6, rate, within=False) for pair, rate in rates.items())
    (said,) = Report([of_rank(0, links=found)]).sentences()
    assert said.startswith("the link between ranks 1 and 2 moves 2.00 GB/s, others like it 9.00")


def test_every_pair_of_few_ranks_and_neighbours_of_many() -> None:
    assert links.pairs(3) == [(0, 1), (0, 2), (1, 2)]
    assert len(links.pairs(8)) == 28 and links.pairs(9)[-1] == (8, 0)


def test_the_command_starts_ranks_and_says_what_it_found(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert launched_by() is None
    assert cli.main(["doctor", "--ranks", "2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["right"] and found["sentences"] == [] and len(found["ranks"]) == 2


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--ranks 0", "--ranks must be 1 or more, got 0"),
        ("--seconds 0", "--seconds must be positive, got 0.0"),
        ("--seconds inf", "--seconds must be positive, got inf"),
        ("--device cuda --ranks 99", "--ranks 99 of --device cuda need a GPU each, there are"),
    ],
)
def test_what_cannot_be_asked(options: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", *options.split()]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.long
def test_under_a_launcher_the_first_rank_says_it_for_all(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", "-m", "usp", "doctor", "--device", "cpu"]
    path = os.pathsep.join([str(Path(usp.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        command,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("all is right on 2 ranks") == 1
