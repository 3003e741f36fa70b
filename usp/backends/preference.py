"""Which backend "auto" prefers on which device, and the measurements that decided it.

A row stands here only if committed results say so, and a test holds it to them: where a file of
another order, or of a device without a row, lies among the results, that test fails. What the user
has measured on this very machine counts before it. Devices without a row have not been measured:
there libraries come first, whose kernels others have proved, and then a guess, ``GUESSES`` and the
order of ``backends.TABLE``. So are the orders of who merges and packs, which lie with these ops:
``ops/merge.py``, ``ops/pack.py``.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from usp.backends._local import LocalRow
from usp.machine import cpu


@dataclass(frozen=True, eq=False)  # told apart quickly, at each call
class Preference:
    """What "auto" tries first.

    Attributes:
        order: Names of backends, the fastest first; those not named come after them.
        results: The files in benchmarks/results that say so.
    """

    order: tuple[str, ...] = ()
    results: tuple[str, ...] = ()


# By what ``measured_on`` says.
PREFERENCES: dict[str, Preference] = {
    "cpu AMD avx512_bf16": Preference(
        ("native", "sdpa"),
        (
            "2026-11-21b-cpu_attention-16384-epyc-2-cores.json",
            "2026-11-21b-cpu_attention-bf16-512-2048-epyc-2-cores.json",
            "2026-11-21b-cpu_attention-bf16-8192-epyc-2-cores.json",
            "2026-11-21b-cpu_attention-fp32-512-2048-epyc-2-cores.json",
            "2026-11-21b-cpu_attention-fp32-8192-epyc-2-cores.json",
            "2026-11-21b-cpu_attention-gqa-epyc-2-cores.json",
            "2026-11-21b-cpu_attention-short-epyc-2-cores.json",
        ),
    ),
}
NOT_MEASURED = Preference()
# By architecture. A CPU without a row is taken to be like the one that has one.
GUESSES: dict[str, tuple[str, ...]] = {"cpu": ("native", "sdpa")}


def measured_on(architecture: str) -> str:
    """What a row holds for: of a GPU the architecture, of a CPU its maker and instruction set.

    Args:
        architecture: As ``kernels.architecture`` names it.
    """
    return cpu.kind() if architecture == "cpu" else architecture


@dataclass(frozen=True, eq=False)
class Source:
    """Some names in an order, and where they come from."""

    names: tuple[str, ...]
    why: str


@lru_cache(maxsize=64)
def sources(
    architecture: str,
    row: Preference,
    local: LocalRow | None = None,
    proven: tuple[str, ...] = (),
) -> tuple[Source, ...]:
    """What says who is asked first, in the order in which it counts; never none.

    Args:
        architecture: As ``kernels.architecture`` names it.
        row: What committed results say.
        local: What was measured on this very machine, if anything was.
        proven: Libraries whose kernels others have proved there, in order of trust.
    """
    found = []
    if local is not None:
        found.append(Source(local.order, f"measured here by usp tune, {local.date}"))
    if row.order:
        found.append(Source(row.order, "committed results of such a device"))
    if proven:
        found.append(Source(proven, "not measured: libraries first, whose kernels others proved"))
    return *found, Source(GUESSES.get(architecture, ()), "a guess: not measured")


def preference(architecture: str) -> Preference:
    """The row of a device, ``NOT_MEASURED`` where no committed result is of its kind."""
    return PREFERENCES.get(measured_on(architecture), NOT_MEASURED)
