"""`usp demo`: its parts, a whole small run, and runs that must fail."""

from __future__ import annotations

import json
import os
import re
import tempfile
from functools import partial

import pytest
import torch

from usp.cli import main as command
from usp.demo.compare import Difference, difference, differences, of_copies
from usp.demo.image import PatchGrid, choose_grid, crop, cut_patches, load_photograph
from usp.demo.limit import Refusal, can_limit, memory_limit
from usp.demo.model import PatchTransformer, grid_embedding, hidden_patches, reconstruction_loss
from usp.demo.settings import TOLERANCES
from usp.distributed.processes import ProcessFailed, run

pytest.importorskip("skimage")
pytest.importorskip("matplotlib")
pytest.importorskip("rich")


@pytest.mark.parametrize("tokens", [1, 50, 1009, 16384, 200_000])
def test_grid_is_odd_large_enough_and_fits(tokens):
    height, width = load_photograph().shape[:2]
    grid = choose_grid(height, width, tokens)
    assert tokens <= grid.tokens <= 1.5 * tokens + 8
    assert grid.rows % 2 == grid.columns % 2 == 1
    assert grid.rows * grid.patch_size <= height
    assert grid.columns * grid.patch_size <= width


def test_default_grid_covers_most_of_the_picture():
    height, width = load_photograph().shape[:2]
    grid = choose_grid(height, width, 16384)
    assert grid.tokens * grid.patch_size**2 > 0.9 * height * width


def test_more_patches_than_pixels():
    with pytest.raises(ValueError, match=r"900000 tokens .* 872 x 1000"):
        choose_grid(872, 1000, 900_000)


def test_patches_are_the_picture():
    photograph, grid = load_photograph(), PatchGrid(13, 17, 7)
    patches = cut_patches(photograph, grid)
    assert patches.shape == (grid.tokens, grid.patch_dim)
    assert abs(float(patches.mean())) < 1e-4 and abs(float(patches.std()) - 1) < 1e-4
    picture = torch.tensor(crop(photograph, grid)).float() / 255
    picture = (picture - picture.mean()) / picture.std()
    rows_and_columns = grid.coordinates(torch.arange(grid.tokens)).tolist()
    for token in (0, 16, 17, 100, grid.tokens - 1):
        row, column = (7 * n for n in rows_and_columns[token])
        tile = picture[row : row + 7, column : column + 7]
        assert torch.equal(patches[token].view(7, 7, 3), tile)


def test_hidden_patches_are_the_same_in_every_process():
    grid = PatchGrid(31, 37, 1)
    hidden = hidden_patches(grid, 0.5, seed=1)
    torch.rand(7)
    assert torch.equal(hidden, hidden_patches(grid, 0.5, seed=1))
    assert 0.4 < hidden.float().mean() < 0.6


def test_the_model_is_told_what_is_hidden_and_where():
    torch.manual_seed(0)
    model = PatchTransformer(patch_dim=5, embed_dim=8, num_heads=2, depth=1)
    patches = torch.randn(1, 6, 5)
    coordinates = torch.tensor([[[0, 0], [0, 1], [0, 2], [1, 0], [1, 1], [1, 2]]])
    hidden = torch.tensor([[False, True, False, False, False, False]])
    output = model(patches, coordinates, hidden)
    other = patches.clone()
    other[0, 1] += 1
    assert torch.equal(model(other, coordinates, hidden), output)
    other[0, 2] += 1
    assert not torch.equal(model(other, coordinates, hidden), output)
    assert not torch.equal(model(patches, coordinates + 1, hidden), output)


def test_embedding_refuses_odd_widths():
    with pytest.raises(ValueError, match="multiple of 4, got 10"):
        grid_embedding(torch.zeros(3, 2), 10)


def test_losses_of_parts_add_up():
    output, patches = torch.randn(2, 1, 11, 3, dtype=torch.float64)
    hidden = torch.rand(1, 11) < 0.5
    whole = reconstruction_loss(output, patches, hidden, 17)
    parts = [
        reconstruction_loss(output[:, s], patches[:, s], hidden[:, s], 17)
        for s in (slice(0, 4), slice(4, 11), slice(11, 11))
    ]
    assert abs(float(whole - sum(parts))) < 1e-12
    assert float(whole) > 0


