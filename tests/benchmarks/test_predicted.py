"""The planner's bytes and memory are those that processes count for a small transformer's step."""

from __future__ import annotations

from typing import Any

import pytest
from pool import Pool
from programs import module

SIZES = {"full": {}, "causal": {"causal": True}, "uneven": {"tokens": 250, "heads": 6}}
SMALL = {"layers": 3, "hidden": 48, "heads": 4, "mlp": 160, "tokens": 256}


def measured(size: dict[str, Any], number: int, ranks: int) -> dict[str, float]:
    """On a rank."""
    program = module("predicted")
    made = program.Size(**SMALL | size)
    return program.measure(made, program.choices(ranks, made)[number], 1)


@pytest.mark.long
@pytest.mark.parametrize(("name", "ranks"), [("full", 2), ("causal", 4), ("uneven", 4)])
def test_bytes_and_memory_of_a_step(pool: Pool, name: str, ranks: int) -> None:
    program = module("predicted")
    size = program.Size(**SMALL | SIZES[name])
    for number, choice in enumerate(program.choices(ranks, size)):
        found = pool.run(measured, SIZES[name], number, ranks, ranks=ranks)
        record = program.compared(size, choice, found)
        real, told = record["measured"], record["predicted"]
        print(choice, real, told)
        if name != "uneven":  # bytes are exact where all divide
            assert told["attention"] == real["attention"], choice
        assert told["attention"] == pytest.approx(real["attention"], rel=0.05), choice
        # a number a parameter says whether anybody used it
        marks = 4 * 6 * size.layers
        marks = sum(2 * marks * (axis.size - 1) // axis.size for axis in choice.reduced)
        assert told["gradients"] + marks == real["gradients"], choice
        assert told["memory"] == pytest.approx(real["memory"], rel=0.1), choice
