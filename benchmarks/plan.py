"""How long planning one rank of a long sequence takes: first call, and every later one.

usp bench plan --seq-len 1048576 --ring 8 --json plan.json

"backward" is what a backward adds in which queries travel; others use the forward's plan.
"""

from __future__ import annotations

import argparse
import statistics
import time
from functools import partial
from math import isqrt
from pathlib import Path

from usp import masks
from usp.bench.machine import header
from usp.bench.records import write_report
from usp.planning.layout import DocumentZigzag, Layout, rows
from usp.planning.masks.window import lines_of
from usp.planning.plan import make_plan
from usp.planning.query_ring import make_query_ring
from usp.planning.reach import needed_queries, needed_rows
from usp.planning.samples import masks_of

CACHES = rows, lines_of, needed_rows, needed_queries, make_plan, make_query_ring


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seq-len", type=int, default=1 << 20)
    parser.add_argument("--ring", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", type=Path, help="write every time taken there")
    args = parser.parse_args()
    seq_len, lengths = args.seq_len, (args.seq_len, args.seq_len)
    documents = (*range(0, seq_len, 1024), seq_len)
    side = isqrt(seq_len)
    each = {
        "full": masks.everything(),
        "causal": masks.causal(),
        "window": masks.window(512, 512),
        "window, 16 registers": masks.window(512, 512)
        | masks.first_keys(16)
        | masks.first_queries(16),
        "documents": masks.causal() & masks.documents(documents),
        "blocks": masks.blocks(documents),
        "shared prefix": masks.causal()
        & masks.shared_prefix((0, *documents[len(documents) // 2 :])),
        "neighbourhood 13 x 13": masks.neighbourhood((side, side), 13),
        "the same, shifted": masks.neighbourhood((side, side), 13, edges="shift"),
    }
    layouts: dict[str, Layout] = {name: name for name in ("contiguous", "zigzag", "striped")}
    layouts["document zigzag"] = DocumentZigzag(documents)
    print(f"{seq_len} tokens, ring {args.ring}, median of {args.repeats} first calls")
    plans = []
    for layout_name, layout in layouts.items():
        for name, mask in each.items():
            first, later, backward = [], [], []
            what = masks_of(mask), (layout, layout), lengths, args.ring, args.ring // 2
            for _ in range(args.repeats):
                for cache in CACHES:
                    cache.cache_clear()
                for times, run in (
                    (first, partial(make_plan, *what)),
                    (later, partial(make_plan, *what)),
                    (backward, partial(make_query_ring, *what, "auto")),
                ):
                    start = time.perf_counter()
                    run()
                    times.append(1e3 * time.perf_counter() - 1e3 * start)
            print(
                f"  {layout_name:16} {name:22} first {statistics.median(first):7.2f} ms   "
                f"again {statistics.median(later):6.3f} ms   "
                f"backward {statistics.median(backward):7.2f} ms"
            )
            found = {"first_ms": first, "later_ms": later, "backward_ms": backward}
            plans.append({"layout": layout_name, "mask": name, **found})
    write_report(args.json, header("plan", "cpu", vars(args), "wall"), plans=plans)


if __name__ == "__main__":
    main()
