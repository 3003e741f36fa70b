"""The formula of a step's memory against the storages that the step makes, one by one."""

from __future__ import annotations

from itertools import product

import pytest
from pool import Pool

import usp
from usp.bench.memory import held, predicted
from usp.bench.models import StepCase, TrainStep, of_usp, weights_of
from usp.bench.spread import Spread
from usp.planning.choose.job import CHECKPOINTING
from usp.planning.choose.model import Model

MODELS = {
    "vit": Model("vit", 3, 192, 6, 6, 768, patch=16, gated=False, causal=False),
    "llm": Model("llm", 2, 256, 8, 2, 704, vocabulary=4096),
    "flat": Model("flat", 2, 128, 4, 4, 128, patch=8, gated=False, causal=False),
    "deep": Model("deep", 6, 64, 4, 1, 192, vocabulary=256),
}
CASES = [
    StepCase(dtype, model, tokens, 2 if accumulate > 1 else 1, accumulate, checkpointing)
    for (dtype, tokens, accumulate), model, checkpointing in product(
        (("fp32", 384, 1), ("bf16", 896, 1), ("bf16", 128, 2)), MODELS.values(), CHECKPOINTING
    )
]
# models of which attention is most, and how far above what is held a checkpoint is told
GROUPS = [
    (StepCase(*sizes, 1, 1, checkpointing, 2), most_over)
    for sizes, (checkpointing, most_over) in product(
        (
            ("bf16", Model("even", 2, 128, 8, 8, 128, patch=8, gated=False, causal=False), 896),
            ("fp32", Model("thin", 3, 128, 8, 4, 64, patch=8, gated=False, causal=True), 384),
        ),
        (("none", 0.1), ("full", 0.15)),
    )
]


def most(case: StepCase, ulysses: int, ring: int) -> int:
    """On a rank."""
    mesh = None if ulysses * ring == 1 else usp.init_mesh(ulysses, ring, device_type="cpu")
    step = TrainStep(case, weights_of(case), of_usp(case, mesh), "cpu", mesh)
    return held(step, "cpu")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_alone(case: StepCase) -> None:
    told = predicted(case, Spread(1, 1, 1), "cpu")
    real = most(case, 1, 1)
    print(f"{real} bytes, predicted {told / real:.3f} of them")
    assert told == pytest.approx(real, rel=0.1)


@pytest.mark.long
@pytest.mark.parametrize(("ulysses", "ring", "cases"), [(2, 1, 0), (1, 2, 1), (2, 2, 2), (1, 4, 3)])
def test_sharded(pool: Pool, ulysses: int, ring: int, cases: int) -> None:
    for case in CASES[cases::4]:
        told = predicted(case, Spread(1, ulysses, ring), "cpu")
        real = max(pool.run(most, case, ulysses, ring, ranks=ulysses * ring))
        print(f"{case}: {real} bytes, predicted {told / real:.3f} of them")
        assert told == pytest.approx(real, rel=0.1), case


@pytest.mark.long
@pytest.mark.parametrize(("ulysses", "ring"), [(2, 1), (1, 2), (2, 2), (1, 4)])
def test_in_groups_of_heads(pool: Pool, ulysses: int, ring: int) -> None:
    for case, most_over in GROUPS:
        told = predicted(case, Spread(1, ulysses, ring), "cpu")
        real = max(pool.run(most, case, ulysses, ring, ranks=ulysses * ring))
        print(f"{case}: {real} bytes, predicted {told / real:.3f} of them")
        assert 0.9 * real < told < (1 + most_over) * real, case
