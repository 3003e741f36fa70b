"""A ViT and a language model, and a step of their training on a rank of a mesh or alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

import usp
from usp.bench.case import FLOPS
from usp.bench.device import DTYPES
from usp.planning.choose.model import MODELS, Model

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
# For CPUs; and by their names those of ``usp.planning.choose.model`` that have keys and one MLP.
SMALL = {
    "vit": Model("vit", 4, 384, 6, 6, 1536, patch=16, gated=False, causal=False),
    "llm": Model("llm", 4, 512, 8, 2, 1408, vocabulary=8192),
}
PLAIN = {name: m for name, m in MODELS.items() if not (m.latent or m.experts)}
KNOWN: dict[str, Model] = {**SMALL, **PLAIN}


class Layer(nn.Module):
    """Grouped-query attention and an MLP, each behind a norm."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        norm = nn.RMSNorm if model.gated else nn.LayerNorm
        self.norms = nn.ModuleList(norm(model.hidden) for _ in range(2))
        self.heads = model.heads, model.kv_heads, model.kv_heads
        self.head_dim, self.gated = model.head_dim, model.gated
        self.qkv = nn.Linear(model.hidden, sum(self.heads) * model.head_dim, bias=False)
        self.out = nn.Linear(model.hidden, model.hidden, bias=False)
        self.up = nn.Linear(model.hidden, (2 if model.gated else 1) * model.mlp, bias=False)
        self.down = nn.Linear(model.mlp, model.hidden, bias=False)

    def forward(self, x: Tensor, attend: Attend) -> Tensor:
        q, k, v = self.qkv(self.norms[0](x)).unflatten(-1, (-1, self.head_dim)).split(self.heads, 2)
        x = x + self.out(attend(q, k, v).flatten(2))
        y = self.up(self.norms[1](x))
        if self.gated:
            gate, y = y.chunk(2, -1)
            return x + self.down(F.silu(gate) * y)
        return x + self.down(F.gelu(y))


class Transformer(nn.Module):
    """Tokens or patches in, features of this rank's tokens out.

    Args:
        checkpointing: Of ``usp.planning.choose.job.CHECKPOINTING``, of each layer.
    """

    def __init__(self, model: Model, checkpointing: str = "none") -> None:
        super().__init__()
        self.model, self.checkpointing = model, checkpointing
        if model.vocabulary:
            self.embed: nn.Module = nn.Embedding(model.vocabulary, model.hidden)
            self.head = nn.Linear(model.hidden, model.vocabulary, bias=False)
        else:
            self.embed = nn.Linear(3 * model.patch**2, model.hidden, bias=False)
        self.layers = nn.ModuleList(Layer(model) for _ in range(model.layers))

    def loss(self, inputs: Tensor, labels: Tensor, count: int, attend: Attend) -> Tensor:
        """This rank's part of the mean over ``count`` tokens: of the cross entropy, or of the
        squares of the features against the labels."""
        x = self.embed(inputs)
        for layer in self.layers:
            x = self._through(layer, x, attend)
        if self.model.vocabulary:
            logits = self.head(x).flatten(0, 1)
            return F.cross_entropy(logits, labels.flatten(), reduction="sum") / count
        return F.mse_loss(x.float(), labels.float(), reduction="sum") / (count * x.shape[-1])

    def _through(self, layer: nn.Module, x: Tensor, attend: Attend) -> Tensor:
        found: Tensor
        if self.checkpointing == "attention":
            ops = [torch.ops.usp.attention.default]
            saved = partial(create_selective_checkpoint_contexts, ops)
            found = checkpoint(layer, x, attend, use_reentrant=False, context_fn=saved)
        elif self.checkpointing == "full":
            found = checkpoint(layer, x, attend, use_reentrant=False)
        else:
            found = layer(x, attend)
        return found


@dataclass(frozen=True)
class StepCase:
    """A step of training.

    Attributes:
        model: Its shape.
        seq_len, batch: Of a whole step, over all ranks.
        accumulate: In so many micro batches.
        checkpointing: Of ``usp.planning.choose.job.CHECKPOINTING``.
        head_chunks: Groups of heads of usp's attention.
    """

    dtype: str
    model: Model
    seq_len: int
    batch: int
    accumulate: int = 1
    checkpointing: str = "none"
    head_chunks: int = 1

    def __str__(self) -> str:
        name, sizes = self.model.name, f"{self.batch} x {self.seq_len}"
        more = f" in {self.accumulate}" if self.accumulate > 1 else ""
        more += f", checkpoints: {self.checkpointing}" if self.checkpointing != "none" else ""
        more += f", {self.head_chunks} groups of heads" if self.head_chunks > 1 else ""
        return f"{self.dtype} {name} {sizes}{more}"

    @property
    def tokens(self) -> int:
        return self.seq_len * self.batch

    @property
    def flops(self) -> float:
        """6 for each weight and token; attention as its kernels count it."""
        model, pairs = self.model, float(self.seq_len) ** 2 / (2 if self.model.causal else 1)
        weights = model.weights - model.vocabulary * model.hidden  # a look-up is no product
        attention = FLOPS["both"] * model.layers * model.hidden * pairs * self.batch
        return 6.0 * weights * self.tokens + attention

    def named(self) -> dict[str, Any]:
        model = self.model
        return {
            "dtype": self.dtype,
            "model": model.name,
            "layers": model.layers,
            "hidden": model.hidden,
            "length": self.seq_len,
            "batch": self.batch,
            "accumulate": self.accumulate,
            "checkpointing": self.checkpointing,
            **({"head_chunks": self.head_chunks} if self.head_chunks > 1 else {}),
        }

    def data(self) -> tuple[Tensor, Tensor]:
        """Inputs and labels of the whole step, the same on every rank."""
        generator = torch.Generator().manual_seed(0)
        shape, model = (self.batch, self.seq_len), self.model
        if model.vocabulary:
            draw = torch.randint(model.vocabulary, (2, *shape), generator=generator)
            return draw[0], draw[1]
        x = torch.randn(*shape, 3 * model.patch**2, generator=generator)
        labels = torch.randn(*shape, model.hidden, generator=generator)
        return x.to(DTYPES[self.dtype]), labels


