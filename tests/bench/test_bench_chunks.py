"""``usp bench chunks``: the ways differ in memory alone."""

from __future__ import annotations

from typing import Any

from pool import Pool

from usp.bench import chunks
from usp.bench.world import World


def told(argv: str) -> list[dict[str, Any]]:
    """On a worker: the records."""
    args = chunks.arguments(argv.split())
    found: list[dict[str, Any]] = []

    def tell(news: Any) -> None:
        if not isinstance(news, str):
            found.extend(news)

    chunks.measure_cases(World(args, args.processes, 2, "cpu", ""), tell)
    return found


def test_chunks(pool: Pool) -> None:
    argv = "--quick --seq-len 64 --chunks 4 --head-chunks --offload --dtypes fp32"
    records = pool.run(told, argv, ranks=2)[0]
    everyone = {"usp at once", "usp 4 chunks", "usp at once, offload", "usp 4 chunks, offload"}
    timed = {r["candidate"] for r in records if r["record"] == "time" and r["what"] == "both"}
    assert timed == everyone
    peaks = {r["candidate"]: r["values"] for r in records if r["what"] == "peak, both"}
    assert set(peaks) == everyone
    assert len({values["bytes_sent"] for values in peaks.values()}) == 1
    assert peaks["usp 4 chunks"]["of_plain"] < 0.9
