"""Every way of spreading a job, ranked by its predicted time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import product

from usp.planning.choose.job import Choice, Job
from usp.planning.choose.memory import Memory, fits, memory_of
from usp.planning.choose.network import spans_nodes
from usp.planning.choose.steps import EVERYTHING, same_for_any_length
from usp.planning.choose.time import StepTime, model_flops, step_time
from usp.planning.choose.traffic import Sent, bytes_of
from usp.planning.layout import DocumentZigzag, Layout
from usp.planning.masks.mask import Intersection
from usp.planning.masks.terms import Documents

# What saves memory, by and large by the time it costs: the fastest that fits is taken.
_CHUNKS = 16
SAVERS = tuple(
    (tiles, checkpointing, offload, chunks)
    for offload, checkpointing, tiles, chunks in (
        ("none", "none", "none", 1),
        ("none", "none", "loss", 1),
        ("none", "none", "mlp+loss", 1),
        ("none", "attention", "none", 1),
        ("none", "attention", "loss", 1),
        ("none", "full", "loss", 1),
        ("inputs", "attention", "loss", 1),
        ("inputs", "full", "loss", 1),
        ("inputs", "full", "mlp+loss", 1),
        ("inputs", "full", "mlp+loss", _CHUNKS),
        ("states", "attention", "loss", 1),
        ("states", "full", "loss", 1),
        ("states", "full", "mlp+loss", 1),
        ("states", "full", "mlp+loss", _CHUNKS),
    )
)


Saver = tuple[str, str, str, int]
_REFINED, _RELAID = 24, 8


@dataclass(frozen=True)
class Predicted:
    """A choice and what it comes to.

    Attributes:
        choice: The degrees.
        time: Seconds of a step.
        memory: Bytes of a rank.
        fits: Whether a device and its host have as much.
    """

    choice: Choice
    time: StepTime
    memory: Memory
    fits: bool
    job: Job = field(repr=False)

    @property
    def sent(self) -> Sent:
        return bytes_of(self.job, self.choice)

    @property
    def flops(self) -> float:
        """FLOP/s of a device, counted as ``model_flops``."""
        return model_flops(self.job) / self.time.total / self.choice.devices

    @property
    def tokens_a_second(self) -> float:
        return self.job.batch * self.job.seq_len / self.time.total

    @property
    def limit(self) -> str:
        """What keeps it from being faster: the part that takes longest beside arithmetic, if that
        is a tenth of the step, else arithmetic; memory where less would fit without savers."""
        parts = dict(self.time.parts)
        arithmetic = parts.pop("matrix"), parts.pop("attention")
        name = max(parts, key=lambda part: parts[part])
        if not self.fits:
            return "out of memory"
        if parts[name] > 0.1 * self.time.total:
            return name
        return "attention" if arithmetic[1] > arithmetic[0] else "matrix"


def predict(job: Job, choice: Choice) -> Predicted:
    """One choice.

    Raises:
        ValueError: its degrees are not those of the job; both numbers.
    """
    _check(job, choice)
    memory = memory_of(job, choice)
    return Predicted(choice, step_time(job, choice), memory, fits(job, memory), job)


def _check(job: Job, choice: Choice) -> None:
    model, parallel = job.model, choice.dp * choice.sp
    pairs = (
        ("devices", job.devices, "dp x ring x ulysses x tp x pp", choice.devices),
        ("heads", model.heads, "tp", choice.tp),
        ("kv_heads", model.kv_heads, "tp", choice.tp),
        ("layers", model.layers, "pp", choice.pp),
        ("batch", job.batch, "dp x micro", choice.dp * choice.micro),
        ("dp x ring x ulysses", parallel, "fsdp", choice.fsdp),
    )
    if choice.ring % choice.ring_outer:
        raise ValueError(f"ring {choice.ring} is not a multiple of ring_outer {choice.ring_outer}")
    for name, whole, by, part in pairs:
        if whole % part or (name == "devices" and whole != part):
            relation = "is not" if name == "devices" else "is not a multiple of"
            raise ValueError(f"{name} {whole} {relation} {by} {part}")


def search(
    job: Job, degrees: Iterable[Choice] | None = None, limit: Sequence[str] = ()
) -> list[Predicted]:
    """What fits, the fastest first, each with the fastest saver that makes it fit.

    All meshes and transports are compared in rows that are contiguous or zigzag, with one sample at
    a time and states shared by all ranks; of the fastest also the other ways of sharing, larger
    micro batches, and the layouts that take long to plan.

    Args:
        job: What is to be trained.
        degrees: Ask about these meshes alone.
        limit: Names of degrees ("tp", "pp", "ring", "ulysses") that must be 1.

    Raises:
        ValueError: nothing fits; says what needs least.
    """
    asked = meshes(job, limit) if degrees is None else degrees
    tried = list(asked)
    found = [one for one in (_fitted(job, choice) for choice in tried) if one is not None]
    if not found:
        raise ValueError(_nothing_fits(job, tried))
    found.sort(key=_order)
    for index, one in enumerate(found[:_REFINED]):
        tries = [*_refined(job, one.choice), *(_relaid(job, one.choice) if index < _RELAID else ())]
        others = (_fitted(job, choice) for choice in tries)
        found[index] = min([one, *(other for other in others if other is not None)], key=_order)
    return sorted(found, key=_order)


def _order(one: Predicted) -> tuple[float, float]:
    return one.time.total, one.memory.total


def _fitted(job: Job, choice: Choice) -> Predicted | None:
    """With the fastest saver of which its memory is enough: what one costs depends on links and
    lengths, but those in front of all recomputation cost next to nothing."""
    best: Predicted | None = None
    for saver in _savers(job, choice):
        tried = _with(choice, saver)
        memory = memory_of(job, tried)
        if not fits(job, memory):
            continue
        found = Predicted(tried, step_time(job, tried), memory, True, job)
        best = found if best is None else min(best, found, key=_order)
        if tried.checkpointing == "none" and tried.tiles != "mlp+loss":
            break
    return best


def _nothing_fits(job: Job, tried: Sequence[Choice]) -> str:
    said = (
        f"nothing fits {job.devices} devices of {job.cluster.name} with "
        f"{job.cluster.memory / 2**30:.1f} GiB each"
    )
    if not tried:
        return f"no mesh divides {job.devices} devices, batch {job.batch}, {job.model.heads} heads"
    ways = (_with(choice, list(_savers(job, choice))[-1]) for choice in tried)
    least = min((memory_of(job, way) for way in ways), key=lambda memory: memory.total)
    return (
        f"{said}: {least.total / 2**30:.1f} GiB is the least that any mesh takes, with "
        f"{least.host / 2**30:.1f} of {job.cluster.host / 2**30:.1f} GiB on the host"
    )


def _with(choice: Choice, saver: Saver) -> Choice:
    tiles, checkpointing, offload, chunks = saver
    return replace(choice, tiles=tiles, checkpointing=checkpointing, offload=offload, chunks=chunks)


def _savers(job: Job, choice: Choice) -> Iterator[Saver]:
    in_chunks = choice.transport not in ("query_ring", "grid") and job.cluster.device != "cpu"
    in_chunks = in_chunks and not job.model.latent
    for saver in SAVERS:
        tiles, checkpointing, _, chunks = saver
        if not job.backward and checkpointing != "none":
            continue
        if not job.model.vocabulary and tiles == "loss" and checkpointing == "none":
            continue
        if chunks > 1 and not in_chunks:
            continue
        if checkpointing == "attention" and job.model.latent:
            continue  # the memory of its op is not known here
        yield saver


def meshes(job: Job, limit: Sequence[str] = (), every_layout: bool = False) -> Iterator[Choice]:
    """Every mesh of a job's devices, with each layout and transport.

    Args:
        job: Of the devices.
        limit: Names of degrees that must be 1.
        every_layout: Also those that take long to plan.
    """
    model, devices = job.model, job.devices
    most = min(devices, job.cluster.node)
    for tp in _divisors(model.kv_heads, 1 if "tp" in limit else most):
        for pp in _divisors(model.layers, 1 if "pp" in limit else devices):
            if devices % (tp * pp):
                continue
            for sp in _divisors(devices // (tp * pp), devices):
                dp = devices // (tp * pp * sp)
                if job.batch % dp or sp > job.seq_len:
                    continue
                for ulysses in _divisors(sp, 1 if "ulysses" in limit else model.heads):
                    ring = sp // ulysses
                    if "ring" in limit and ring > 1:
                        continue
                    degrees = Choice(dp, 1, ring, ulysses, tp, pp)
                    yield from _ways(job, degrees, every_layout)


def _ways(job: Job, degrees: Choice, every_layout: bool) -> Iterator[Choice]:
    layouts: list[Layout] = ["contiguous"]
    transports = ["ring"]
    if degrees.ring > 1:
        if job.who_sees != EVERYTHING:
            layouts += ["zigzag", *(_planned_layouts(job) if every_layout else ())]
        transports.append("allgather")
        if job.mask is not None and degrees.ring <= 64:
            transports.append("direct")
        if job.backward and _queries_are_less(job):
            transports.append("query_ring")
    whole = replace(degrees, fsdp=degrees.dp * degrees.sp)
    for layout, transport in product(layouts, transports):
        yield replace(whole, layout=layout, transport=transport)
    outer = _nodes_of_ring(job, degrees)
    if outer is None:
        return
    two = ("ring",) if job.model.latent else ("ring", "grid")
    for layout, transport in product(layouts, two):
        yield replace(whole, layout=layout, transport=transport, ring_outer=outer)


def _queries_are_less(job: Job) -> bool:
    """In a backward, than keys and their gradients, row by row (docs/rings.md)."""
    model, size, wide = job.model, job.precision.element, 4
    queries = size * (model.query + model.result) + wide * (model.query + 2 * model.heads)
    return queries < (size + wide) * model.keys


def _nodes_of_ring(job: Job, degrees: Choice) -> int | None:
    """Over how many nodes the ring goes, where each holds several of its ranks."""
    inner = job.cluster.node // (degrees.tp * degrees.ulysses)
    if inner < 2 or degrees.ring % inner or degrees.ring <= inner:
        return None
    return degrees.ring // inner


def _refined(job: Job, choice: Choice) -> Iterator[Choice]:
    """The same mesh with other numbers of ranks that share states, and of samples at a time."""
    for fsdp, micro in product(_shares(job, choice), _micros(job, choice)):
        yield replace(choice, fsdp=fsdp, micro=micro)


def _relaid(job: Job, choice: Choice) -> Iterator[Choice]:
    """The same mesh with the layouts that have no formula."""
    if choice.ring > 1:
        for layout in _planned_layouts(job):
            yield replace(choice, layout=layout)


def _planned_layouts(job: Job) -> Iterator[Layout]:
    """Striped, and zigzag in each document. Without a mask, or with a causal one alone, they work
    as evenly as zigzag, and no better."""
    mask = job.who_sees
    if same_for_any_length(mask, "zigzag"):
        return
    yield "striped"
    for part in mask.masks if isinstance(mask, Intersection) else (mask,):
        if isinstance(part, Documents):
            yield DocumentZigzag(part.cu_seqlens)


def _shares(job: Job, degrees: Choice) -> list[int]:
    """Over how many ranks states are shared: none, those of a few nodes, all."""
    ranks = degrees.dp * degrees.sp
    found = {1, ranks}
    for nodes in (1, 4, 16):
        inside = nodes * job.cluster.node // degrees.tp
        if inside and not ranks % inside:
            found.add(inside)
    return sorted(found)


def _micros(job: Job, degrees: Choice) -> list[int]:
    each = job.batch // degrees.dp
    return [n for n in (1, 2, 4, 8) if not each % n]


def _divisors(number: int, most: int) -> list[int]:
    return [n for n in range(1, min(number, most) + 1) if not number % n]


def crosses_nodes(job: Job, choice: Choice) -> bool:
    """Whether the ring goes over nodes."""
    return spans_nodes(job.cluster, choice.way.ring)