class TrainStep:
    """Forward, backward and the sum of gradients, of this rank; no optimizer.

    Args:
        case: The whole step.
        weights: The model, in any dtype, the same on every rank; copied.
        attend: Attention of this rank's tokens.
        mesh: The ranks that share a sequence; None is one device.
        data: Which of how many ranks with samples of their own this is, and their group.
    """

    def __init__(
        self,
        case: StepCase,
        weights: Transformer,
        attend: Attend,
        device: str,
        mesh: usp.SequenceMesh | None = None,
        data: tuple[int, int, Any] = (0, 1, None),
        dtype: torch.dtype | None = None,
    ) -> None:
        self.case, self.attend, self.mesh, self.data = case, attend, mesh, data
        dtype = dtype or DTYPES[case.dtype]
        self.module = Transformer(case.model, case.checkpointing)
        self.module.load_state_dict(weights.state_dict())
        self.module.to(device, dtype)
        place, ranks, self.group = data
        inputs, labels = (x.chunk(ranks)[place] for x in case.data())
        parts = [usp.shard_sequence(x, mesh, 1, layout_of(case)) for x in (inputs, labels)]
        if parts[0].is_floating_point():
            parts[0] = parts[0].to(dtype)
        self.micro = list(zip(*(x.to(device).chunk(case.accumulate) for x in parts), strict=True))

    def __call__(self) -> None:
        """Gradients of the mean over the whole step in the parameters, on every rank."""
        self.module.zero_grad()
        for place in range(len(self.micro)):
            self.add(place)
        usp.all_reduce_gradients(self.module, self.mesh, self.group)

    def add(self, place: int = 0) -> None:
        """Forward and backward of a micro batch; gradients are added to those that are there."""
        inputs, labels = self.micro[place]
        count = self.case.tokens // self.data[1]  # data ranks average
        self.module.loss(inputs, labels, count, self.attend).backward()

    @property
    def gradient_bytes(self) -> int:
        return sum(p.grad.nbytes for p in self.module.parameters() if p.grad is not None)

    def gradients(self) -> Tensor:
        """All of them after a step, in fp64 on the host."""
        self()
        return flat(self.module)


def flat(module: nn.Module) -> Tensor:
    grads = [p.grad for p in module.parameters() if p.grad is not None]
    return torch.cat([grad.flatten().double().cpu() for grad in grads])


def layout_of(case: StepCase) -> str:
    return "zigzag" if case.model.causal else "contiguous"


def of_torch(model: Model) -> Attend:
    """torch's own attention, for one process."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        gqa = model.kv_heads < model.heads
        out = F.scaled_dot_product_attention(q, k, v, is_causal=model.causal, enable_gqa=gqa)
        return out.transpose(1, 2)

    return attend


def of_usp(case: StepCase, mesh: usp.SequenceMesh | None) -> Attend:
    module = usp.LongContextAttention(
        mesh,
        causal=case.model.causal,
        layout=layout_of(case),
        seq_len=case.seq_len,
        validate="never",
        head_chunks=case.head_chunks,
    )

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Tensor = module(q, k, v)
        return out

    return attend


def weights_of(case: StepCase) -> Transformer:
    """The same on every rank."""
    torch.manual_seed(0)
    return Transformer(case.model)


def wrong_gradients(errors: dict[str, float], best: str, dtype: torch.dtype) -> dict[str, str]:
    """Whose gradients are more than three times as far from fp64 as torch's own.

    Args:
        errors: Relative, of each candidate.
        best: The one that is torch's.
        dtype: Of the step.
    """
    allowed = max(3 * errors.get(best, 0.0), torch.finfo(dtype).eps)
    return {
        name: f"gradients are off by {error:.1e}, torch's by {errors.get(best, 0.0):.1e}"
        for name, error in errors.items()
        if not error <= allowed
    }
