"""The benchmark of decoding: both ways are right, and one of them sends the keys."""

from __future__ import annotations

from typing import Any

import pytest
from pool import Pool, mesh
from programs import module

from usp.backends import native


def results(*argv: str) -> list[dict[str, Any]]:
    program = module("decode")
    return program.measure(program.parse(argv), mesh(1, 4))


@pytest.mark.skipif(native.unavailable() is not None, reason="the extension was not built")
@pytest.mark.long
def test_decoding_sends_no_keys(pool: Pool) -> None:
    arguments = "--contexts 8 64 --heads 4 2 --head-dim 16 --rounds 3 --seconds 1"
    found, *others = pool.run(results, *arguments.split(), ranks=4)
    assert [(each["dtype"], each["context"]) for each in found] == [
        (dtype, context) for dtype in ("fp32", "bf16") for context in (8, 64)
    ]
    for each in found:
        size = {"fp32": 4, "bf16": 2}[each["dtype"]]
        # a head of four is merged here
        sent = {"usp": 3 * (16 + 1) * 4 + 3 * (16 * size + 4)}
        sent["gathered"] = 3 * each["context"] // 4 * 2 * (16 + 16) * size
        assert each["bytes_sent"] == sent
        assert each["ratio"] > 0 and all(len(taken) == 3 for taken in each["seconds"].values())
    assert all(theirs[1]["seconds"] == found[1]["seconds"] for theirs in others)


def test_what_is_wrong_is_not_timed(capsys: pytest.CaptureFixture[str]) -> None:
    program = module("decode")
    case = program.DecodeCase("fp32", 8, 1, 4, 2, 16)
    program.check(case, {"usp": 1e-7})
    for error in (1e-3, float("nan")):
        with pytest.raises(ValueError, match=r"usp is off by .* not timed"):
            program.check(case, {"usp": error})
    for argv, message in (("--contexts 6", "does not divide"), ("--heads 4 3", "no multiple")):
        with pytest.raises(SystemExit):
            program.parse(argv.split())
        assert message in capsys.readouterr().err
