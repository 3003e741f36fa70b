"""What one layer saves for its backward, and what its backward makes: bytes a token.

Checked against storages that a step makes, one by one (``tests/planning/test_memory_of_steps.py``).
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
    query, result = element * model.query, element * model.result
    norm = 2 * hidden
    if model.gated and not job.fused:
        norm = 2 * wide_of(job) * model.hidden + hidden
    of_op = result + wide_of(job) * model.heads
    front = float(norm + query + keys + of_op)
    if choice.chunks > 1:  # all but the result waits on the host
        front, of_op = norm + result, 0
    elif choice.ulysses > 1 and job.as_usp:
        front += result  # of its own heads, beside that of its own tokens
        of_op += query + result + keys
    widths = 2 + model.gated * (1 if job.fused else 2)
    mlp = 0 if choice.tiles == "mlp+loss" else widths * element * model.inner
    mlp += 2 * model.active * hidden  # what each expert is given, and its result
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
    matrix = model.hidden * model.mlp
    yield Turn("MLP", hidden + inner, matrix)
    if model.gated:
        yield Turn("MLP", hidden + 2 * inner, 0, matrix)  # of both that were multiplied
        gone = 0 if choice.tiles == "mlp+loss" else saved.mlp - 2 * inner
        yield Turn("MLP", 2 * hidden + 2 * inner - gone, 2 * matrix, matrix)
    gone, done = saved.mlp + saved.norm, model.mlp_weights
    query, result = element * model.query, element * model.result
    yield Turn("attention", hidden + result - gone, model.hidden * model.result, done)
    done += model.hidden * model.result
    yield Turn("attention", hidden + result + _of_attention(job, choice) - gone, 0, done)
    gone += result + (query + keys if choice.chunks == 1 else 0)
    joined = model.hidden * (model.query + model.keys)
    yield Turn("attention", 2 * (hidden + query + keys) - gone, joined, done)


def _of_attention(job: Job, choice: Choice) -> float:
    """Of its backward, beside the gradient of its result: gradients, sums and blocks of a ring;
    and once these are done two messages of the exchange and what comes out of them."""
    model, element, wide = job.model, job.precision.element, wide_of(job)
    gradients = float(element * (model.query + model.keys))
    if choice.chunks > 1:  # docs/offload.md: of a chunk, but for the gradients
        of_chunk = 2 * element * (model.query + model.result) + wide * model.result
        of_chunk += 3 * model.keys * (element + wide)
        return gradients + of_chunk / choice.chunks
    ring = _of_ring(job, choice) if choice.ring > 1 else gradients
    groups = choice.head_chunks
    if groups == 1:
        return ring if choice.ulysses == 1 else element * model.result + max(ring, 4 * gradients)
    # of a group of heads, beside the gradients of all, to which its own go
    if choice.ulysses > 1:
        ring = element * model.result + max(ring, 3 * gradients)
    return gradients + ring / groups


def _of_ring(job: Job, choice: Choice) -> float:
    model, element, wide = job.model, job.precision.element, wide_of(job)
    queries = element * (model.query + model.result) + 2 * wide * model.heads
    ways = min(2, choice.ring - 1)  # from both sides where there are more than two ranks
    if choice.transport == "query_ring":  # of each three messages of q, dout, lse and delta
        return float(wide * ((2 + ways) * model.query + model.keys) + 3 * ways * queries)
    sums, block = wide * (model.query + 2 * model.keys), model.keys * (element + wide)
    if choice.transport == "grid":  # and all that queries of a node have
        inner = choice.ring // choice.ring_outer
        return float(sums + 2 * block + inner * (2 * queries + wide * model.query))
    if choice.transport == "ring":
        return float(sums + (1 + ways) * block + (2 * ways - 1) * model.keys * element)
    return float(sums + choice.ring * block)