def test_difference_sees_one_wrong_value():
    expected = torch.linspace(-4, 3, 100)
    actual = expected.clone()
    actual[41] += 0.5
    found = difference("x", actual, expected)
    assert found.absolute == pytest.approx(0.5) and found.largest == 4
    assert found.relative == pytest.approx(0.125)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_a_number_is_infinitely_far(bad):
    actual = torch.zeros(3)
    actual[1] = bad
    assert difference("x", actual, torch.ones(3)).relative == float("inf")
    assert Difference("x", 1.0, 0.0).relative == float("inf")


def test_differences_show_the_worst_parameter_and_miss_nothing():
    names = ("output", "gradient of the patches", "gradient of a", "gradient of b")
    expected = {name: torch.ones(4) for name in names}
    actual = {name: value.clone() for name, value in expected.items()}
    actual["gradient of b"][2] = 1.25
    found = differences(actual, expected)
    assert [d.name for d in found] == ["output", "gradient of the patches", "gradient of b"]
    assert [d.relative for d in found] == [0, 0, 0.25]
    del actual["gradient of a"]
    with pytest.raises(ValueError, match="gradient of a"):
        differences(actual, expected)
    with pytest.raises(ValueError, match=r"\(3,\), expected \(4,\)"):
        difference("x", torch.ones(3), torch.ones(4))


def test_a_picture_many_times_over_has_its_output_and_gradients() -> None:
    torch.manual_seed(0)
    grid = PatchGrid(3, 5, 1)
    model = PatchTransformer(patch_dim=3, embed_dim=8, num_heads=2, depth=2).double()
    picture, hidden = torch.randn(1, 15, 3).double(), hidden_patches(grid, 0.5, seed=1)
    found = []
    for times in (1, 3):
        model.zero_grad()
        x = picture.repeat(1, times, 1).requires_grad_()
        where = grid.coordinates(torch.arange(15 * times) % 15)[None]
        output = model(x, where, hidden.repeat(1, times))
        count = times * 3 * int(hidden.sum())
        reconstruction_loss(output, x.detach(), hidden.repeat(1, times), count).backward()
        values = {"output": output.detach(), "gradient of the patches": x.grad}
        found.append(values | {n: p.grad.clone() for n, p in model.named_parameters()})
    assert all(d.relative < 1e-12 for d in differences(found[1], of_copies(found[0], 3)))


def _allocate(sizes, rank, tell):
    limit, size = sizes
    with Refusal() as refusal, memory_limit(limit):
        torch.empty(size, dtype=torch.uint8)
    torch.empty(8 * size, dtype=torch.uint8)  # the limit is gone
    return refusal.found


@pytest.mark.skipif(not can_limit(), reason="RLIMIT_DATA is Linux's")
def test_a_process_cannot_take_more_than_its_limit() -> None:
    mib = 2**20
    (found,) = run(_allocate, (64 * mib, 128 * mib), 1, lambda *_: None)
    assert found is not None and "can't allocate memory" in found.said
    assert run(_allocate, (256 * mib, 128 * mib), 1, lambda *_: None) == [None]
    with pytest.raises(RuntimeError, match="shape"), Refusal():
        torch.ones(3).view(2)  # no matter of memory


