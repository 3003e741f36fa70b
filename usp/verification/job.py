"""What is run whole and sharded, and how a run of it is made."""

from __future__ import annotations

import copy
import pickle
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from usp.distributed.mesh import SequenceMesh
from usp.integrations import transformers
from usp.integrations._boundary import Boundary
from usp.integrations._sites import Whole
from usp.integrations.parallelize import parallelize
from usp.nn.across import drops_samples
from usp.planning.layout import Layout
from usp.verification.drawn import OnRank, drawn
from usp.verification.record import Record, Recorder, copied, tensors

Sharded = Callable[[nn.Module, SequenceMesh], "Callable[..., Any] | None"]
Loss = Callable[[Any, "SequenceMesh | None"], Tensor]
# forwards with random numbers, in which ranks that drop other samples show it
_DRAWS = 8


@dataclass(frozen=True)
class Job:
    """A model, and how it is sharded.

    Attributes:
        model, inputs: As its user calls it, whole: ``model(*args, **kwargs)``.
        mesh_shape: Degrees of Ulysses and of the ring.
        trunk: Of ``usp.parallelize``, where ``sharded`` is None.
        sharded: Makes of a copy of the model what is called on each rank, with whole inputs.
        loss: Of what the model returns, and the mesh; None is the model's own, or a drawn
            cotangent.
        layout: Of the local tokens.
        dtype: In which it is run; None is its own.
        seed: Of torch's generator, the same on every rank.
    """

    model: nn.Module
    inputs: tuple[tuple[Any, ...], dict[str, Any]]
    mesh_shape: tuple[int, int] = (2, 2)
    trunk: str | Boundary | Sequence[str | Boundary] | None = None
    sharded: Sharded | None = None
    loss: Loss | None = None
    layout: Layout = "contiguous"
    dtype: torch.dtype | None = None
    seed: int = 0

    def run_dtype(self) -> torch.dtype:
        """Of its parameters and floating inputs."""
        if self.dtype is not None:
            return self.dtype
        found = [x for x in self.model.parameters() if x.is_floating_point()]
        return found[0].dtype if found else torch.get_default_dtype()

    def made(self, is_random: bool = False) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
        """A copy of the model and its inputs in that dtype; nothing is dropped in it unless
        ``is_random``."""
        model = copy.deepcopy(self.model).to("cpu", self.dtype)
        if not is_random:
            _drop_nothing(model)
        model.zero_grad(set_to_none=True)
        args, kwargs = tree_map(self._cast, self.inputs)
        return model, args, kwargs

    def _cast(self, x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        x = x.detach().to("cpu", copy=True)
        return x.to(self.dtype) if self.dtype is not None and x.is_floating_point() else x

    def to_bytes(self) -> bytes:
        """For other processes.

        Raises:
            TypeError: something in it cannot be told to another process; names it.
        """
        for name in ("model", "inputs", "sharded", "loss", "trunk", "layout"):
            try:
                pickle.dumps(getattr(self, name))
            except Exception as error:
                raise TypeError(
                    f"{name} cannot be handed to other processes ({error}): classes and functions "
                    "must be those of a module, and none of a function or a lambda"
                ) from None
        if not hasattr(sys.modules["__main__"], "__file__"):
            typed = {type(m).__name__ for m in self.model.modules() if _is_typed(type(m))}
            if typed:
                raise TypeError(
                    f"{', '.join(sorted(typed))} cannot be found by other processes: put what was "
                    "typed in here into a file, and import it"
                )
        return pickle.dumps(self)


def _is_typed(kind: type) -> bool:
    return kind.__module__ == "__main__"


def _drop_nothing(model: nn.Module) -> None:
    for module in model.modules():
        is_one = isinstance(module, nn.modules.dropout._DropoutNd)
        for name, value in vars(module).items():
            named = "drop" in name or (name == "p" and (is_one or drops_samples(module)))
            if named and isinstance(value, float):
                setattr(module, name, 0.0)


def run_whole(job: Job, seed: int | None = None) -> Record:
    """On one device."""
    model, args, kwargs = job.made()
    with _seeded(job.seed if seed is None else seed):
        recorder = Recorder(job.run_dtype())
        with recorder.hooked(_names(model)):
            out = model(*args, **kwargs)
            record = recorder.record
            record.outputs = [copied(x) for x in tensors(out)]
            loss = job.loss(out, None) if job.loss is not None else _own_loss(out)
        _backward(record, loss, lambda: drawn(out))
    record.parameters = {n: _gradient(p) for n, p in model.named_parameters() if p.requires_grad}
    return record


def random_module(job: Job, whole: Record) -> str | None:
    """The first module of the whole model that another seed changes, though nothing is dropped."""
    other = run_whole(replace(job, loss=_no_loss), job.seed + 1)
    for key, value in whole.values.items():
        twin = other.values.get(key)
        if twin is None or twin.shape != value.shape or not _equal(twin, value):
            return key.module
    return None


def _no_loss(out: Any, mesh: SequenceMesh | None) -> Tensor:
    return torch.zeros((), requires_grad=True)


def _equal(a: Tensor, b: Tensor) -> bool:
    return bool(((a == b) | ((a != a) & (b != b))).all())


def run_sharded(
    job: Job,
    mesh: SequenceMesh,
    shapes: Sequence[tuple[int, ...]],
    follow: Callable[[list[str]], None] = lambda inside: None,
) -> Record:
    """This rank's part.

    Args:
        shapes: Of what the whole model returns.
        follow: Is told the list of modules that are entered, which changes as they are.
    """
    if "transformers" in sys.modules:  # of whose table a model may name our entry
        transformers.register()
    with _seeded(job.seed):
        model, args, kwargs = job.made()
        subject, called = _sharded(job, model, mesh)
        recorder = Recorder(job.run_dtype())
        record = recorder.record
        follow(record.inside)
        with recorder.hooked(_names(subject)):
            out = called(*args, **kwargs)
            record.outputs = [copied(x) for x in tensors(out)]
            loss = job.loss(out, mesh) if job.loss is not None else _own_loss(out)
        joins = isinstance(vars(subject).get("forward"), Whole)
        place = OnRank(mesh, job.layout, shapes, 1.0 if joins else 1.0 / mesh.size)
        _backward(record, loss, lambda: drawn(out, place))
        named = [(n, p) for n, p in subject.named_parameters() if p.requires_grad]
        record.parameters = {n: _gradient(p) for n, p in named}
        record.is_reduced = isinstance(called, nn.parallel.DistributedDataParallel) or any(
            hasattr(p, "full_tensor") for _, p in named
        )
    _note_kept(record, job, mesh)
    return record


def _sharded(
    job: Job, model: nn.Module, mesh: SequenceMesh
) -> tuple[nn.Module, Callable[..., Any]]:
    """The model whose modules have the names of the whole one, and what is called."""
    if job.sharded is None:
        model = parallelize(model, mesh, job.trunk, layout=job.layout)
        return model, model
    called = job.sharded(model, mesh)
    if called is None:
        called = model
    if isinstance(called, nn.Module) and model not in set(called.modules()):
        return called, called
    return model, called


def _names(model: nn.Module) -> dict[nn.Module, str]:
    """Each module once, by its first name."""
    return {module: name for name, module in model.named_modules()}


def _own_loss(out: Any) -> Tensor | None:
    """The model's own: a single number that has a gradient."""
    return next((x for x in tensors(out) if x.dim() == 0 and x.requires_grad), None)


def _backward(record: Record, loss: Tensor | None, drawn: Callable[[], Tensor | None]) -> None:
    if loss is not None:
        record.loss = copied(loss)
    else:
        loss = drawn()
    if loss is not None and loss.requires_grad:
        loss.backward()


def _gradient(parameter: nn.Parameter) -> Tensor | None:
    """Joined where FSDP2 has cut it, which all ranks do."""
    grad = parameter.grad
    if grad is None:
        return None
    return copied(grad.full_tensor() if hasattr(grad, "full_tensor") else grad)


def _note_kept(record: Record, job: Job, mesh: SequenceMesh) -> None:
    """Which samples are dropped, where the model drops whole ones."""
    if not any(drops_samples(m) and m.training for m in job.model.modules()):
        return
    with _seeded(job.seed):
        model, args, kwargs = job.made(is_random=True)
        subject, called = _sharded(job, model, mesh)
        for module, name in _names(subject).items():
            if drops_samples(module):
                record.kept[name] = []
                module.register_forward_hook(_keeping(record.kept[name]))
        with torch.no_grad():
            for _ in range(_DRAWS):
                called(*args, **kwargs)


def _keeping(found: list[tuple[bool, ...]]) -> Callable[..., None]:
    def note(module: nn.Module, args: Any, out: Any) -> None:
        if isinstance(out, Tensor) and out.dim() > 1 and out.numel():
            found.append(tuple((out != 0).flatten(1).any(1).tolist()))

    return note


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """The same random numbers every time, and nothing left behind."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield
