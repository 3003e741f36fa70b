"""What one layer saves for its backward, and what its backward makes: bytes a token.

Checked against storages that a step makes, one by one (``tests/planning/test_memory.py``).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from usp.planning.choose.job import Choice, Job
from usp.planning.problem import state_dtype


@dataclass(frozen=True)
class Saved:
    """Bytes a token.

    Attributes:
        input: The layer's input.
        front: Input and result of the norm in front of attention, q, k, v, attention's result and
            its lse, and what else the head exchange saves.
        norm: Input and result of the norm in front of the MLP.
        mlp: Between the matrices of the MLP.
        of_op: The part of ``front`` that attention itself returns and saves.
    """

    input: float
    front: float
    norm: float
    mlp: float
    of_op: float

    @property
    def total(self) -> float:
        return self.front + self.norm + self.mlp

    def again(self, job: Job, choice: Choice) -> float:
        """What a checkpoint makes again beside what it kept."""
        kept = self.input if choice.offload == "none" and job.fused else 0.0
        kept += self.of_op if choice.checkpointing == "attention" else 0.0
        return self.total - kept


def wide_of(job: Job) -> int:
    """Bytes of a number of sums."""
    return int(state_dtype(job.dtype()).itemsize)


def saved_of(job: Job, choice: Choice) -> Saved:
    """Of a whole layer.

    A norm saves its input and its result. Run op by op an RMSNorm saves its input and what it
    scales in fp32 and its result, and a gated MLP four inner widths in place of three: what the
    activation made is there too.
    """
    model, element = job.model, job.precision.element
    hidden, keys = element * model.hidden, element * model.keys
    norm = 2 * hidden
    if model.gated and not job.fused:
        norm = 2 * wide_of(job) * model.hidden + hidden
    of_op = hidden + wide_of(job) * model.heads
    front = norm + hidden + keys + of_op
    if choice.ulysses > 1 and job.as_usp:
        front += hidden  # the result of its own heads, beside that of its own tokens
        of_op += 2 * hidden + keys
    widths = 2 + model.gated * (1 if job.fused else 2)
    mlp = 0 if choice.tiles == "mlp+loss" else widths * element * model.inner
    return Saved(hidden, front, norm, mlp, of_op)


@dataclass(frozen=True)
class Turn:
    """A moment of a layer's backward.

    Attributes:
        name: Of the part that computes.
        tokens: Bytes a token beside all that the layer saved, less what is gone again.
        matrix: Numbers of the weight whose gradient is made meanwhile.
        done: Numbers of those of this layer whose gradients were made before.
    """

    name: str
    tokens: float
    matrix: int = 0
    done: int = 0


def turns_of(job: Job, choice: Choice, saved: Saved) -> Iterator[Turn]:
    """From behind: there is a gradient of the residual all the time."""
    model, element = job.model, job.precision.element
    hidden, keys = element * model.hidden, element * model.keys
    inner = 0 if choice.tiles == "mlp+loss" else element * model.inner
    matrix, square = model.hidden * model.mlp, model.hidden**2
    yield Turn("MLP", hidden + inner, matrix)
    if model.gated:
        yield Turn("MLP", hidden + 2 * inner, 0, matrix)  # of both that were multiplied
        gone = 0 if choice.tiles == "mlp+loss" else saved.mlp - 2 * inner
        yield Turn("MLP", 2 * hidden + 2 * inner - gone, 2 * matrix, matrix)
    gone, done = saved.mlp + saved.norm, model.mlp_weights
    yield Turn("attention", 2 * hidden - gone, square, done)
    done += square
    yield Turn("attention", 2 * hidden + _of_attention(job, choice) - gone, 0, done)
    gone += 2 * hidden + keys
    yield Turn(
        "attention", 2 * (2 * hidden + keys) - gone, square + model.hidden * model.keys, done
    )


def _of_attention(job: Job, choice: Choice) -> float:
    """Of its backward, beside the gradient of its result: gradients, sums and blocks of a ring;
    and once these are done two messages of the exchange and what comes out of them."""
    model, element, wide = job.model, job.precision.element, wide_of(job)
    gradients = element * (model.hidden + model.keys)
    ring = float(gradients)
    if choice.ring > 1:
        ring = _of_ring(choice.transport, choice.ring, job, wide)
    if choice.ulysses == 1:
        return ring
    return float(element * model.hidden + max(ring, 4 * gradients))


def _of_ring(transport: str, ranks: int, job: Job, wide: int) -> float:
    model, element = job.model, job.precision.element
    if transport == "query_ring":  # three messages of q, dout, lse and delta, two of dq
        message = 2 * element * model.hidden + 2 * wide * model.heads
        return wide * (3 * model.hidden + model.keys) + 3 * message
    sums = wide * (model.hidden + 2 * model.keys)
    if transport == "ring":
        return sums + model.keys * (3 * element + 2 * wide)
    return sums + ranks * model.keys * (element + wide)
