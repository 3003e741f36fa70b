"""How long a step takes, part by part."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from math import log, sqrt

from usp.planning.choose.attention import CALLS_OF_STEP, attention_seconds
from usp.planning.choose.cluster import Cluster
from usp.planning.choose.job import Choice, Job, micro_batches, shape_of, tokens_of
from usp.planning.choose.memory import weights_here
from usp.planning.choose.network import Group, all_reduce, gather, hop, level_of

# Each saved byte of a layer is written, read again and met by a gradient: passes over memory of
# norms, activations and residuals.
_PASSES = 5
# How much nodes differ, as a share of a step that the slowest one sets: GPUs of one kind spread by
# 8 % in arXiv:2208.11035, less in their mean over a node.
_SPREAD = 0.015
_BACKWARD = 2 / 3  # of a micro batch
CALLS = {False: 14, True: 40}  # kernels of a layer beside attention, of a forward and of both
_HOST_ADAM = 28  # bytes of host memory that a step of AdamW reads and writes for each weight


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step on the slowest rank.

    Attributes:
        matrix, attention, memory: Products, kernels of attention, passes over memory.
        merge: Sums of ring steps.
        exchange, ring: Of Ulysses, and what the ring does not hide.
        tensor: Gathers and scatters of tensor parallelism.
        fsdp: Gathers of weights that nothing hides.
        gradients: Reduced at the end.
        bubble: Of the pipeline.
        optimizer: Its pass over the states.
        offload: To the host and back, as far as nothing hides it.
        waiting: For the slowest node.
    """

    matrix: float = 0.0
    attention: float = 0.0
    memory: float = 0.0
    merge: float = 0.0
    exchange: float = 0.0
    ring: float = 0.0
    tensor: float = 0.0
    fsdp: float = 0.0
    gradients: float = 0.0
    bubble: float = 0.0
    optimizer: float = 0.0
    offload: float = 0.0
    waiting: float = 0.0

    @property
    def total(self) -> float:
        return sum(getattr(self, part.name) for part in fields(self))

    @property
    def parts(self) -> dict[str, float]:
        return {part.name: getattr(self, part.name) for part in fields(self)}

    @property
    def limit(self) -> str:
        """The part that takes longest."""
        return max(self.parts, key=lambda name: self.parts[name])


def step_time(job: Job, choice: Choice) -> StepTime:
    """Of a step: so many micro batches through a stage, and what comes once."""
    micro = micro_batches(job, choice)
    one = _micro_batch(job, choice)
    busy = sum(one.values())
    once = _once(job, choice, one)
    bubble = (choice.pp - 1) * busy
    fsdp = _fsdp(job, choice, busy) * micro
    parts = {name: seconds * micro for name, seconds in one.items()}
    spread = 1 + _SPREAD * sqrt(2 * log(job.cluster.nodes(choice.devices)))
    total = sum(parts.values()) + bubble + fsdp + sum(once.values())
    return StepTime(**parts, **once, bubble=bubble, fsdp=fsdp, waiting=total * (spread - 1))


