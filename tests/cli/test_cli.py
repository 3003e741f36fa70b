"""The ``usp`` command: what it prints, and how it refuses."""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from unittest import mock

import pytest
import torch
from places import ROOT

import usp
from usp import cli, masks
from usp._version import __version__
from usp.backends.preference import measured_on, preference
from usp.bench import PROGRAMS
from usp.cli import bench, command, console, info
from usp.cli.expression import parse_mask
from usp.cli.picture import colours, draw, in_colours
from usp.machine import cpu
from usp.ops import native
from usp.planning import layout as layouts
from usp.planning.plan import make_plan
from usp.planning.samples import masks_of


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    try:
        code = cli.main(argv)
    except SystemExit as end:  # argparse
        code = int(end.code or 0)
    said = capsys.readouterr()
    return code, said.out, said.err


def numbers(line: str) -> list[float]:
    return [float(number) for number in re.findall(r"[\d.]+", line)]


def test_info_names_versions_and_every_backend(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "info")
    assert code == 0
    assert __version__ in out and str(torch.__version__) in out
    for name, state in usp.backends().items():
        assert re.search(rf"^  {name} +{re.escape(state)}", out, re.MULTILINE), name


def test_info_says_what_auto_takes(capsys: pytest.CaptureFixture[str]) -> None:
    measured = "" if preference("cpu").results else r".*\(a guess: not measured\)"
    line = rf"^  {re.escape(measured_on('cpu'))}  native, sdpa, {measured}"
    assert re.search(line, run(capsys, "info")[1], re.MULTILINE)


def test_info_says_whether_the_extension_was_built(capsys: pytest.CaptureFixture[str]) -> None:
    out = run(capsys, "info")[1]
    if native.load_error() is not None:
        assert re.search(r"^extension +not built: \S", out, re.MULTILINE)
    else:
        assert re.search(r"^extension +built for cpu", out, re.MULTILINE)
        assert re.search(rf"^CPU kernels use +{cpu.level()}", out, re.MULTILINE)


