"""What each rank does for ``usp doctor``: the checks in order, with a limit of time."""

from __future__ import annotations

import platform
import sys
import threading
import time
from dataclasses import dataclass

import torch

from usp._version import __version__
from usp.diagnosis import links
from usp.diagnosis.checks import Check, LeftOut, Wrong, checks
from usp.diagnosis.ranks import Note
from usp.diagnosis.report import LEFT_OUT, NO_ANSWER, RAISED, RIGHT, WRONG, Outcome, RankReport
from usp.distributed.making import init_mesh
from usp.distributed.mesh import SequenceMesh
from usp.machine import cpu
from usp.ops import native

START = "start"
# of a check that compiles kernels first, which no other rank waits for
ALONE = 10


@dataclass(frozen=True)
class Examination:
    """What all ranks are told.

    Attributes:
        device_type: Where they compute.
        seconds: How long a check may take.
    """

    device_type: str
    seconds: float


class _Progress:
    """Where the thread that works is, for the one that watches."""

    def __init__(self, report: RankReport, note: Note) -> None:
        self.report, self._note = report, note
        self.enter(START, is_alone=False)

    def enter(self, check: str, is_alone: bool) -> None:
        self._note(check)
        self.check, self.is_alone, self.since = check, is_alone, time.monotonic()

    def leave(self, state: str, said: str) -> None:
        seconds = time.monotonic() - self.since
        self.report.outcomes.append(Outcome(self.check, state, said, seconds))


def examine(task: Examination, rank: int, ranks: int, note: Note) -> str:
    """All checks on this rank; what came of them, as text."""
    report = RankReport(rank, about(task.device_type))
    progress = _Progress(report, note)
    thread = threading.Thread(target=_work, args=(task, ranks, progress), daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(0.05)
        limit = task.seconds * (ALONE if progress.is_alone else 1)
        if thread.is_alive() and time.monotonic() - progress.since > limit:
            progress.leave(NO_ANSWER, f"no further in {limit:.0f} s")
            break
    return report.to_text()


def about(device_type: str) -> dict[str, str]:
    """Who this rank is, and what must be the same on all."""
    device = cpu.model()
    if device_type != "cpu":
        device = torch.cuda.get_device_name()
    return {
        "host": platform.node(),
        "device": device,
        "device type": device_type,
        "python": sys.version.split()[0],
        "torch": str(torch.__version__),
        "usp": __version__,
        "compiled ops": native.load_error() or "there",
    }


def _work(task: Examination, ranks: int, progress: _Progress) -> None:
    try:
        here = _device(task.device_type)
        made: dict[tuple[int, int], SequenceMesh] = {}

        def mesh_of(ulysses: int, ring: int) -> SequenceMesh:
            degrees = ulysses, ring or ranks
            if degrees not in made:
                progress.enter(f"groups of {degrees[0]} ulysses x {degrees[1]} ring", False)
                made[degrees] = init_mesh(*degrees, device_type=task.device_type)
                progress.leave(RIGHT, "")
            return made[degrees]

        progress.leave(RIGHT, "")
        for check in checks(mesh_of, here):
            if not _took(check, progress):
                return
        if ranks > 1:
            progress.enter("links", False)
            axis = mesh_of(1, 0).ring
            hosts = axis.gather_objects(platform.node())
            progress.report.links = links.measured(axis, here, hosts)
            progress.leave(RIGHT, "")
    except Exception as error:
        progress.leave(RAISED, f"{type(error).__name__}: {error}")


def _device(device_type: str) -> torch.device:
    if device_type == "cpu":
        torch.set_num_threads(1)
        return torch.device("cpu")
    return torch.device(device_type, torch.accelerator.current_device_index())


def _took(check: Check, progress: _Progress) -> bool:
    """Make a check; whether the next one can be made, for ranks that parted must not meet again."""
    progress.enter(check.name, check.is_alone)
    try:
        progress.leave(RIGHT, check.run())
    except LeftOut as reason:
        progress.leave(LEFT_OUT, str(reason))
    except Wrong as error:
        progress.leave(WRONG, str(error))
    except Exception as error:
        progress.leave(RAISED, f"{type(error).__name__}: {' '.join(str(error).split())[:400]}")
        return check.is_alone
    return True
