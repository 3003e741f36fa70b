"""The options that every program takes, and a run that knows them."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch

from usp.bench import machine
from usp.bench.device import DTYPES, Roof, Settings, default_device
from usp.bench.records import Record, Sink
from usp.bench.show import Show, stream_of
from usp.bench.timing import CLOCKS, LEAST_ROUNDS

NO_ANSWER = 3  # the exit code where a process died or did not answer


class BenchError(Exception):
    """What the user can mend, or why there is no answer."""


def whole(text: str) -> int:
    """An argument: a whole number, 1 or more."""
    with suppress(ValueError):
        if int(text) > 0:
            return int(text)
    raise argparse.ArgumentTypeError(f"must be 1 or more, got {text}")


def positive(text: str) -> float:
    """An argument: a number above 0."""
    with suppress(ValueError):
        if 0 < float(text) < math.inf:
            return float(text)
    raise argparse.ArgumentTypeError(f"must be above 0, got {text}")


def parser(name: str, doc: str | None) -> argparse.ArgumentParser:
    """Of a program, with the options of all: ``--json``, ``--rounds``, ``--seconds``, ..."""
    made = argparse.ArgumentParser(
        prog=f"usp bench {name}",
        description=doc,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = made.add_argument_group("of every program").add_argument
    add("--json", nargs="?", const="-", metavar="FILE", help="one record a line; no FILE: stdout")
    add("--device", choices=("cpu", "cuda"), help="by default a GPU if there is one")
    add("--rounds", type=int, default=9, help="of a case at most (default 9), 3 at least")
    add("--seconds", type=float, default=2.0, help="after which a case gets no further round")
    add("--clock", choices=CLOCKS, default="wall", help="cpu: where others use the machine, too")
    add("--threads", type=whole, help="of torch in this process")
    add("--quick", action="store_true", help="small sizes, 3 rounds: for a look")
    return made


def parse(made: argparse.ArgumentParser, argv: Sequence[str], **quick: Any) -> argparse.Namespace:
    """The arguments; with ``--quick`` those of ``quick`` where nothing else was asked for."""
    args = made.parse_args(list(argv))
    if args.quick:
        for name, value in {"rounds": LEAST_ROUNDS, "seconds": 0.0, **quick}.items():
            if getattr(args, name) == made.get_default(name):
                setattr(args, name, value)
    if not args.seconds >= 0:
        made.error(f"--seconds must be 0 or more, got {args.seconds}")
    if args.rounds < LEAST_ROUNDS:
        made.error(f"--rounds must be {LEAST_ROUNDS} or more, got {args.rounds}")
    if args.device == "cuda" and not torch.cuda.is_available():
        made.error("--device cuda, but torch sees no GPU")
    return args


def dtypes(args: argparse.Namespace) -> list[str]:
    """Those asked for, else what the device is bought for."""
    if args.dtypes:
        return list(args.dtypes)
    return ["bf16"] if args.device == "cuda" else ["fp32", "bf16"]


def add_dtypes(made: argparse.ArgumentParser) -> None:
    made.add_argument("--dtypes", nargs="+", choices=DTYPES, help="fp32 bf16; on a GPU bf16")


@dataclass
class Run:
    """One run of a program: how to measure, and where results go."""

    settings: Settings
    roof: Roof
    sink: Sink
    show: Show

    def add(self, records: Iterable[Record]) -> list[Record]:
        """Write them down and show them."""
        found = list(records)
        for record in found:
            self.sink.add(record)
        self.show.case(found)
        return found

    def exit_code(self) -> int:
        """1 where one of usp's own results was wrong."""
        wrong = [
            f"WRONG: {record['candidate']}, {record['what']}: {record['why']}"
            for record in self.sink.records
            if record["record"] == "not_timed" and record["wrong"]
            if record["candidate"].startswith("usp")
        ]
        for text in wrong:
            self.show.say(text)
        return int(bool(wrong))


def begin(program: str, args: argparse.Namespace) -> Run:
    """Says where it runs, and opens the file."""
    args.device = args.device or default_device()
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    if args.device == "cuda":
        # recording a graph needs one stream for all that led there
        torch.cuda.set_stream(torch.cuda.Stream())
    settings = Settings(args.device, args.rounds, args.seconds, args.clock)
    head = machine.header(program, args.device, vars(args), args.clock)
    try:
        sink = Sink(args.json, head)
    except OSError as error:
        raise BenchError(f"--json: {error}") from error
    show = Show(stream_of(args.json))
    show.say(machine.in_words(head))
    for text in machine.warnings(head):
        show.say(f"note: {text}")
    return Run(settings, Roof(settings, args.quick), sink, show)


def finish(run: Run) -> int:
    """The last record; the exit code."""
    run.sink.add({"record": "end", "load_average": machine.load()})
    run.sink.close()
    return run.exit_code()