def test_info_says_what_to_install(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(info, "find_spec", lambda name: None if name == "matplotlib" else name)
    monkeypatch.setattr(native, "_LOAD_ERROR", "it was not built: no C++ compiler found")
    found = json.loads(run(capsys, "info", "--json")[1])
    assert found["command"] == "info" and found["usp"] == __version__
    assert found["backends"] == usp.backends()
    assert "no C++ compiler" in found["extension"]["reason"]
    first, second = found["install"]
    assert first == "pip install 'usp[demo]'" and second.startswith("apt-get install g++")


def test_json_stands_alone_or_beside_the_text(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    arguments = argparse.Namespace(command="x", json="-")
    console.present(arguments, {"a": float("nan"), "b": (1, tmp_path)}, lambda: "text")
    alone = capsys.readouterr().out
    assert json.loads(alone)["a"] is None and json.loads(alone)["b"] == [1, str(tmp_path)]
    arguments.json = str(tmp_path / "x.json")
    console.present(arguments, {"a": 1}, lambda: "text")
    assert capsys.readouterr().out == "text\n"
    assert json.loads((tmp_path / "x.json").read_text())["a"] == 1
    arguments.json = str(tmp_path / "gone" / "x.json")
    with pytest.raises(console.UserError, match="--json: "):
        console.present(arguments, {"a": 1}, lambda: "text")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completions_know_every_command(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("shtab")
    code, script, _ = run(capsys, "completions", shell)
    assert code == 0 and "--train-steps" in script.replace("-l ", "--")
    assert all(module.__name__.split(".")[-1] in script for module in command.COMMANDS)
    if shutil.which(shell):
        parsed = [shell, "-n"] if shell != "fish" else [shell, "--no-execute"]
        subprocess.run(parsed, input=script, text=True, check=True, timeout=250)


def test_completions_without_shtab_say_what_to_install(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "shtab", None)
    code, out, err = run(capsys, "completions", "bash")
    assert (code, out) == (2, "") and "pip install 'usp[completions]'" in err


@pytest.mark.parametrize("layout", ["contiguous", "zigzag", "striped"])
def test_plan_counts_every_visible_pair_once(
    layout: str, capsys: pytest.CaptureFixture[str]
) -> None:
    seq_len, left, ring = 1009, 200, 3
    argv = f"plan --seq-len {seq_len} --ring {ring} --layout {layout} --causal --window {left} none"
    code, out, _ = run(capsys, *argv.split(), "--show")
    assert code == 0
    table, *ranks = re.split(r"^ring rank \d+$", out, flags=re.MULTILINE)
    lines = [numbers(line) for line in table.splitlines() if re.match(r" +\d+ ", line)]
    pairs = sum(min(p, left) + 1 for p in range(seq_len))
    assert [line[0] for line in lines] == [0, 1, 2]
    assert sum(line[1] for line in lines) == seq_len
    assert sum(line[4] for line in lines) == pairs
    assert sum(line[5] for line in lines) == pytest.approx(ring, abs=2e-3)
    # with --show the steps of a rank add up to its line
    assert len(ranks) == ring
    for line, steps in zip(lines, ranks, strict=True):
        steps = steps.partition("bytes sent")[0]
        shown = [numbers(step) for step in steps.splitlines() if re.match(r" +\d+ ", step)]
        assert sum(step[-1] for step in shown) == line[4]


def test_plan_of_packed_documents(capsys: pytest.CaptureFixture[str]) -> None:
    argv = "plan --seq-len 101 --ring 2 --layout document-zigzag --cu-seqlens 0,0,30,101 --causal"
    code, out, _ = run(capsys, *argv.split())
    assert code == 0
    lines = [numbers(line) for line in out.splitlines() if re.match(r" +\d+ ", line)]
    assert sum(line[4] for line in lines[:2]) == 30 * 31 / 2 + 71 * 72 / 2


def test_plan_prints_the_bytes_that_leave_a_rank(capsys: pytest.CaptureFixture[str]) -> None:
    """Figures by hand: 1000 tokens, 8 heads of 16, bf16; forward, backward, ring gradients fp32."""
    argv = "plan --seq-len 1000 --heads 8 --head-dim 16"
    whole = 1000 * 8 * 16 * 2  # one tensor
    for mesh, expected in {
        "": [0, 0, 0, 0, 0],
        "--ulysses 2": [whole, 0, whole, 0, 0],  # a quarter of q, k, v and out each
        # half of k and v; half of q and dout, lse and delta in fp32, and back dq in fp32
        "--ring 2": [0, whole, 0, whole + 2 * 500 * 8 * 4, whole],
        "--ring 2 --transport ring": [0, whole, 0, whole, 2 * whole],
        "--ring 2 --latent 36": [0, 500 * 36 * 2, 0, 500 * 36 * 2, 500 * 36 * 4],
        "--ring 2 --transport allgather": [0, whole, 0, whole, 2 * whole],
    }.items():
        code, out, _ = run(capsys, *argv.split(), *mesh.split())
        assert code == 0
        assert numbers(out.splitlines()[-1]) == [0, *expected, sum(expected)], mesh


def test_plan_compares_a_double_ring_with_a_plain_one(capsys: pytest.CaptureFixture[str]) -> None:
    """Blocks of 10 tokens, fp32: to the other node once, or by two ranks of a node at each hop."""
    argv = "plan --seq-len 40 --ring 4 --ring-outer 2 --heads 1 --head-dim 8 --dtype float32 --show"
    code, out, _ = run(capsys, *argv.split(), "--transport", "ring")
    double, plain = (numbers(line) for line in out.splitlines()[-2:])
    block = 10 * 2 * 8 * 4
    assert double == [2, 3 * block, 4 * 3 * block] and plain[1] > double[1]
    assert out.count("between nodes: hop 1 from the rank before") == 4
    code, _, err = run(capsys, *argv.replace("outer 2", "outer 3").split())
    assert code != 0 and "--ring-outer 3" in err and "--ring 4" in err


def test_plan_of_a_grid_counts_every_pair_once(capsys: pytest.CaptureFixture[str]) -> None:
    argv = "plan --seq-len 41 --ring 4 --causal --layout zigzag --transport grid --show"
    code, out, _ = run(capsys, *argv.split(), "--ring-outer", "2")
    assert code == 0 and "queries move in a node" in out.splitlines()[0]
    lines = [numbers(line) for line in out.splitlines() if re.match(r" +\d+ ", line)]
    assert sum(line[4] for line in lines[:4]) == 41 * 42 // 2
    code, _, err = run(capsys, *argv.split())
    assert code != 0 and "--ring-outer" in err


def test_plan_says_what_moves(capsys: pytest.CaptureFixture[str]) -> None:
    """Few queries move or lie on every rank, or keys do; work and bytes are of just that."""
    argv = "plan --seq-len 6 --key-len 90 --ring 3 --heads 2 --head-dim 8 --dtype float32 --show"
    for more, how, sent in (
        # to two ranks 2 queries of 2 x 8 numbers, and back to them out and lse
        ("", "queries move", 2 * 2 * 2 * (8 + 8 + 1) * 4),
        # 4 of 6 to the ranks that merge them, 2 merged here to two ranks
        ("--layout replicated", "queries are on every rank", (4 + 2 * 2) * 2 * (8 + 1) * 4),
        ("--layout zigzag --key-layout replicated", "keys are on every rank", 0),
        ("--transport direct --key-layout held:0,80,10", "keys move", 80 * 2 * 2 * 16 * 4),
    ):
        code, out, _ = run(capsys, *argv.split(), *more.split())
        assert code == 0 and how in out.splitlines()[0]
        lines = [numbers(line) for line in out.splitlines() if re.match(r" +\d+ ", line)]
        assert sum(line[4] for line in lines[:3]) == 6 * 90, more
        assert max(line[2] for line in lines[-3:]) == sent, more


def test_plan_counts_a_bias(capsys: pytest.CaptureFixture[str]) -> None:
    """By hand: rows of the other rank's heads go there; half of the heads are held."""
    argv = "plan --seq-len 1000 --heads 8 --head-dim 16 --ulysses 2 --bias"
    whole, rows = 1000 * 8 * 16 * 2, 1000 * 1000
    for dims, there, back, held, gradient in (
        ("hq", 500 * 4 * 1000 * 2, 500 * 4 * 1000 * 4, rows * 4 * 2, rows * 4 * 4),
        ("q", 500 * 1000 * 2, 500 * 1000 * 4, rows * 2, rows * 4),
        ("h", 0, 0, 4 * 1000 * 2, 4 * 1000 * 4),
        ("none", 0, 0, 1000 * 2, 1000 * 4),
    ):
        out = run(capsys, *argv.split(), dims, "--bias-gradient")[1]
        sent = next(line for line in out.splitlines() if str(2 * whole + there + back) in line)
        assert numbers(sent) == [0, whole, 0, whole, 0, 0, there, back, 2 * whole + there + back]
        assert numbers(out.splitlines()[-1]) == [0, held, gradient]
    out = run(capsys, *argv.split(), "q")[1]
    assert numbers(out.splitlines()[-1]) == [0, rows * 2, 0]


def picture(out: str) -> list[str]:
    """The lines of queries in what ``usp plan --show`` draws."""
    drawn = out.partition("which keys are seen")[2].partition(" hidden, 0 seen")[0]
    return [line.split()[-1] for line in drawn.splitlines()[2:-1]]


@pytest.mark.parametrize("layout", ["contiguous", "zigzag", "striped"])
@pytest.mark.parametrize("transport", ["ring", "direct"])
def test_plan_draws_what_each_rank_sees_and_by_which_step(
    layout: str, transport: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """One sign a pair: seen where the mask says so, by the step in whose owner's row the key is."""
    mask = masks.causal() & (masks.window(7, 0) | masks.first_keys(3)) | masks.first_queries(1)
    argv = f"plan --seq-len 29 --ring 3 --layout {layout} --transport {transport} --show --mask"
    code, out, err = run(capsys, *argv.split(), repr(mask))
    assert (code, err) == (0, "")
    rows = [row.tensor.tolist() for row in layouts.rows(layout, 29, 3)]
    owner = {position: rank for rank, row in enumerate(rows) for position in row}
    tables = re.split(r"^ring rank \d+$", out, flags=re.MULTILINE)[1:]
    steps = [
        {
            int(o): int(s)
            for s, o in re.findall(r"^ +(\d+) +(\d) ", t.split("\n\n")[0], re.MULTILINE)
        }
        for t in tables
    ]
    expected = [
        "".join(
            str(steps[rank][owner[key]]) if seen else "."
            for key, seen in enumerate(mask.dense(29, 29)[query].tolist())
        )
        for rank, row in enumerate(rows)
        for query in row
    ]
    assert picture(out) == expected


def test_a_picture_of_many_tokens_counts_every_pair_of_the_plan_once() -> None:
    mask = masks.neighbourhood((31, 37), (5, 3), edges="shift") | masks.first_keys(2)
    lengths = (31 * 37, 31 * 37)
    plans = [make_plan(masks_of(mask), "zigzag", lengths, 3, rank) for rank in range(3)]
    drawn = draw(plans, 64, 64)
    assert [pairs.sum((1, 2)).tolist() for pairs in drawn.pairs] == [
        [step.pairs for step in plan.steps] for plan in plans
    ]
    edge = [-(-column * lengths[0] // 64) for column in range(65)]
    by_column = mask.dense(*lengths).sum(0).split([b - a for a, b in pairwise(edge)])
    found = sum(pairs.sum((0, 1)) for pairs in drawn.pairs)
    assert found.tolist() == [int(part.sum()) for part in by_column]
    assert int(torch.cat(drawn.queries).sum()) == int(drawn.keys.sum()) == lengths[0]


def test_plan_writes_the_picture_as_a_png(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    argv = ["plan", "--seq-len", "40", "--ring", "2", "--causal", "--png", str(tmp_path / "a.png")]
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    code, _, err = run(capsys, *argv)
    assert code == 2 and "--png needs matplotlib" in err
    monkeypatch.undo()
    pytest.importorskip("matplotlib")
    assert run(capsys, *argv)[0] == 0
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_colours_of_a_picture_are_those_of_its_steps() -> None:
    pytest.importorskip("matplotlib")
    plans = [make_plan(masks_of(masks.causal()), "contiguous", (4, 4), 2, r) for r in range(2)]
    image = in_colours(draw(plans, 4, 4), 2)
    own, first = colours(2)
    white = (1.0, 1.0, 1.0)
    seen = [[own, white, white, white], [own, own, white, white]]
    seen += [[first, first, own, white], [first, first, own, own]]
    assert torch.allclose(torch.tensor(image), torch.tensor(seen, dtype=torch.float64))


@pytest.mark.parametrize(
    "mask",
    [
        masks.causal() & (masks.window(512, None) | masks.first_keys(4)),
        ~(masks.documents((0, 3, 3, 9)) & ~masks.window(None, 2)) | masks.blocks((0, 4, 9)),
        masks.shifted(masks.causal() & masks.first_keys(2), -3) | masks.causal(-2),
        masks.neighbourhood((3, 4, 5), (1, 2, 3), causal=(True, False, False), edges="shift"),
    ],
    ids=str,
)
def test_masks_are_read_as_they_are_printed(mask: masks.Mask) -> None:
    assert parse_mask(repr(mask)) == mask


def test_plan_without_any_pair_to_compute(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "plan", "--seq-len", "0", "--ring", "2")[0] == 0


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ("plan --seq-len 8 --layout spiral", "unknown layout 'spiral'.*zigzag"),
        ("plan --seq-len -3", "--seq-len must be 0 or more, got -3"),
        ("plan --seq-len 8 --ring 0", "--ring must be 1 or more, got 0"),
        ("plan --seq-len 8 --causal --window -1 none", "got left=-1"),
        ("plan --seq-len 8 --cu-seqlens 0,5", "ends at 5, but --seq-len is 8"),
        ("plan --seq-len 8 --cu-seqlens 0,5,3,8", "must not decrease"),
        ("plan --seq-len 8 --layout document-zigzag", "--cu-seqlens"),
        ("plan --seq-len 8 --prefix-len 3", "causal"),
        ("plan --seq-len 8 --heads 7 --kv-heads 2", "--heads 7 is not a multiple of --kv-heads 2"),
        ("plan --seq-len 8 --mask caus()", "unknown mask 'caus': write calls of .*causal"),
        ("plan --seq-len 8 --mask causal", "'causal' is no mask"),
        ("plan --seq-len 8 --mask window(open('x'))", "unknown mask 'open'"),
        ("plan --seq-len 8 --mask window(1+1)", "'1 . 1' is no mask"),
        ("plan --seq-len 8 --mask masks.causal()", "unknown mask 'masks.causal'"),
        ("plan --seq-len 8 --mask causal(", "is no mask .*never closed"),
        ("plan --seq-len 8 --mask window(-1)", "got left=-1"),
        ("plan --seq-len 8 --mask window(left=1,up=2)", "unexpected keyword argument 'up'"),
        ("plan --seq-len 8 --mask window(**{})", "are literals"),
        ("plan --seq-len 8 --mask documents((0,5))", "ends at 5, but there are 8"),
        ("plan --seq-len 0 --png x.png", "no queries or no keys"),
        ("plan --seq-len 8 --layout replicated --png x.png", "--png draws keys that come"),
        ("plan --seq-len 8 --layout replicated --key-layout replicated", "both replicated"),
        ("plan --seq-len 8 --layout held:3,4", "holds 7 tokens.*has 8"),
        ("bench no-such-program", "no benchmark"),
        ("bench kernels --json /dev/null/x", "--json: .*/dev/null/x"),
        ("demo --json /dev/null/x", "--json: .*/dev/null/x"),
        ("doctor --json tests", "--json: .*Is a directory: 'tests'"),
        ("bench cpu_masks --json /dev/null/x", "--json: .*/dev/null/x"),
        ("bench comm --rounds 1 --json=/dev/null/x", "--json: .*/dev/null/x"),
        ("plan --seq-len 8 --png /dev/null/x", "--png: .*/dev/null/x"),
        ("trace --out /dev/null/x", "--out: .*/dev/null/x"),
        ("bench table setup.py", "setup.py"),
    ],
)
def test_a_users_error_is_one_line_and_exit_code_2(
    argv: str, said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    code, out, err = run(capsys, *argv.split())
    assert code == 2
    assert out == ""
    assert re.fullmatch(rf"usp: error: .*{said}.*\n", err), err


@pytest.mark.parametrize(
    "argv",
    [
        (),
        ("dance",),
        ("plan",),
        ("plan", "--seq-len", "x"),
        ("plan", "--seq-len", "8", "--bias", "kq"),
        ("info", "--loud"),
        ("trace", "--transport", "grid"),
        ("bench", "kernels", "--gflop", "nan"),
        ("bench", "ring", "--heads", "0"),
        ("bench", "ring", "--layout", "spiral"),
        ("bench", "ring", "--transport", "spiral"),
        ("bench", "chunks", "--seq-len", "-1"),
        ("bench", "comm", "--cores", "0"),
        ("bench", "documents", "--tokens", "0"),
        ("bench", "documents", "--heads", "3"),
        ("bench", "memory", "--batch", "0"),
        ("bench", "model", "--cores", "-1"),
        ("bench", "scaling", "--accumulate", "0"),
        ("bench", "compare", "a", "b", "--allow", "0"),
    ],
)
def test_what_argparse_refuses_is_exit_code_2(
    argv: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = run(capsys, *argv)
    assert code == 2
    assert out == ""
    assert "error:" in err


def test_bench_lists_programs_and_hands_them_their_arguments(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Those of the package wherever it is installed, and those of a source tree."""
    monkeypatch.setattr(bench, "PACKAGE", tmp_path / "site-packages" / "usp")
    monkeypatch.chdir(tmp_path)
    code, out, _ = run(capfd, "bench")
    assert code == 0 and re.findall(r"^  (\S+)", out, re.MULTILINE) == list(PROGRAMS)
    monkeypatch.setitem(sys.modules, "usp.bench.kernels", mock.Mock(main=lambda argv: argv))
    assert bench.run(argparse.Namespace(name="kernels", rest=["--size", "7"])) == ["--size", "7"]
    assert "more come with the sources" in run(capfd, "bench", "block")[2]
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "pyproject.toml").touch()
    (tmp_path / "benchmarks" / "block.py").write_text(
        '"""Times one block.\n\nMore."""\nimport sys\nprint(sys.argv[1:])\nsys.exit(3)\n'
    )
    assert run(capfd, "bench")[1].endswith("of the source tree\n  block  Times one block.\n")
    code, out, _ = run(capfd, "bench", "block", "--size", "7")
    assert (code, out) == (3, "['--size', '7']\n")


def test_every_program_of_bench_is_there_and_explains_itself() -> None:
    for name in PROGRAMS:
        with pytest.raises(SystemExit) as end:
            cli.main(["bench", name, "--help"])
        assert end.value.code == 0, name


def test_python_m_usp_is_the_same_command(tmp_path: Path) -> None:
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import runpy; "
    code += "sys.argv = ['usp', '--version']; runpy.run_module('usp', run_name='__main__')"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=250
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, f"usp {__version__}\n", "")
