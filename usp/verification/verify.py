"""``usp.verify``: a model whole and sharded, on processes of this machine."""

from __future__ import annotations

import os
import pickle
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from usp.distributed.comm import join_locally
from usp.distributed.making import init_mesh
from usp.distributed.mesh import SequenceMesh
from usp.distributed.processes import ProcessFailed, Tell, run
from usp.integrations._boundary import Boundary
from usp.integrations.parallelize import trunks_of
from usp.planning.kinds import integer, real
from usp.planning.layout import Layout, check_layout
from usp.verification.job import Job, Loss, Sharded, random_module, run_sharded, run_whole
from usp.verification.join import Places
from usp.verification.record import Record
from usp.verification.verdict import Failure, Verification, judged

# for a rank that others wait for; and for processes to start and to import what models need
_GRACE, _START = 5.0, 120.0
_STARTS_AGAIN = (
    'a program that calls usp.verify outside of `if __name__ == "__main__":` would call it again '
    "in each of its processes"
)


def verify(
    model: nn.Module,
    inputs: Any,
    mesh_shape: tuple[int, int] = (2, 2),
    trunk: str | Boundary | Sequence[str | Boundary] | None = None,
    *,
    sharded: Sharded | None = None,
    loss: Loss | None = None,
    layout: Layout = "contiguous",
    seed: int = 0,
    seconds: float = 60.0,
) -> Verification:
    """Run a model whole, and sharded on processes of this machine, and say where they part.

    Both run on the CPU, in fp64 where the model can, with dropout off and the same seed. Outputs,
    the loss and every parameter's gradient, summed over the ranks, must be those of one device;
    where they are not, what each module was given and returned, and the gradients of these, are
    compared in order, and the first module that is at fault is named, with the likely cause.
    ``DropPath`` of a model in training mode is run once more with its random numbers, which must
    drop the same samples on all ranks.

    Everything in memory is kept, whole, for each module: take few tokens, and lengths that no
    number of ranks divides.

    Args:
        model: Whole, on one device; it stays as it is. It goes to other processes, so that its
            classes must be those of a module, and a program that calls this needs
            ``if __name__ == "__main__":``.
        inputs: Of its call, whole: a tensor, a tuple of arguments or a dict of named ones.
        mesh_shape: Degrees of Ulysses and of the ring.
        trunk: Of ``usp.parallelize``, which shards it.
        sharded: In place of ``usp.parallelize``: ``sharded(model, mesh)`` makes of a copy what is
            called on each rank, with the whole inputs; None is the copy itself. What that returns,
            whole or this rank's part, is compared.
        loss: ``loss(what the model returns, mesh)``, a number as in the training loop; ``mesh`` is
            None on one device. By default a single number that the model returns, else the
            product with a drawn cotangent, of which each rank takes its part.
        layout: In which ranks hold their tokens.
        seed: Of torch's generator, on all ranks the same.
        seconds: How long the ranks may take.

    Returns:
        The verdict. What a rank raises, and a rank that comes no further, is one too.

    Raises:
        TypeError: something cannot be handed to other processes; names it.
        ValueError: the mesh has one rank, seconds are not positive, the trunk is not known or not
            there, or the whole model raises.

    Example:
        >>> print(usp.verify(model, {"x": images}, mesh_shape=(1, 2), trunk="blocks"))
        >>> assert usp.verify(model, images, sharded=my_sharding)
    """
    degrees = tuple(integer("mesh_shape", degree, least=1) for degree in mesh_shape)
    if len(degrees) != 2 or degrees[0] * degrees[1] < 2:
        raise ValueError(
            f"mesh_shape must be (ulysses_degree, ring_degree) of 2 ranks or more, got {mesh_shape}"
        )
    check_layout(layout)
    if real("seconds", seconds) <= 0:
        raise ValueError(f"seconds must be positive, got {seconds}")
    job = Job(
        model,
        _arguments(inputs),
        (degrees[0], degrees[1]),
        trunk,
        sharded,
        loss,
        layout,
        None,
        seed,
    )
    job.to_bytes()
    job, whole = whole_of(job)
    if sharded is None:
        trunks_of(model, trunk)  # else each rank would refuse it, which is no finding about a model
    shaken = random_module(job, whole)
    if shaken is not None:
        return of_random(shaken, job)
    outcomes = _on_processes(job, whole, seconds)
    return judged(model, whole, outcomes, places_of(job), job.run_dtype())


