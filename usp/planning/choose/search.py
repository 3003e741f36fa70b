"""Every way of spreading a job, ranked by its predicted time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from usp.planning.choose.job import Choice, Job
from usp.planning.choose.memory import Memory, fits, memory_of
from usp.planning.choose.time import StepTime, model_flops, step_time
from usp.planning.choose.traffic import Sent, bytes_of
from usp.planning.choose.ways import meshes, refined, relaid

# What saves memory, by and large by the time it costs: the fastest that fits is taken.
_CHUNKS, _HEAD_CHUNKS = 16, 4
SAVERS = tuple(
    (tiles, checkpointing, offload, chunks, head_chunks)
    for offload, checkpointing, tiles, chunks, head_chunks in (
        ("none", "none", "none", 1, 1),
        ("none", "none", "loss", 1, 1),
        ("none", "none", "mlp+loss", 1, 1),
        ("none", "none", "mlp+loss", 1, _HEAD_CHUNKS),
        ("none", "attention", "none", 1, 1),
        ("none", "attention", "loss", 1, 1),
        ("none", "full", "loss", 1, 1),
        ("none", "full", "loss", 1, _HEAD_CHUNKS),
        ("inputs", "attention", "loss", 1, 1),
        ("inputs", "full", "loss", 1, 1),
        ("inputs", "full", "mlp+loss", 1, 1),
        ("inputs", "full", "mlp+loss", 1, _HEAD_CHUNKS),
        ("inputs", "full", "mlp+loss", _CHUNKS, 1),
        ("states", "attention", "loss", 1, 1),
        ("states", "full", "loss", 1, 1),
        ("states", "full", "mlp+loss", 1, 1),
        ("states", "full", "mlp+loss", 1, _HEAD_CHUNKS),
        ("states", "full", "mlp+loss", _CHUNKS, 1),
    )
)


Saver = tuple[str, str, str, int, int]
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
        tries = [*refined(job, one.choice), *(relaid(job, one.choice) if index < _RELAID else ())]
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
    tiles, checkpointing, offload, chunks, head_chunks = saver
    return replace(
        choice,
        tiles=tiles,
        checkpointing=checkpointing,
        offload=offload,
        chunks=chunks,
        head_chunks=head_chunks,
    )


def _savers(job: Job, choice: Choice) -> Iterator[Saver]:
    of_keys = choice.transport not in ("query_ring", "grid") and not job.model.latent
    in_chunks = of_keys and job.cluster.device != "cpu"
    in_groups = of_keys and choice.sp > 1  # on one device they save nothing
    held = -(-job.model.kv_heads // (choice.tp * choice.ulysses))  # key heads
    for saver in SAVERS:
        tiles, checkpointing, _, chunks, head_chunks = saver
        if not job.backward and checkpointing != "none":
            continue
        if not job.model.vocabulary and tiles == "loss" and checkpointing == "none":
            continue
        if (chunks > 1 and not in_chunks) or (head_chunks > 1 and not in_groups):
            continue
        if head_chunks > held:
            continue
        if checkpointing == "attention" and job.model.latent:
            continue  # the memory of its op is not known here
        yield saver
