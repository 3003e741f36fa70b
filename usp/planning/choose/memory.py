"""What a rank holds at the moment when it holds most."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from usp.planning.choose.job import Choice, Job, loss_bytes, micro_batches, tokens_of
from usp.planning.choose.layer import Saved, saved_of, turns_of

_BUCKET = 8 * 2**20  # numbers of a message of usp.all_reduce_gradients


@dataclass(frozen=True)
class Memory:
    """Bytes of a rank.

    Attributes:
        states: Weights, the optimizer's states and gradients, as far as they are there, with what
            is gathered of them for a while.
        kept: Activations that wait for the backward.
        working: What lives beside them at the moment of most, and ``moment`` when that is.
        host: On its host.
    """

    states: float
    kept: float
    working: float
    moment: str
    host: float = 0.0

    @property
    def total(self) -> float:
        return self.states + self.kept + self.working


class _Moment(NamedTuple):
    """Bytes beside weights and the optimizer's states."""

    name: str
    gradients: float
    kept: float
    working: float

    @property
    def total(self) -> float:
        return self.gradients + self.kept + self.working


def memory_of(job: Job, choice: Choice) -> Memory:
    """The formulas are those that tell every published fit of arXiv:2405.07719, tables 5 and 6:
    ``e ((6 + 2 G / H) h + 3 f)`` bytes for each token and layer, and 8 for each logit."""
    most = max(_moments(job, choice), key=lambda moment: moment.total)
    states = _states(job, choice) + most.gradients
    working = most.working
    return Memory(states, most.kept, working, most.name, _on_host(job, choice))


def fits(job: Job, memory: Memory) -> bool:
    """Whether a device and its part of the host have as much."""
    return memory.total <= job.cluster.memory and memory.host <= job.cluster.host


def _on_host(job: Job, choice: Choice) -> float:
    model, element, layers = job.model, job.precision.element, job.model.layers / choice.pp
    size = 0.0
    if choice.chunks > 1:  # of the layer that computes, or of all that have no checkpoint
        each = element * (model.query + model.keys + model.result) * _tokens(job, choice)
        size += each * (1 if choice.checkpointing == "full" else layers)
    if choice.offload == "none":
        return size
    size += model.hidden * element * _tokens(job, choice) * layers
    if choice.offload == "states":
        precision = job.precision
        each = precision.weights + precision.gradients + precision.optimizer
        size += weights_here(job, choice) * each / choice.fsdp
    return size


def _states(job: Job, choice: Choice) -> float:
    """Weights and the optimizer's states, with what of them is gathered for a while."""
    model, precision = job.model, job.precision
    here = weights_here(job, choice)
    parts = [(precision.weights, 3), (precision.optimizer, 1)]
    if not job.backward:
        parts = parts[:1]
    size = sum(here * n / (choice.fsdp if job.zero >= stage else 1) for n, stage in parts)
    if choice.offload == "states":
        size = 0.0
    if _gathers(job, choice):
        # a layer that computes and the next one, a layer's gradient, what is in front and behind
        layer, ends = model.layer_weights / choice.tp, model.ends / choice.tp
        size += layer * (2 * precision.weights + precision.gradients) + ends * precision.weights
    return size


def _gathers(job: Job, choice: Choice) -> bool:
    """Whether a layer's weights are there for a while alone."""
    return job.zero == 3 and (choice.fsdp > 1 or choice.offload == "states")


def _gradients(job: Job, choice: Choice) -> float:
    """All of a rank's."""
    if not job.backward or choice.offload == "states":
        return 0.0
    shared = choice.fsdp if job.zero >= 2 else 1
    return weights_here(job, choice) * job.precision.gradients / shared


def weights_here(job: Job, choice: Choice) -> float:
    """Weights of a pipeline stage's tensor-parallel part, before anything else shares them."""
    model = job.model
    layers = model.layers / choice.pp * model.layer_weights
    return (layers + model.ends / min(choice.pp, 2)) / choice.tp


def _tokens(job: Job, choice: Choice) -> float:
    """Of one device: tensor parallelism shares them too between its products."""
    return tokens_of(job, choice) / choice.tp


def kept_in_layers(job: Job, choice: Choice) -> float:
    """Of all layers of a stage, and of the micro batches under way in a pipeline."""
    if not job.backward:
        return 0.0
    under_way = min(choice.pp, micro_batches(job, choice))
    each = _kept(job, choice, saved_of(job, choice)) * _tokens(job, choice)
    return each * job.model.layers / choice.pp * under_way


def _kept(job: Job, choice: Choice, saved: Saved) -> float:
    """Bytes a token that a layer keeps until its backward."""
    if choice.checkpointing == "none":
        return saved.total
    each = 0.0 if choice.offload != "none" else float(job.precision.element * job.model.hidden)
    return each + (saved.of_op if choice.checkpointing == "attention" else 0.0)


def _moments(job: Job, choice: Choice) -> Iterator[_Moment]:
    """When the loss is computed, in the backward of the last layer and in that of the first, and
    when gradients are summed.

    Gradients that are added to are there all the time; those of a single micro batch come with the
    backward, while what the layers keep goes, so that the most is at one of its ends.
    """
    saved, tokens = saved_of(job, choice), _tokens(job, choice)
    kept, whole = kept_in_layers(job, choice), _gradients(job, choice)
    if not job.backward:
        inner = job.precision.element * 3 * job.model.inner
        yield _Moment("MLP", 0.0, 0.0, (saved.front + inner) * tokens)
        yield _Moment("loss", 0.0, 0.0, loss_bytes(job, choice) * tokens)
        return
    comes = job.as_usp and micro_batches(job, choice) == 1 and not _gathers(job, choice)
    there = 0.0 if comes else whole
    result = job.precision.element * job.model.hidden * tokens  # of the last layer
    yield _Moment("loss", there, kept, loss_bytes(job, choice) * tokens + result)
    head, matrices = _heads_gradient(job, choice), not _gathers(job, choice) and job.as_usp
    if matrices and choice.tiles == "none":
        logits = job.precision.element * job.model.vocabulary * tokens
        yield _Moment("head", there, kept, logits + head + 2 * result)
    again = 0.0 if choice.checkpointing == "none" else saved.again(job, choice)
    layers = job.model.layers / choice.pp
    share = job.precision.gradients / choice.tp
    for turn in turns_of(job, choice, saved):
        matrix = turn.matrix * job.precision.element / choice.tp if matrices else 0.0
        working = (again + turn.tokens) * tokens + matrix
        if comes:
            made, rest = turn.done * share, (job.model.layer_weights - turn.done) * share
            yield _Moment(turn.name, head + made, kept, working)
            front = job.model.front * share
            yield _Moment(turn.name, whole - rest - front, kept / layers, working)
        else:
            yield _Moment(turn.name, whole, kept, working)
    if comes:
        yield _Moment("embedding", whole, 0.0, result)
    if matrices and choice.fsdp == 1 and any(group.size > 1 for group in choice.reduced):
        largest = max(job.model.matrices) / choice.tp
        message = max(min(weights_here(job, choice), _BUCKET), largest)
        yield _Moment("sum of gradients", whole, 0.0, message * max(4, job.precision.gradients))


def _heads_gradient(job: Job, choice: Choice) -> float:
    """Of the weights behind the layers, before it is added to what was there."""
    model = job.model
    return model.vocabulary * model.hidden * job.precision.element / choice.tp
