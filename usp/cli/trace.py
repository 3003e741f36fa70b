"""``usp trace``: when each rank computes, sends, receives and waits in one step of attention."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from usp.cli.console import (
    Exit,
    NoAnswer,
    UserError,
    add_json,
    check_file,
    check_seconds,
    present,
    table,
)
from usp.cli.doctor import add_rank_options, chosen_ranks
from usp.cli.expression import parse_mask
from usp.diagnosis.ranks import Local, on_ranks
from usp.diagnosis.shown import draw, trace_events
from usp.diagnosis.spans import Span, sums
from usp.diagnosis.step import Step, spans_of, step_on
from usp.distributed.launch import launched_by
from usp.planning.route import TRANSPORTS

if TYPE_CHECKING:
    from usp.cli.console import Commands

LAYOUTS = ("contiguous", "zigzag", "striped")
ONE_LEVEL = [each for each in TRANSPORTS if each != "grid"]  # of rings
DTYPES = ("float32", "bfloat16", "float16", "float64")


def add_arguments(commands: Commands) -> argparse.ArgumentParser:
    """Describe ``usp trace`` to the parser of the command line."""
    parser = commands.add_parser(
        "trace",
        help="a timeline of one distributed step, for ui.perfetto.dev and as a picture",
        description="Runs on the ranks of torchrun or srun where one of these started it, else on "
        "processes of this machine.",
    )
    add_rank_options(parser)
    parser.add_argument("--ulysses", type=int, default=1, metavar="U", help="Ulysses degree")
    for name, default, text in (
        ("seq-len", 8192, "all tokens"),
        ("heads", 8, "of queries"),
        ("kv-heads", None, "default: --heads"),
        ("head-dim", 64, ""),
        ("batch", 1, ""),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, metavar="N", help=text)
    parser.add_argument("--layout", default="zigzag", choices=LAYOUTS)
    parser.add_argument("--transport", default="ring", choices=ONE_LEVEL)
    parser.add_argument("--mask", default="causal()", metavar="EXPR", help="as in usp plan; none")
    parser.add_argument("--dtype", default="float32", choices=DTYPES)
    parser.add_argument("--forward", action="store_true", help="without the backward")
    parser.add_argument("--seconds", type=float, default=120.0, help="it may take (default 120)")
    parser.add_argument(
        "--out", type=Path, default=Path("usp_trace.json"), help="default usp_trace.json"
    )
    parser.add_argument("--png", type=Path, metavar="FILE", help="the picture")
    add_json(parser)
    return parser


def run(arguments: argparse.Namespace) -> int:
    """Write the trace, the picture, and say where the time went."""
    check_seconds(arguments.seconds)
    check_file("out", arguments.out)
    step, ranks = _chosen(arguments)
    local = Local(ranks, step.device_type, arguments.seconds)
    try:
        found = on_ranks(step_on, step, local, grace=arguments.seconds)
    except (ValueError, NotImplementedError) as error:
        raise UserError(str(error)) from error
    if found is None:
        return Exit.RIGHT  # the first rank says it for all
    texts, failure = found
    silent = [rank for rank, said in enumerate(texts) if said is None]
    if silent:
        raise NoAnswer(failure or f"no answer from ranks {silent} (usp doctor says more)")
    spans = [spans_of(said) for said in texts if said is not None]
    title = (
        f"{step.ulysses} ulysses x {step.ring} ring, {step.seq_len} tokens, {step.heads} heads of "
        f"{step.head_dim}, {step.dtype}, {arguments.mask}, {step.layout}, {step.transport}"
    )
    files = _write(spans, title, arguments)
    told = {"step": title, "ranks": [sums(each) for each in spans], "files": files}
    present(arguments, told, lambda: _text(title, spans, files))
    return Exit.RIGHT


def _chosen(arguments: argparse.Namespace) -> tuple[Step, int]:
    device, ranks = chosen_ranks(arguments)
    try:
        launch = launched_by()
        ranks = launch.world_size if launch is not None else ranks
        mask = None if arguments.mask == "none" else parse_mask(arguments.mask)
        if mask is not None:
            mask.refuse_lengths(arguments.seq_len, arguments.seq_len)
    except ValueError as error:
        raise UserError(str(error)) from error
    if arguments.kv_heads is None:
        arguments.kv_heads = arguments.heads
    for name in ("seq_len", "heads", "kv_heads", "head_dim", "batch", "ulysses"):
        if getattr(arguments, name) < 1:
            option = name.replace("_", "-")
            raise UserError(f"--{option} must be 1 or more, got {getattr(arguments, name)}")
    if ranks % arguments.ulysses:
        raise UserError(f"--ulysses {arguments.ulysses} does not divide the {ranks} ranks")
    if arguments.heads % arguments.kv_heads:
        raise UserError(
            f"--heads {arguments.heads} is not a multiple of --kv-heads {arguments.kv_heads}"
        )
    step = Step(
        arguments.seq_len,
        arguments.heads,
        arguments.kv_heads,
        arguments.head_dim,
        arguments.batch,
        arguments.ulysses,
        ranks // arguments.ulysses,
        arguments.layout,
        arguments.transport,
        mask,
        arguments.dtype,
        device,
        not arguments.forward,
    )
    return step, ranks


def _write(spans: list[list[Span]], title: str, arguments: argparse.Namespace) -> list[str]:
    """The files that were written."""
    try:
        arguments.out.write_text(json.dumps(trace_events(spans)) + "\n")
        if arguments.png is None:
            return [str(arguments.out)]
        draw(spans, title, arguments.png)
    except ImportError:
        raise UserError("--png needs matplotlib: pip install 'usp[demo]'") from None
    except OSError as error:
        raise UserError(str(error)) from error
    return [str(arguments.out), str(arguments.png)]


def _text(title: str, spans: list[list[Span]], files: list[str]) -> str:
    rows: list[tuple[object, ...]] = [
        ("ms", "step", "computing", "waiting", "in flight", "of it hidden", "bytes sent")
    ]
    every = [sums(each) for each in spans]
    for rank, each in enumerate(every):
        times = ("step", "computing", "waiting", "in_flight", "hidden")
        rows.append(
            (f"rank {rank}", *(f"{1e3 * each[t]:.1f}" for t in times), int(each["bytes_sent"]))
        )
    flight = sum(each["in_flight"] for each in every)
    parts = [title, table(rows)]
    if flight:
        share = 100 * sum(each["hidden"] for each in every) / flight
        parts.append(
            f"{share:.0f} % of the time that messages are on their way, their rank computes"
        )
    parts.append(f"{', '.join(files)}: open the trace in ui.perfetto.dev or chrome://tracing")
    return "\n\n".join(parts)
