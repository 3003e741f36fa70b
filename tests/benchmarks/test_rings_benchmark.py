"""The benchmark of rings: every way is right, and sends what it says."""

from __future__ import annotations

from typing import Any

import pytest
from pool import Pool, mesh
from programs import module

from usp.backends import native


def results(*argv: str) -> list[dict[str, Any]]:
    program = module("rings")
    return program.measure(program.parse(argv), mesh(1, 4))


@pytest.mark.skipif(native.unavailable() is not None, reason="the extension was not built")
@pytest.mark.long
def test_rings_send_less_than_the_plain_one(pool: Pool) -> None:
    arguments = "--contexts 64 --heads 2 --head-dim 16 --latent-dim 8 --rope-dim 4 --rounds 3"
    found, *others = pool.run(results, *arguments.split(), ranks=4)
    assert [each["dtype"] for each in found] == ["fp32", "bf16"]
    for each in found:
        sent, crossing = each["bytes_sent"], each["crossing"]
        assert sent["queries"] < sent["keys"] and crossing["two levels"] < crossing["keys"]
        # 12 numbers a token, and 2 heads of 20 and 16
        assert sent["latents"] * 72 == sent["made keys"] * 12
        assert set(each["ratios"]) == {"queries", "two levels", "grid", "latents"}
    assert all(theirs[1]["seconds"] == found[1]["seconds"] for theirs in others)


def test_what_is_wrong_is_not_timed() -> None:
    program = module("rings")
    case = program.RingCase("fp32", 8, 1, 4, 2, 6)
    program.check(case, {"keys": 1e-7})
    with pytest.raises(ValueError, match=r"latents is off by .* not timed"):
        program.check(case, {"latents": float("nan")})
