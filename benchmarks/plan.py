"""How long planning one rank of a long sequence takes: first call, and every later one.

python benchmarks/plan.py --seq-len 1048576 --ring 8
"""

from __future__ import annotations

import argparse
import statistics
import time

from usp.planning.layout import DocumentZigzag, Layout, rows
from usp.planning.mask import make_mask
from usp.planning.plan import make_plan


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seq-len", type=int, default=1 << 20)
    parser.add_argument("--ring", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()
    documents = (*range(0, args.seq_len, 1024), args.seq_len)
    masks = {
        "full": {},
        "causal": {"causal": True},
        "window": {"causal": True, "window_size": (4096, 0)},
        "documents": {"causal": True, "cu_seqlens": documents},
    }
    layouts: dict[str, Layout] = {name: name for name in ("contiguous", "zigzag", "striped")}
    layouts["document zigzag"] = DocumentZigzag(documents)
    print(f"{args.seq_len} tokens, ring {args.ring}, median of {args.repeats} first calls")
    for layout_name, layout in layouts.items():
        for mask_name, options in masks.items():
            first, later = [], []
            for _ in range(args.repeats):
                rows.cache_clear()
                make_plan.cache_clear()
                for times in (first, later):
                    start = time.perf_counter()
                    mask = make_mask(**options)
                    make_plan(mask, layout, args.seq_len, args.seq_len, args.ring, args.ring // 2)
                    times.append(1e3 * time.perf_counter() - 1e3 * start)
            print(
                f"  {layout_name:16} {mask_name:10} first {statistics.median(first):7.2f} ms   "
                f"again {statistics.median(later):6.3f} ms"
            )


if __name__ == "__main__":
    main()
