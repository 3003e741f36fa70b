"""What a rank holds at the moment when it holds most."""

from __future__ import annotations

from dataclasses import dataclass

from usp.planning.choose.job import LOSSES, Choice, Job, micro_batches, tokens_of
from usp.planning.problem import state_dtype


@dataclass(frozen=True)
class Memory:
    """Bytes of a rank.

    Attributes:
        states: Weights, gradients and the optimizer's, with what is gathered of them for a while.
        kept: Activations that wait for the backward.
        working: The most that lives beside them, and ``moment`` when.
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


def memory_of(job: Job, choice: Choice) -> Memory:
    """The formulas are those that tell every published fit of arXiv:2405.07719, tables 5 and 6:
    ``e ((6 + 2 G / H) h + 3 f)`` bytes for each token and layer, and 8 for each logit."""
    kept = kept_in_layers(job, choice)
    moments = _moments(job, choice)
    moment = max(moments, key=lambda name: moments[name])
    working = max(0.0, moments[moment])
    return Memory(_states(job, choice), kept, working, moment, _on_host(job, choice))


def fits(job: Job, memory: Memory) -> bool:
    """Whether a device and its part of the host have as much."""
    return memory.total <= job.cluster.memory and memory.host <= job.cluster.host


def _on_host(job: Job, choice: Choice) -> float:
    if choice.offload == "none":
        return 0.0
    inputs = job.model.hidden * job.precision.element * _tokens(job, choice)
    size = inputs * job.model.layers / choice.pp
    if choice.offload == "states":
        precision = job.precision
        each = precision.weights + precision.gradients + precision.optimizer
        size += weights_here(job, choice) * each / choice.fsdp
    return size


def _states(job: Job, choice: Choice) -> float:
    model, precision = job.model, job.precision
    here = weights_here(job, choice)
    parts = [(precision.weights, 3), (precision.gradients, 2), (precision.optimizer, 1)]
    if not job.backward:
        parts = parts[:1]
    size = sum(here * n / (choice.fsdp if job.zero >= stage else 1) for n, stage in parts)
    if choice.offload == "states":
        size = 0.0
    if job.zero == 3 and (choice.fsdp > 1 or choice.offload == "states"):
        # a layer that computes and the next one, a layer's gradient, what is in front and behind
        layer, ends = model.layer_weights / choice.tp, model.ends / choice.tp
        size += layer * (2 * precision.weights + precision.gradients) + ends * precision.weights
    return size


def weights_here(job: Job, choice: Choice) -> float:
    """Weights of a pipeline stage's tensor-parallel part, before anything else shares them."""
    model = job.model
    layers = model.layers / choice.pp * model.layer_weights
    return (layers + model.ends / min(choice.pp, 2)) / choice.tp


def _per_token(job: Job, choice: Choice) -> tuple[float, float]:
    """Bytes that a whole layer saves for its backward, in front of its MLP and in it."""
    model, element = job.model, job.precision.element
    attention = (6 + 2 * model.kv_heads / model.heads) * model.hidden
    if choice.ulysses > 1 and job.as_usp:
        attention += model.hidden
    mlp = 0 if choice.tiles == "mlp+loss" else (3 if model.gated else 2) * model.mlp
    return element * attention + _lse(job), float(element * mlp)


def _lse(job: Job) -> float:
    return state_dtype(job.dtype()).itemsize * job.model.heads


def _saved_of_attention(job: Job, choice: Choice) -> float:
    """Bytes a token of what a checkpoint that computes no attention again keeps of it."""
    model, element = job.model, job.precision.element
    tensors = 1.0
    if choice.ulysses > 1 and job.as_usp:
        tensors += 2 + 2 * model.kv_heads / model.heads
    return element * tensors * model.hidden + _lse(job)


def _tokens(job: Job, choice: Choice) -> float:
    """Of one device: tensor parallelism shares them too between its products."""
    return tokens_of(job, choice) / choice.tp


def kept_in_layers(job: Job, choice: Choice) -> float:
    """Of all layers of a stage, and of the micro batches under way in a pipeline."""
    if not job.backward:
        return 0.0
    model, element = job.model, job.precision.element
    if choice.checkpointing == "none":
        each = sum(_per_token(job, choice))
    else:
        each = 0.0 if choice.offload != "none" else float(element * model.hidden)
        each += _saved_of_attention(job, choice) if choice.checkpointing == "attention" else 0.0
    under_way = min(choice.pp, micro_batches(job, choice))
    return each * _tokens(job, choice) * model.layers / choice.pp * under_way


def _moments(job: Job, choice: Choice) -> dict[str, float]:
    """Beside what is kept: when the loss is computed, and in the backward of the last layer."""
    model, precision = job.model, job.precision
    tokens, element = _tokens(job, choice), precision.element
    front, mlp = _per_token(job, choice)
    again = 0.0 if choice.checkpointing == "none" else front + mlp
    inner = 0 if choice.tiles == "mlp+loss" else (2 if model.gated else 1) * model.mlp
    found = {
        "loss": _loss(job, choice) * tokens,
        "MLP": (again + element * (inner + 2 * model.hidden)) * tokens,
        "attention": (again - mlp - 2 * element * model.hidden) * tokens,
    }
    found["attention"] += _of_attention(job, choice) * tokens
    if not job.backward:
        found["MLP"] = (front + element * 3 * model.mlp) * tokens
    return found


def _loss(job: Job, choice: Choice) -> float:
    """Bytes a token. Tiles of logits are about as large as the hidden states, in fp32."""
    model = job.model
    if choice.tiles != "none":
        return 3 * 4 * model.hidden if model.vocabulary else 0.0
    return float(model.vocabulary * LOSSES[job.precision.loss])


def _of_attention(job: Job, choice: Choice) -> float:
    """Bytes a token of its backward: gradients, copies of an exchange, sums and blocks."""
    model, element = job.model, job.precision.element
    wide = state_dtype(job.dtype()).itemsize
    keys = 2 * model.hidden * model.kv_heads / model.heads
    own = element * (2 * model.hidden + keys)
    if choice.ulysses > 1:
        own *= 2
    if choice.ring > 1:
        own += wide * (model.hidden + keys)
        blocks = 2 if choice.transport == "ring" else choice.ring
        own += blocks * keys * (element + wide)
    return own