def _micro_batch(job: Job, choice: Choice) -> dict[str, float]:
    """Through all layers of a stage, forward and backward."""
    cluster, layers = job.cluster, job.model.layers / choice.pp
    shape, mask, way = shape_of(job, choice), job.who_sees, choice.way
    passes = [attention_seconds(shape, mask, way, cluster)]
    if choice.checkpointing == "full" and job.backward:
        passes *= 2
    if job.backward:
        passes.append(attention_seconds(shape, mask, way, cluster, True))
    found = {
        "matrix": _products(job, choice) / cluster.matrix_rate(job.precision.matrix)
        + CALLS[job.backward] * layers * cluster.launch,
        "attention": layers * sum(one.compute for one in passes),
        "merge": layers * sum(one.merge for one in passes),
        "exchange": layers * sum(one.exchange for one in passes),
        "ring": layers * sum(one.ring for one in passes),
        "memory": _traffic(job, choice) / cluster.memory_rate,
        "tensor": layers * _tensor(job, choice),
    }
    if choice.chunks > 1:
        found["ring"] += layers * _chunks(job, choice, [one.compute for one in passes])
    if choice.head_chunks > 1:
        found["ring"] += layers * len(passes) * _head_chunks(job, choice)
    if choice.pp > 1:
        sent = tokens_of(job, choice) / choice.tp * job.model.hidden * job.precision.element
        stage = Group(choice.pp, choice.devices // choice.pp)
        found["tensor"] += (2 if job.backward else 1) * hop(cluster, stage, sent)
    return found


def _products(job: Job, choice: Choice) -> float:
    """FLOP of a rank: 2 a weight and token forward, 4 backward, and what is computed again."""
    model = job.model
    times = 3 if job.backward else 1
    of_layer = times * model.met_weights
    if job.backward and choice.checkpointing != "none":
        of_layer += model.met_weights
    if job.backward and choice.tiles == "mlp+loss":
        of_layer += model.met_mlp_weights
    # each rank of a ring opens the latents of all of them for its own heads, and backward again
    of_layer += (times + 1) * (choice.ring - 1) * model.opening
    head = model.vocabulary * model.hidden
    head *= times + (1 if job.backward and choice.tiles != "none" else 0)
    patches = times * 3 * model.patch**2 * model.hidden
    each = of_layer * model.layers / choice.pp + head + patches
    return 2 * each * tokens_of(job, choice) / choice.tp


def _chunks(job: Job, choice: Choice, passes: Sequence[float]) -> float:
    """Of a layer: calls for each pair of chunks; and q, k, v, results on their way to the host and
    back, keys for every later chunk, behind attention."""
    model, element, cluster = job.model, job.precision.element, job.cluster
    count, tokens = choice.chunks, tokens_of(job, choice) / choice.tp
    calls = CALLS_OF_STEP * cluster.launch * (count * (count + 1) / 2 - 1) * choice.ring
    once = element * (model.query + model.keys + model.result)
    again = element * model.keys * (count - 1) / 2 * choice.ring
    moved = (once + again) * tokens / cluster.host_rate
    return sum(calls + _not_hidden(cluster, moved, work) for work in passes)


def _head_chunks(job: Job, choice: Choice) -> float:
    """Of a pass of a layer: calls and messages of each further group of heads; its bytes are those
    of all at once."""
    cluster, way = job.cluster, choice.way
    calls = CALLS_OF_STEP * cluster.launch * choice.ring
    starts = sum(
        times * level_of(cluster, group).hop
        for group, times in ((way.ring, choice.ring - 1), (way.ulysses, 2))
        if group.size > 1
    )
    return (choice.head_chunks - 1) * (calls + starts)


def _traffic(job: Job, choice: Choice) -> float:
    model, element = job.model, job.precision.element
    of_layer = 4 * model.hidden + model.query + model.result + model.keys
    of_layer += (3 if model.gated else 2) * model.inner
    passes = _PASSES if job.backward else 2
    passes += 2 if job.backward and choice.checkpointing != "none" else 0
    logits = 3 * model.vocabulary * (4 if job.backward else 1)
    tokens = tokens_of(job, choice) / choice.tp
    return tokens * (passes * of_layer * element * model.layers / choice.pp + logits)


def _tensor(job: Job, choice: Choice) -> float:
    """Of a layer: two gathers and two scatters forward, as many backward and two gathers again
    (Megatron's sequence parallelism, arXiv:2205.05198), with none of them hidden."""
    if choice.tp == 1:
        return 0.0
    size = tokens_of(job, choice) * job.model.hidden * job.precision.element
    times = 4 + (6 if job.backward else 0)
    if job.backward and choice.checkpointing != "none":
        times += 4
    return times * gather(job.cluster, Group(choice.tp, 1), size)


def _fsdp(job: Job, choice: Choice, busy: float) -> float:
    """Of a micro batch: weights come for the forward and the backward, gradients go; all but the
    first layer's and the last one's behind computation."""
    if job.zero < 3 or choice.fsdp == 1:
        return 0.0
    cluster, precision = job.cluster, job.precision
    units = job.model.layers / choice.pp + 1
    unit = weights_here(job, choice) / units
    one = gather(cluster, choice.sharing, unit * precision.weights)
    back = gather(cluster, choice.sharing, unit * precision.gradients) if job.backward else 0.0
    moves = units * ((2 if job.backward else 1) * one + back)
    ends = one + back
    return ends + _not_hidden(cluster, moves - ends, busy)


def _not_hidden(cluster: Cluster, move: float, work: float) -> float:
    return max(0.0, move - work) + cluster.contention * min(move, work)


def _once(job: Job, choice: Choice, one: dict[str, float]) -> dict[str, float]:
    """What comes once a step."""
    if not job.backward:
        return {"gradients": 0.0, "optimizer": 0.0, "offload": 0.0}
    cluster, precision = job.cluster, job.precision
    shared = weights_here(job, choice) / choice.fsdp
    gradients = _gradients(job, choice, sum(one.values()))
    states = 2 * (precision.optimizer + precision.gradients + precision.weights)
    offload, optimizer = 0.0, states * shared / (cluster.update_rate or cluster.memory_rate)
    if choice.offload == "states":
        optimizer = _HOST_ADAM * shared / (0.5 * cluster.host_rate)
        moved = shared * (2 * precision.weights * micro_batches(job, choice) + precision.gradients)
        offload += moved / cluster.host_rate
    if choice.offload != "none":
        inputs = tokens_of(job, choice) / choice.tp * job.model.hidden * precision.element
        moved = 2 * inputs * job.model.layers / choice.pp / cluster.host_rate
        offload += _not_hidden(cluster, moved, sum(one.values())) * micro_batches(job, choice)
    return {"gradients": gradients, "optimizer": optimizer, "offload": offload}


def _gradients(job: Job, choice: Choice, busy: float) -> float:
    """Sums of gradients, and weights that come back where ranks share the optimizer's states alone.

    FSDP and ZeRO add layer by layer behind the last micro batch's backward, a collective for each;
    ``usp.all_reduce_gradients`` adds once all are there.
    """
    cluster, precision, here = job.cluster, job.precision, weights_here(job, choice)
    size = here / choice.fsdp * precision.gradients
    if choice.fsdp == 1:
        return sum(all_reduce(cluster, group, size) for group in choice.reduced)
    units = job.model.layers / choice.pp + 1
    moves = sum(all_reduce(cluster, group, size / units) for group in choice.reduced)
    weights = 0.0
    if job.zero < 3:
        moves += gather(cluster, choice.sharing, here * precision.gradients / units)
        weights = units * gather(cluster, choice.sharing, here * precision.weights / units)
    return weights + _not_hidden(cluster, units * moves, _BACKWARD * busy)


def model_flops(job: Job) -> float:
    """Of a step, nothing computed again: visible pairs and products, all devices together."""
    from usp.planning.choose.steps import steps_of

    model, times = job.model, 3 if job.backward else 1
    (whole,) = steps_of(job.who_sees, "contiguous", (job.seq_len, job.seq_len), 1, "ring")
    each = model.layers * model.met_weights + model.vocabulary * model.hidden
    attention = 2 * whole.pairs[0] * (model.query + model.result) * model.layers
    return times * job.batch * (2 * each * job.seq_len + attention)
