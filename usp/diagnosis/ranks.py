"""The ranks of a command: those that torchrun or srun started, or processes of this machine."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from usp.distributed import comm
from usp.distributed.launch import launched_by
from usp.distributed.processes import ProcessFailed, Tell, run

Note = Callable[[str], None]
# (settings, rank, ranks, note) -> what the rank has to say; ``note`` is told how far it is.
Work = Callable[[Any, int, int, Note], str]
_KEY = "usp/diagnosis"


@dataclass(frozen=True)
class Local:
    """Processes of this machine, where no launcher has started any.

    Attributes:
        count: How many.
        device_type: "cpu", or "cuda" for a GPU each.
        seconds: How long they may take together.
    """

    count: int
    device_type: str
    seconds: float


@dataclass(frozen=True)
class _Task:
    work: Work
    settings: Any
    local: Local
    folder: str


def on_ranks(
    work: Work, settings: Any, local: Local, grace: float
) -> tuple[list[str | None], str] | None:
    """Let every rank work, and hear what each has to say.

    Args:
        work: A function of a module; it joins nothing and leaves nothing, that was done.
        local: Which ranks to start where no launcher has.
        grace: How many seconds rank 0 waits for the others after it is done.

    Returns:
        What each said, None where it did not answer, and why, in words. None on other ranks than
        the first of a launcher's.

    Raises:
        ValueError: a launcher's variables contradict each other.
    """
    launch = launched_by()
    if launch is not None:
        rank, count = launch.rank, launch.world_size
        # a store of its own connection: whoever hangs may hold that of the process group
        said = work(settings, rank, count, lambda text: None)
        if rank or not comm.has_begun():
            if comm.has_begun():
                comm.post(f"{_KEY}/{rank}", said)
            return None if rank else ([said, *[None] * (count - 1)], "")
        others = comm.posted([f"{_KEY}/{other}" for other in range(1, count)], grace)
        return [said, *others], ""
    with tempfile.TemporaryDirectory(prefix="usp-ranks-") as folder:
        task = _Task(work, settings, local, folder)
        try:
            return list(run(_on_rank, task, local.count, _nothing, local.seconds)), ""
        except ProcessFailed as error:
            if error.details:
                print(error.details, file=sys.stderr)
            kept = [_kept(folder, rank) for rank in range(local.count)]
            return kept, f"{error}{_where(folder, local.count)}"


def _on_rank(task: _Task, rank: int, tell: Tell) -> str:
    local = task.local
    if local.device_type == "cpu":
        torch.set_num_threads(1)
    else:
        torch.accelerator.set_device_index(rank)

    def note(text: str) -> None:
        Path(task.folder, f"at-{rank}").write_text(text)

    store = str(Path(task.folder, "rendezvous"))
    backend = "gloo" if local.device_type == "cpu" else None
    comm.join_locally(store, rank, local.count, local.seconds, backend)
    said = task.work(task.settings, rank, local.count, note)
    scratch = Path(task.folder, f"saying-{rank}")
    scratch.write_text(said)
    scratch.rename(Path(task.folder, f"said-{rank}"))  # it counts where another rank fails
    return said


def _kept(folder: str, rank: int) -> str | None:
    with suppress(OSError):
        return Path(folder, f"said-{rank}").read_text()
    return None


def _where(folder: str, count: int) -> str:
    """How far those are that have not answered."""
    found = []
    for rank in range(count):
        with suppress(OSError):
            if _kept(folder, rank) is None:
                found.append(f"rank {rank} in {Path(folder, f'at-{rank}').read_text()!r}")
    return f"; {', '.join(found)}" if found else ""


def _nothing(done: int, total: int) -> None:
    """Nobody asks how far it is."""