@pytest.mark.long
@pytest.mark.skipif(not can_limit(), reason="RLIMIT_DATA is Linux's")
def test_one_process_runs_out_of_memory_where_four_finish(tmp_path, capsys) -> None:
    options = ["--tokens", "3000", "--train-steps", "1", "--out", str(tmp_path / "x.png")]
    assert main([*options, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    memory = found["memory"]
    assert memory["one_process"]["out_of_memory"]
    assert len(memory["processes"]) == 4 and memory["tokens"] == 2 * found["tokens"]
    for cost in memory["processes"]:
        assert 0 < cost["peak_memory"] - cost["memory_before"] < memory["limit"]
        for which in ("forward", "backward"):
            assert cost[f"{which}_bytes"] == cost[f"{which}_bytes_expected"] > 0
    assert all(d["relative"] <= found["tolerance"] for d in memory["differences"])
    assert (tmp_path / "x_memory.png").stat().st_size > 1000


def main(options: list[str]) -> int:
    return command(["demo", *options])


def _work(how, rank, tell):
    tell(1, 2)
    if rank == 1 and how == "raise":
        raise KeyError("lost")
    if rank == 1 and how == "die":
        os._exit(7)
    if how != "return":
        # the others are ended, not waited for
        import time

        time.sleep(120)
    return rank * 10


def test_processes_return_their_results_and_progress():
    heard = []
    assert run(_work, "return", 2, lambda *progress: heard.append(progress)) == [0, 10]
    assert heard == [(1, 2)]


@pytest.mark.timeout(250)
@pytest.mark.parametrize(
    ("how", "message"), [("raise", "process 1 of 2 failed: KeyError"), ("die", "exit code 7")]
)
def test_a_failing_process_ends_the_others(how, message):
    with pytest.raises(ProcessFailed, match=message) as caught:
        run(_work, how, 2, lambda *_: None)
    assert ("lost" in caught.value.details) == (how == "raise")


SMALL = ["--tokens", "170", "--train-steps", "2", "--times", "1"]


def _rows(output):
    """Cells of the printed tables, by the first cell."""
    lines = [re.split(r"\s*[│┃]\s*", line.strip(" │┃")) for line in output.splitlines()]
    return {cells[0].strip(): cells[1:] for cells in lines if len(cells) > 1}


def _check_report(output, something_sent):
    rows = _rows(output)
    assert "output" in rows and "gradient of the patches" in rows
    for name in ("forward", "backward"):
        plain, alone, sharded = rows[f"{name}, bytes sent each"]
        assert plain == alone == "0" and (sharded != "0") == something_sent
        assert all(float(seconds) >= 0 for seconds in rows[f"{name}, seconds"])
    words = " ".join(output.split())
    assert re.search(r"One process with usp took \d+\.\d\d of the time that torch.nn took", words)
    assert ("no faster than one" in words) == something_sent
    formula = [line for line in output.splitlines() if "by the formula" in line]
    counted = [line for line in output.splitlines() if "bytes sent each" in line]
    cells = [[re.split(r"\s*[│┃]\s*", line)[-2] for line in lines] for lines in (counted, formula)]
    assert len(cells[0]) == 2 and cells[0] == cells[1]


@pytest.mark.parametrize(
    "options",
    [
        ["--ulysses", "2", "--ring", "2"],
        ["--ulysses", "1", "--ring", "2", "--layout", "zigzag", "--dtype", "bfloat16"],
    ],
)
def test_a_small_demo(tmp_path, capsys, monkeypatch, options):
    monkeypatch.setenv("COLUMNS", "100")
    out = tmp_path / "new" / "picture.png"
    # where its processes meet
    folder = partial(tempfile.TemporaryDirectory, dir=tmp_path)
    monkeypatch.setattr(tempfile, "TemporaryDirectory", lambda prefix: folder(prefix="a %20 b "))
    code = main([*SMALL, *options, "--out", str(out)])
    printed = capsys.readouterr()
    assert code == 0, printed
    assert "Without the part on memory: --times 1" in printed.out
    _check_report(printed.out, something_sent=True)
    from matplotlib import image

    picture = image.imread(out)
    assert min(picture.shape[:2]) > 300 and picture.std() > 0.05


def test_a_difference_beyond_the_tolerance_is_a_failure(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    # on one device the two may agree to the last bit
    monkeypatch.setitem(TOLERANCES, "float32", -1.0)
    code = main([*SMALL, "--ring", "1", "--ulysses", "1", "--out", str(tmp_path / "x.png")])
    printed = capsys.readouterr()
    assert code == 1
    assert re.search(r"wrong: .* differs by \S+ of its largest value, more than", printed.out)
    _check_report(printed.out, something_sent=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--ring", "0"], "--ring must be 1 or more, got 0"),
        (["--tokens", "0"], "--tokens must be 1 or more, got 0"),
        (["--times", "0"], "--times must be 1 or more, got 0"),
        (["--train-steps", "-1"], "--train-steps must be 0 or more, got -1"),
        (["--tokens", "900000"], "900000 tokens asked for"),
        (["--out", "x.doc"], "--out must end in ."),
        (["--out", f"{__file__}/x.png"], "--out: [Errno"),
    ],
)
def test_what_cannot_start_is_one_line(capsys, options, message):
    assert main(options) == 2
    error = capsys.readouterr().err
    assert message in error and len(error.splitlines()) == 1
