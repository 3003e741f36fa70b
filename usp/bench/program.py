"""A program whose measuring is done by processes of its own."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from itertools import groupby
from typing import Any

from usp.bench import world as worlds
from usp.bench.options import NO_ANSWER, BenchError, Run, begin, finish
from usp.bench.records import Record
from usp.machine import cpu


def run_in_processes(
    name: str,
    args: argparse.Namespace,
    work: Callable[..., Any],
    cases: int,
    after: Callable[[Run], Iterable[Record]] = lambda run: (),
) -> int:
    """Begin, take what rank 0 of ``args.processes`` tells, finish: the exit code.

    Args:
        work: ``work(world, rank, tell)``; ``tell`` takes the name of a case that begins, or the
            records of one that is over.
        cases: How many there are.
        after: Records that are made of all.
    """
    run = begin(name, args)

    def hear(news: Any) -> None:
        if isinstance(news, str):
            run.show.begin(news)
        else:
            run.add(news)
            run.show.done()

    if worlds.device_for(args.processes, args.device) != args.device:
        run.show.say(f"note: {args.processes} processes have no GPU each: they run on the CPU")
    cores = getattr(args, "cores", None) or len(cpu.cores())
    if args.device == "cpu" and args.processes > cores:
        run.show.say(f"note: {args.processes} processes share {cores} cores: they compute in turn")
    try:
        with run.show.progress(cases):
            worlds.in_processes(work, args, args.processes, hear)
    except BenchError as error:
        run.show.say(str(error))
        finish(run)
        return NO_ANSWER
    for _, of_case in groupby(after(run), key=lambda record: (record["what"], record["case"])):
        run.add(of_case)
    return finish(run)
