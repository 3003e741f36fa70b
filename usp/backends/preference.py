"""Which backend "auto" prefers on which device, and the measurements that decided it.

A row stands here only if committed results say so, and a test holds it to them: where a file of
another order, or of a device without a row, lies among the results, that test fails. Devices
without a row have not been measured; there the order of ``backends.TABLE`` is a guess. So are the
orders of who merges and packs, which lie with these ops: ``ops/merge.py``, ``ops/pack.py``.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Preference:
    """What "auto" tries first.

    Attributes:
        order: Names of backends, the fastest first; those not named come after them.
        results: The files in benchmarks/results that say so.
    """

    order: tuple[str, ...] = ()
    results: tuple[str, ...] = ()


# By architecture, as ``kernels.architecture`` names it.
PREFERENCES: dict[str, Preference] = {
    "cpu": Preference(
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


def preference(architecture: str) -> Preference:
    return PREFERENCES.get(architecture, NOT_MEASURED)
