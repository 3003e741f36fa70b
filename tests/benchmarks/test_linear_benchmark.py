"""The benchmark of linear attention: what it compares is right, and it refuses what is not."""

from __future__ import annotations

from typing import Any

import pytest
from pool import Pool, mesh
from programs import module


def results(*argv: str) -> list[dict[str, Any]]:
    program = module("linear")
    return program.measure(program.parse(argv), mesh(4, 1))


@pytest.mark.long
def test_a_state_is_as_large_at_any_length(pool: Pool) -> None:
    arguments = "--rules decay delta --lengths 21 84 --heads 2 --head-dim 4 --rounds 3 --seconds 1"
    found, *others = pool.run(results, *arguments.split(), ranks=4)
    assert [(e["rule"], e["dtype"], e["length"], e["pass"]) for e in found] == [
        (rule, dtype, length, which)
        for rule in ("decay", "delta")
        for dtype in ("fp32", "bf16")
        for length in (21, 84)
        for which in ("forward", "both")
    ]
    state = 2 * 4 * 4 * 4
    for each in found:
        passes = 1 + (each["pass"] == "both")
        assert all(len(taken) == 3 for taken in each["seconds"].values())
        of_delta = each["rule"] == "delta"
        assert all(len(of) == 5 + of_delta for of in each["errors"].values())
        more = set() if of_delta else {"plain", "quadratic"}
        assert set(each["ratios"]) == {"ring", "all-gather"} | more
        told = state if of_delta else 2 * 4
        assert each["bytes_sent"]["gather"] == 3 * (state * passes + told)
        assert each["bytes_sent"]["ring"] == state * passes
        assert of_delta or each["bytes_sent"]["plain"] == each["bytes_sent"]["gather"]
    short, long = (next(e for e in found if e["length"] == n) for n in (21, 84))
    assert long["bytes_sent"]["all-gather"] > 3 * short["bytes_sent"]["all-gather"]
    assert all(theirs[2]["seconds"] == found[2]["seconds"] for theirs in others)


def test_a_wrong_result_is_not_timed() -> None:
    program = module("linear")
    case = program.LinearCase("decay", "fp32", 8, 2, 4)
    program.check(case, {"gather": {"out": 1e-7}})
    for error in (1e-3, float("nan")):
        with pytest.raises(ValueError, match=r"ddecay of ring is off by .* not timed"):
            program.check(case, {"gather": {"out": 1e-7}, "ring": {"ddecay": error}})


def test_too_few_tokens_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        module("linear").parse(["--lengths", "3"])
    assert "--lengths 3 has no token for each of 4 processes" in capsys.readouterr().err
