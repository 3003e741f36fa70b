"""One row of the attention matrix, without the matrix: whom a patch looks at, head by head."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import usp
from usp.demo.model import PatchTransformer
from usp.demo.settings import Settings


def query_patches(patches: Tensor) -> list[int]:
    """Two patches to ask: the brightest and the darkest. (tokens, patch_dim) -> tokens."""
    brightness = patches.float().mean(dim=-1)
    return [int(brightness.argmax()), int(brightness.argmin())]


def record_attention_inputs(model: PatchTransformer) -> list[Tensor]:
    """The returned list gets what the last attention module is given."""
    inputs: list[Tensor] = []

    def keep(_module: Any, args: tuple[Tensor, ...]) -> None:
        inputs.append(args[0].detach())

    model.last_attention.register_forward_pre_hook(keep)
    return inputs


@torch.no_grad()
def attention_rows(
    settings: Settings,
    mesh: usp.SequenceMesh,
    attention: nn.MultiheadAttention,
    local: Tensor,
    queries: list[int],
) -> Tensor:
    """Attention weights of some queries: each rank scores its own keys, then scores are joined.

    Args:
        settings: Layout and length.
        mesh: The ranks that share the picture.
        attention: Its weights.
        local: (1, local tokens, embed_dim), what it was given on this rank.
        queries: Q tokens, by global position.

    Returns:
        (Q, heads, tokens) fp32, on every rank; each row sums to 1.
    """
    layout, tokens = settings.layout, settings.grid.tokens
    w_q, w_k, _ = attention.in_proj_weight.chunk(3)
    b_q, b_k, _ = attention.in_proj_bias.chunk(3)
    local = local.to(w_q.dtype)
    whole = usp.unshard_sequence(local, mesh, 1, layout, tokens)
    q = (whole[0, queries] @ w_q.T + b_q).unflatten(-1, (settings.num_heads, -1))
    k = (local[0] @ w_k.T + b_k).unflatten(-1, (settings.num_heads, -1))
    scores = torch.einsum("qhd,lhd->qhl", q, k).float() * q.shape[-1] ** -0.5
    return usp.unshard_sequence(scores, mesh, 2, layout, tokens).softmax(dim=-1)
