"""The bytes that leave a rank in a step."""

from __future__ import annotations

from dataclasses import dataclass

from usp.planning.choose.attention import attention_bytes
from usp.planning.choose.job import Choice, Job, micro_batches, shape_of, tokens_of
from usp.planning.choose.memory import weights_here


@dataclass(frozen=True)
class Sent:
    """Bytes of a step that leave the rank that sends most.

    Collectives count as their direct algorithms, as ``usp.testing.WireBytes`` counts them.

    Attributes:
        attention: Heads, keys and their gradients, in all layers.
        tensor: Of tensor parallelism.
        states: Weights gathered, gradients reduced.
    """

    attention: int
    tensor: int
    states: int

    @property
    def total(self) -> int:
        return self.attention + self.tensor + self.states


def bytes_of(job: Job, choice: Choice) -> Sent:
    """Of one optimizer step."""
    micro, layers = micro_batches(job, choice), job.model.layers // choice.pp
    shape, mask, way = shape_of(job, choice), job.who_sees, choice.way
    forward = attention_bytes(shape, mask, way).total
    if choice.checkpointing == "full" and job.backward:
        forward *= 2
    backward = attention_bytes(shape, mask, way, True).total if job.backward else 0
    size = tokens_of(job, choice) * job.model.hidden * job.precision.element
    times = (4, 10, 14)[job.backward + (job.backward and choice.checkpointing != "none")]
    tensor = times * size * (choice.tp - 1) // choice.tp * layers
    return Sent((forward + backward) * layers * micro, tensor * micro, _states(job, choice))


def _states(job: Job, choice: Choice) -> int:
    precision, here, ranks = job.precision, weights_here(job, choice), choice.fsdp
    others = (ranks - 1) / ranks
    micro = micro_batches(job, choice)
    sent = 0.0
    if job.zero == 3:
        gathers = 2 if job.backward else 1
        sent += micro * here * precision.weights * gathers * others
        sent += micro * here * precision.gradients * others if job.backward else 0
    elif job.backward:
        sent += here * (precision.gradients + precision.weights) * others
    if job.backward:
        for group in choice.reduced:
            sent += 2 * here / ranks * precision.gradients * (group.size - 1) / group.size
    return round(sent)
