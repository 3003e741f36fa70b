"""The kernels: attention forward and backward, ring step, head exchange, merge.

usp bench kernels --quick
usp bench kernels --grid vit --json vit.json
usp bench kernels --grid llm --what forward backward --candidates "usp native" sdpa flex

Every backend of usp that takes a case stands beside torch's scaled_dot_product_attention (on a
GPU its flash and its cuDNN kernel, each forced by name), FlexAttention, and flash-attn 2, 3, 4
where they can be imported. They run in turn in one process, in both orders, with torch's own
matrix product or copy in the same rounds. Each is compared with fp64 first: whoever is off by more
than three times the best, or more than rounding explains, is not timed. On a GPU calls are
recorded as a CUDA graph where all can be. Cases whose backward would take more than --gflop are
cut to fewer samples and heads, as their lines say.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from usp.bench.attention import Own, Problem, asked, own
from usp.bench.case import GRIDS, Case, grid
from usp.bench.device import DTYPES, measured, tried
from usp.bench.exact import judged_by, relative_error, wrong
from usp.bench.libraries import MERGES, libraries
from usp.bench.options import (
    BenchError,
    Run,
    add_dtypes,
    begin,
    dtypes,
    finish,
    parse,
    parser,
    positive,
)
from usp.bench.records import Record, not_timed, time_records
from usp.bench.rivals import not_installed, rivals
from usp.bench.steps import HeadExchange, RingStep, StateMerge

WHAT = ("forward", "backward", "step", "exchange", "merge")
ATTENTION = ("forward", "backward", "both")
# Slow by design, or interpreted: timed where they are named.
NAMED_ONLY = ("usp reference", "usp triton")
STEP_TOKENS, STEP_HEADS = {"cpu": (2048, 4), "cuda": (8192, 16)}, {"cpu": 8, "cuda": 32}
DEGREES = (2, 4, 8)
_TRIED = ("time", "not_timed")


def main(argv: Sequence[str]) -> int:
    made = parser("kernels", __doc__)
    add = made.add_argument
    add("--grid", nargs="+", choices=GRIDS, default=["flash-attn"], help="which shapes")
    add("--what", nargs="+", choices=(*WHAT, "both"), default=list(WHAT))
    add("--candidates", nargs="+", metavar="NAME", help="those whose name holds one of these")
    add("--gflop", type=positive, help="of a backward at most (default on a CPU 200)")
    add_dtypes(made)
    args = parse(made, argv, grid=["tiny"], gflop=1.0)
    run = begin("kernels", args)
    cases = list(chosen(run, args, dtypes(args)))
    moves = [what for what in args.what if what not in ATTENTION]
    shapes = list(dict.fromkeys((case.dtype, case.head_dim) for case in cases)) if moves else []
    flex = bool(args.candidates) and any("flex" in name for name in args.candidates)
    for name, why in not_installed(args.device, flex).items():
        run.show.say(f"left out: {name}: {why}")
    run.add([])
    run.sink.add(run.roof.record(list(dict.fromkeys(case.dtype for case in cases))))
    with run.show.progress(len(cases) + len(shapes)):
        for case in cases:
            run.show.begin(str(case))
            attention(run, case, args, flex)
            run.show.done()
        for dtype, head_dim in shapes:
            for what in moves:
                run.show.begin(f"{what} {dtype} {head_dim}")
                MOVES[what](run, dtype, head_dim, args)
            run.show.done()
    if args.candidates and not any(r["record"] in _TRIED for r in run.sink.records):
        raise BenchError(f"no candidate's name holds one of {', '.join(args.candidates)}")
    return finish(run)


def chosen(run: Run, args: argparse.Namespace, names: list[str]) -> Iterator[Case]:
    """The cases of the grids, cut to what the device does in time; says which are too large."""
    limit = args.gflop or (200.0 if args.device == "cpu" else float("inf"))
    for name in args.grid:
        for case in grid(name, names):
            cut = case.within(limit * 1e9)
            if cut is None:
                run.show.say(f"left out: {case}: one head's backward is above {limit:g} GFLOP")
            else:
                yield cut


def wanted(name: str, args: argparse.Namespace) -> bool:
    if args.candidates:
        return any(text == name or text in name for text in args.candidates)
    return name not in NAMED_ONLY or (args.device == "cuda" and name == "usp triton")


def contestants(dtype: str, head_dim: int, args: argparse.Namespace) -> dict[str, Own]:
    found = own(DTYPES[dtype], head_dim, args.device)
    return {name: each for name, each in found.items() if wanted(name, args)}


def attention(run: Run, case: Case, args: argparse.Namespace, flex: bool) -> None:
    """A case forward and backward."""
    everyone = rivals(case, args.device, flex)
    others = {name: attend for name, attend in everyone.items() if wanted(name, args)}
    ours = contestants(case.dtype, case.head_dim, args)
    problem = Problem(case, args.device, ours, others)
    # FlexAttention has no backward on CPUs
    backward = {n: n != "flex" or args.device == "cuda" for n in problem.candidates}
    checks = {n: partial(problem.errors, n, backward[n]) for n in problem.candidates}
    errors, failed = tried(checks)
    reasons = {
        name: "; ".join(why)
        for name, _, why in asked(DTYPES[case.dtype], case.head_dim, args.device)
        if why and args.candidates and wanted(name, args)
    }
    for which in ATTENTION:
        if which not in args.what:
            continue
        refused = wrong(errors, DTYPES[case.dtype], which)
        out = {**reasons, **failed, **refused}
        if which != "forward":
            out |= {n: "it has no backward on CPUs" for n in errors if not backward[n]}
        names = [n for n in errors if n not in refused and (which == "forward" or backward[n])]
        runs = {name: problem.run(name, which) for name in names}
        more = {name: {"errors": judged_by(errors[name], which)} for name in names}
        timed(run, which, case.named(), runs, more, out, refused, case.flops(which))


def timed(
    run: Run,
    what: str,
    case: Mapping[str, Any],
    runs: Mapping[str, Callable[[], Any]],
    more: dict[str, dict[str, Any]],
    out: Mapping[str, str],
    refused: Mapping[str, str],
    flops: float = 0.0,
    moved: float = 0.0,
) -> list[Record]:
    """Candidates in turn with what bounds them: a matrix product, or a copy where bytes move."""
    if not runs:
        return run.add(not_timed(what, case, out, refused))
    roof, bound = ("copy", run.roof.bytes) if moved else ("matmul", run.roof.flops)
    dtype = DTYPES[str(case["dtype"])]
    top = run.roof.copy() if moved else run.roof.matrix(dtype)
    times, clock = measured({**runs, roof: top}, run.settings)
    work, unit = (moved, "bytes_per_s") if moved else (flops, "flops_per_s")
    for name in times.seconds:
        done = bound if name == roof else work
        told: dict[str, Any] = {unit: done / times.median(name)}
        if name != roof:
            told |= {"roof": roof, "of_roof": times.ratio(roof, name) * work / bound}
        more[name] = more.get(name, {}) | told
    found = list(time_records(what, case, times, clock=clock, more=more))
    return run.add([*found, *not_timed(what, case, out, refused)])


def randn(device: str, dtype: str, *shape: int) -> torch.Tensor:
    generator = torch.Generator(device).manual_seed(0)
    return torch.randn(shape, generator=generator, device=device).to(DTYPES[dtype])


def size(args: argparse.Namespace) -> tuple[int, int]:
    """Tokens and heads of a ring step."""
    return (128, 2) if args.quick else STEP_TOKENS[args.device]


def step(run: Run, dtype: str, head_dim: int, args: argparse.Namespace) -> None:
    """One step of a ring: all queries against a block, into a state that holds another."""
    length, heads = size(args)
    q, k, v, k2, v2 = randn(args.device, dtype, 5, 1, length, heads, head_dim)
    made = RingStep(q, ((k, v), (k2, v2)))
    ours = contestants(dtype, head_dim, args)
    steps: dict[str, Callable[..., Any]] = {n: partial(made.usp, o) for n, o in ours.items()}
    for name, library in libraries(args.device).items():
        for how, merge in MERGES.items():
            steps[f"{name} + {how}"] = partial(made.library, library, merge)
    steps = {name: call for name, call in steps.items() if name in ours or wanted(name, args)}
    if not steps:
        return
    first = next(iter(ours.values()), None) or next(
        iter(own(q.dtype, head_dim, args.device).values())
    )

    def after(call: Callable[..., Any]) -> torch.Tensor:
        state = made.state(first)
        call(state)
        assert state.out is not None
        return state.out

    results, failed = tried({name: partial(after, call) for name, call in steps.items()})
    exact = made.exact(heads - 1)
    errors = {n: {"out": relative_error(out[0, :, -1], exact)} for n, out in results.items()}
    refused = wrong(errors, DTYPES[dtype])
    runs = {n: partial(steps[n], made.state(first)) for n in errors if n not in refused}
    for name in [name for name in runs if name in ours and ours[name].backend.CARRIES_STATE]:
        runs[f"{name}, no state"] = partial(steps[name], made.no_state())
    case: dict[str, Any] = {"dtype": dtype, "length": length, "heads": heads, "head_dim": head_dim}
    more = {name: {"errors": found} for name, found in errors.items()}
    flops = 4.0 * length * length * heads * head_dim
    timed(run, "ring step", case, runs, more, {**failed, **refused}, refused, flops)


def exchange(run: Run, dtype: str, head_dim: int, args: argparse.Namespace) -> None:
    """All of a head exchange but sending."""
    tokens, heads = size(args)[0], 8 if args.quick else STEP_HEADS[args.device]
    for degree in DEGREES[:1] if args.quick else DEGREES:
        made = HeadExchange(degree, *randn(args.device, dtype, 3, 1, tokens, heads, head_dim))
        for which in ("scatter", "gather"):
            runs = {n: call for n, call in made.runs(which).items() if wanted(n, args)}
            results, failed = tried(dict(runs))
            expected = made.expected(which)
            refused = {
                name: "what arrived is not what was sent"
                for name, found in results.items()
                if not all(map(torch.equal, found, expected))
            }
            case: dict[str, Any] = {
                "dtype": dtype,
                "ranks": degree,
                "length": tokens,
                "heads": heads,
            }
            case |= {"head_dim": head_dim}
            kept = {n: call for n, call in runs.items() if n in results and n not in refused}
            out = {**failed, **refused}
            timed(run, f"exchange, {which}", case, kept, {}, out, refused, moved=made.bytes_moved)


def merge(run: Run, dtype: str, head_dim: int, args: argparse.Namespace) -> None:
    """A partial result into the fp32 state."""
    length, heads = size(args)
    made = StateMerge(*randn(args.device, dtype, 2, 1, length, heads, head_dim))
    runs = {name: call for name, call in made.runs().items() if wanted(name, args)}
    results, failed = tried({n: partial(first_of, call) for n, call in runs.items()})
    exact = made.exact()
    errors = {n: {"out": relative_error(out, exact)} for n, out in results.items()}
    refused = wrong(errors, torch.float32)
    case: dict[str, Any] = {"dtype": dtype, "length": length, "heads": heads, "head_dim": head_dim}
    more = {name: {"errors": found} for name, found in errors.items()}
    kept = {n: call for n, call in runs.items() if n in errors and n not in refused}
    out = {**failed, **refused}
    timed(run, "merge", case, kept, more, out, refused, moved=made.bytes_moved)


def first_of(call: Callable[[], tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
    """out once merged: later calls merge into the same state again."""
    return call()[0].clone()


MOVES: dict[str, Callable[[Run, str, int, argparse.Namespace], None]] = {
    "step": step,
    "exchange": exchange,
    "merge": merge,
}
