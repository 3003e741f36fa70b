"""Which backend "auto" prefers on which device, and the measurements that decided it.

A row stands here only if committed results say so, and a test holds it to them: where a file of
another order, or of a device without a row, lies among the results, that test fails. Devices
without a row have not been measured; there the order is a guess: ``GUESSES``, and then that of
``backends.TABLE``. So are the orders of who merges and packs, which lie with these ops:
``ops/merge.py``, ``ops/pack.py``.
"""

from __future__ import annotations

from dataclasses import dataclass

from usp.machine import cpu


@dataclass(frozen=True)
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


def order(architecture: str) -> tuple[str, ...]:
    """Names of backends, those to be asked first; the others follow as they stand."""
    return preference(architecture).order or GUESSES.get(architecture, ())


def preference(architecture: str) -> Preference:
    """The row of a device, ``NOT_MEASURED`` where no committed result is of its kind."""
    return PREFERENCES.get(measured_on(architecture), NOT_MEASURED)