def _arguments(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(inputs, dict):
        return (), dict(inputs)
    return (tuple(inputs), {}) if isinstance(inputs, tuple | list) else ((inputs,), {})


def places_of(job: Job) -> Places:
    ulysses, ring = job.mesh_shape
    return Places((ring, ulysses), job.layout)


def whole_of(job: Job) -> tuple[Job, Record]:
    """The run on one device, and the job in the dtype in which it runs.

    Raises:
        ValueError: it raises in each.
    """
    try:
        exact = replace(job, dtype=torch.float64)
        return exact, run_whole(exact)
    except Exception:  # no fp64: whatever it is, its own dtype says
        try:
            return job, run_whole(job)
        except Exception as error:
            raise ValueError(
                f"the whole model raises on one device, {type(error).__name__}: {error}"
            ) from error


def of_random(module: str, job: Job) -> Verification:
    """The verdict on a model that another seed changes."""
    return Verification(
        False,
        module,
        "random",
        "on one device it gives something else with another seed, so that runs cannot be compared; "
        "call model.eval(), or draw its numbers before and hand them in",
        dtype=job.run_dtype(),
    )


@dataclass(frozen=True)
class _Task:
    """What the processes are told.

    Attributes:
        job: Pickled.
        shapes: Of what the whole model returns.
        store: By which they find each other.
        seconds: How long a rank may take.
        folder: Where the caller runs, whose modules are importable.
    """

    job: bytes
    shapes: tuple[tuple[int, ...], ...]
    store: str
    seconds: float
    paths: tuple[str, ...]


def _on_processes(job: Job, whole: Record, seconds: float) -> list[Record | Failure]:
    size = job.mesh_shape[0] * job.mesh_shape[1]
    shapes = tuple(tuple(x.shape) for x in whole.outputs)
    with tempfile.TemporaryDirectory(prefix="usp-verify-") as folder:
        store = os.path.join(folder, "rendezvous")
        task = _Task(job.to_bytes(), shapes, store, seconds, tuple(sys.path))
        try:
            found = run(_on_rank, task, size, lambda done, total: None, seconds + _GRACE + _START)
        except ProcessFailed as error:
            kind = "hang" if "no answer" in str(error) else "Died"
            return [Failure(0, "", kind, f"{error}; {_STARTS_AGAIN}")]
        return [pickle.loads(outcome) for outcome in found]


def _on_rank(task: _Task, rank: int, tell: Tell) -> bytes:
    """One process's outcome; as bytes, for tensors would be shared with a process that is over."""
    torch.set_num_threads(1)
    sys.path[:] = [*task.paths, *(path for path in sys.path if path not in task.paths)]
    job: Job = pickle.loads(task.job)
    ulysses, ring = job.mesh_shape
    # nobody leaves it: the process ends, and ranks that wait for it see that
    join_locally(task.store, rank, ulysses * ring, task.seconds + _GRACE)
    mesh = init_mesh(ulysses, ring, device_type="cpu")
    return pickle.dumps(outcome_on(job, mesh, task.shapes, task.seconds))


def outcome_on(
    job: Job, mesh: SequenceMesh, shapes: Sequence[tuple[int, ...]], seconds: float
) -> Record | Failure:
    """This rank's run, or what became of it, in a world that is there."""
    inside: list[str] = []

    def follow(names: list[str]) -> None:
        nonlocal inside
        inside = names

    def here() -> str:
        return inside[-1] if inside else ""

    done: list[Record | Failure] = []

    def work() -> None:
        try:
            done.append(run_sharded(job, mesh, shapes, follow))
        except Exception as error:
            done.append(Failure(mesh.rank, here(), type(error).__name__, str(error)))

    _within(seconds, work)
    if done:
        return done[0]
    return Failure(mesh.rank, here(), "hang", f"no further in {seconds:g} s")


def _within(seconds: float, work: Callable[[], None]) -> None:
    """Let ``work`` run beside this thread, which does not wait for it for ever."""
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    end = time.monotonic() + seconds
    while thread.is_alive() and time.monotonic() < end:
        thread.join(0.05)
