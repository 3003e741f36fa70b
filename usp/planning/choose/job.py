"""What is to be trained, and one way of spreading it."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch

from usp.planning.choose.attention import Way
from usp.planning.choose.cluster import Cluster
from usp.planning.choose.model import Model
from usp.planning.choose.network import Group
from usp.planning.choose.steps import CAUSAL, EVERYTHING
from usp.planning.cost import Shape
from usp.planning.layout import Layout
from usp.planning.masks.mask import Mask

TILES = ("none", "loss", "mlp+loss")
CHECKPOINTING = ("none", "attention", "full")
OFFLOAD = ("none", "inputs", "states")
# What of each logit lives at a time: itself, its softmax in fp32 and its gradient, as in Megatron's
# loss; all three in its dtype, as in torch's; with a kernel that keeps no softmax; and as models of
# transformers have it, with a copy in fp32, one that is shifted by a token, softmax and gradient.
LOSSES = ("fp32", "torch", "kernel", "transformers")


@dataclass(frozen=True)
class Precision:
    """Bytes of each weight's states, and what computes.

    Attributes:
        weights, gradients, optimizer: Bytes; AdamW beside bf16 weights has 12.
        element: Bytes of an activation.
        matrix: The dtype of matrix products, of ``Cluster.peak``. Attention is in 16 bits.
        loss: Of ``LOSSES``.
    """

    weights: int = 2
    gradients: int = 4
    optimizer: int = 12
    element: int = 2
    matrix: str = "bf16"
    loss: str = "fp32"


@dataclass(frozen=True)
class Job:
    """A model, its batches and the devices for it.

    Attributes:
        model: Its shape.
        seq_len: Tokens of a sequence.
        batch: Sequences of a step, all devices together.
        cluster, devices: Where.
        mask: Who sees whom; by default as the model is causal or not.
        precision: Bytes and dtypes.
        zero: What ``Choice.fsdp`` ranks share: 1 the optimizer's state, 2 gradients too, 3 (FSDP)
            weights too.
        backward: Whether it trains.
        as_usp: Whether a row of several Ulysses ranks saves what usp does: beside its result that
            of its own heads, and under a checkpoint of all but attention all that was exchanged.
            Formulas of others count neither, nor the gradient of a weight before it is added to
            what was there, and have a place for every gradient all the time.
        fused: Whether a norm and a gate are a kernel each; else an RMSNorm and a gated MLP save
            what eager torch on a CPU does, op by op.

    Raises:
        ValueError: numbers below 1, or a mask that does not fit.
    """

    model: Model
    seq_len: int
    batch: int
    cluster: Cluster
    devices: int
    mask: Mask | None = None
    precision: Precision = Precision()
    zero: int = 3
    backward: bool = True
    as_usp: bool = True
    fused: bool = True

    def __post_init__(self) -> None:
        for name in ("seq_len", "batch", "devices"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be 1 or more, got {getattr(self, name)}")
        if self.mask is not None:
            self.mask.refuse_lengths(self.seq_len, self.seq_len)

    @property
    def who_sees(self) -> Mask:
        if self.mask is not None:
            return self.mask
        return CAUSAL if self.model.causal else EVERYTHING

    def dtype(self) -> torch.dtype:
        return {8: torch.float64, 4: torch.float32}.get(self.precision.element, torch.bfloat16)


@dataclass(frozen=True)
class Choice:
    """One way of spreading a job: degrees, and what saves memory.

    Attributes:
        dp: Ranks that have samples of their own.
        fsdp: Ranks that share weights and states, out of dp x ring x ulysses; 1 is none.
        ring, ulysses, tp, pp: Ranks along these axes. Neighbours are along tp, then ulysses, ring,
            dp, pp.
        layout, transport: Of attention.
        ring_outer: Nodes of a ring of two levels; 1 is a plain one.
        chunks: Of a rank's tokens, worked off by attention one after the other, with ``offload=
            "cpu"``; 1 is all at once.
        head_chunks: Groups of a rank's heads, worked off one after the other; 1 is all at once.
        tiles: "loss": a fused head and loss; "mlp+loss": the MLPs in tiles, too.
        checkpointing: "attention" computes all but attention again, "full" everything.
        offload: "inputs": those that checkpoints keep lie on the host; "states": weights and
            optimizer, too.
        micro: Samples at a time on the ranks of a sequence.
    """

    dp: int = 1
    fsdp: int = 1
    ring: int = 1
    ulysses: int = 1
    tp: int = 1
    pp: int = 1
    layout: Layout = "contiguous"
    transport: str = "ring"
    tiles: str = "none"
    checkpointing: str = "none"
    offload: str = "none"
    micro: int = 1
    ring_outer: int = 1
    chunks: int = 1
    head_chunks: int = 1

    @property
    def sp(self) -> int:
        return self.ring * self.ulysses

    @property
    def devices(self) -> int:
        return prod((self.dp, self.ring, self.ulysses, self.tp, self.pp))

    @property
    def way(self) -> Way:
        """How a sequence lies: Ulysses on neighbours, the ring over its rows."""
        ring = Group(self.ring, self.tp * self.ulysses)
        return Way(ring, Group(self.ulysses, self.tp), self.layout, self.transport, self.ring_outer)

    @property
    def sharing(self) -> Group:
        """The ranks that share states."""
        return Group(self.fsdp, self.tp)

    @property
    def reduced(self) -> tuple[Group, ...]:
        """Along which ranks gradients are added at the end: one axis after the other, as
        ``usp.all_reduce_gradients`` does, or over the ranks that hold the same part of them."""
        if self.fsdp == 1:
            ring, ulysses = self.way.ring, self.way.ulysses
            return ulysses, ring, Group(self.dp, self.tp * self.sp)
        return (Group(self.dp * self.sp // self.fsdp, self.tp * self.fsdp),)


def shape_of(job: Job, choice: Choice) -> Shape:
    """The attention of one layer for the samples computed at a time."""
    model, lengths = job.model, (job.seq_len, job.seq_len)
    heads, kv_heads = model.heads // choice.tp, model.kv_heads // choice.tp
    dims = model.head_dim, model.value_dim
    latent = model.latent or None
    return Shape(choice.micro, *lengths, heads, kv_heads, *dims, job.dtype(), latent_width=latent)


def loss_bytes(job: Job, choice: Choice) -> float:
    """Bytes a token of what its loss makes. Tiles of logits are about as large as the hidden
    states, in fp32."""
    model, element = job.model, job.precision.element
    if not model.vocabulary:  # features in fp32, and how far they are from where they shall be
        return 2 * 4 * model.hidden
    if choice.tiles != "none":
        return 3 * 4 * model.hidden
    of_logit = {
        "fp32": 2 * element + 4,
        "torch": 3 * element,
        "kernel": 2 * element,
        "transformers": element + 4 * 4,
    }
    return float(model.vocabulary * of_logit[job.precision.loss])


def micro_batches(job: Job, choice: Choice) -> int:
    """How often a rank computes before it steps."""
    return job.batch // (choice.dp * choice.micro)


def tokens_of(job: Job, choice: Choice) -> int:
    """Of a rank and its tensor-parallel neighbours, at a time: of the rank with most."""
    row = -(-job.seq_len // choice.ring)
    return choice.micro * -(-row // choice.ulysses)
