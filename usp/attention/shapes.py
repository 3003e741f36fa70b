"""Which tensors fit each other: shapes, dtypes and devices, and heads."""

from __future__ import annotations

import torch
from torch import Tensor

from usp.attention.given import Latents, Tensors
from usp.planning.kinds import DTYPES, check_kinds, integer, tensor


def check_qkv(q: Tensor, k: Tensor, v: Tensor) -> None:
    check_kinds(q, k, v)
    for name, x in (("k", k), ("v", v)):
        if x.shape[0] != q.shape[0]:
            raise ValueError(f"batch sizes differ: q has {q.shape[0]}, {name} has {x.shape[0]}")
    if k.shape[1:3] != v.shape[1:3]:
        raise ValueError(
            f"k and v must have the same tokens and heads: k has {k.shape[1]} tokens and "
            f"{k.shape[2]} heads, v has {v.shape[1]} and {v.shape[2]}"
        )
    if q.shape[3] != k.shape[3] or not q.shape[3] or not v.shape[3]:
        raise ValueError(
            f"head_dim of q and k must be equal and none may be 0: q has {q.shape[3]}, "
            f"k has {k.shape[3]}, v has {v.shape[3]}"
        )
    if not q.shape[2] or not k.shape[2] or q.shape[2] % k.shape[2]:
        raise ValueError(
            f"the heads of q must be a multiple of those of k and v: q has {q.shape[2]}, "
            f"k has {k.shape[2]}"
        )


def check_latents(q: Tensor, latents: Latents) -> None:
    """Latents and up-projections against queries and each other."""
    shapes = {"q": "BLHD", "latent": "BLC", "rope_key": "BLR", "up_k": "HKC", "up_v": "HVC"}
    given = {"q": q, **latents._asdict()}
    for name, x in given.items():
        if tensor(name, x).dim() != len(shapes[name]):
            raise ValueError(f"{name} must have {len(shapes[name])} dims, got {tuple(x.shape)}")
        if x.dtype != q.dtype or x.device != q.device:
            raise ValueError(
                f"{name} must be {q.dtype} on {q.device} as q is, got {x.dtype} on {x.device}"
            )
    told = {name: tuple(x.shape) for name, x in given.items()}
    pairs = (
        ("batch sizes", ("q", 0), ("latent", 0)),
        ("batch sizes", ("latent", 0), ("rope_key", 0)),
        ("tokens", ("latent", 1), ("rope_key", 1)),
        ("heads", ("q", 2), ("up_k", 0)),
        ("heads", ("q", 2), ("up_v", 0)),
        ("dims of latents", ("latent", 2), ("up_k", 2)),
        ("dims of latents", ("latent", 2), ("up_v", 2)),
    )
    for what, (one, i), (other, j) in pairs:
        if told[one][i] != told[other][j]:
            raise ValueError(
                f"{what} differ: {one} has {told[one][i]} {told[one]}, {other} has "
                f"{told[other][j]} {told[other]}"
            )
    if told["up_k"][1] + told["rope_key"][2] != told["q"][3]:
        raise ValueError(
            f"head_dim of q is {told['q'][3]}, but up_k {told['up_k']} and rope_key "
            f"{told['rope_key']} make keys of {told['up_k'][1]} + {told['rope_key'][2]}"
        )


def check_heads(heads: tuple[int, int] | None, tensors: Tensors) -> tuple[int, int]:
    """First query head and number of all heads, of which this call has some."""
    here, kv_here = tensors.q.shape[2], tensors.k.shape[2]
    if heads is None:
        return 0, here
    if not isinstance(heads, (tuple, list)) or len(heads) != 2:
        raise ValueError(f"heads must be a pair (first, total), got {heads!r}")
    first, total = (integer("heads", number, least=0) for number in heads)
    if first + here > total:
        raise ValueError(
            f"heads=({first}, {total}): {here} heads from {first} on are more than {total} in all"
        )
    group = here // kv_here
    if first % group or total % group:
        raise ValueError(
            f"heads=({first}, {total}): {group} query heads share a key head here, so that both "
            f"must be multiples of {group}: cut query heads where a key head's group begins"
        )
    return first, total


def check_extras(tensors: Tensors) -> None:
    q, k = tensors.q, tensors.k
    batch, queries, heads = q.shape[:3]
    mask, bias, slopes = tensors.key_padding_mask, tensors.attn_bias, tensors.alibi_slopes
    for name, x in (("key_padding_mask", mask), ("attn_bias", bias), ("alibi_slopes", slopes)):
        if x is not None and tensor(name, x).device != q.device:
            raise ValueError(f"{name} is on {x.device}, q on {q.device}")
    if mask is not None and (mask.dtype != torch.bool or mask.shape != k.shape[:2]):
        raise ValueError(
            f"key_padding_mask must be bool (batch, local keys) = {tuple(k.shape[:2])}, True to "
            f"ignore, got {mask.dtype} {tuple(mask.shape)}"
        )
    if bias is not None:
        if bias.dtype not in DTYPES:
            raise ValueError(
                f"attn_bias is added to the scores and must be floating point, got {bias.dtype}: "
                "use -inf where a boolean mask hides"
            )
        wanted = ((1, batch), (1, heads), (1, queries))
        if bias.dim() != 4 or any(
            n not in sizes for n, sizes in zip(bias.shape, wanted, strict=False)
        ):
            raise ValueError(
                "attn_bias must be (batch|1, heads|1, local queries|1, all keys) = "
                f"({batch}|1, {heads}|1, {queries}|1, all keys), got {tuple(bias.shape)}"
            )
    if slopes is not None:
        if tuple(slopes.shape) not in ((heads,), (1, heads), (batch, heads)):
            raise ValueError(
                f"alibi_slopes must be (heads,) = ({heads},) or (batch, heads) = "
                f"({batch}, {heads}), got {tuple(slopes.shape)}"
            )
        if slopes.requires_grad:
            raise NotImplementedError(
                "alibi_slopes have no gradient here: detach them, or learn an attn_bias"
            )


def check_sinks(sinks: Tensor, tensors: Tensors) -> None:
    """Refuse sinks that are not one for each head.

    Raises:
        TypeError: they are no plain tensor. ValueError: of another shape or device.
    """
    heads, device = tensors.q.shape[2], tensors.q.device
    if tensor("sinks", sinks).shape != (heads,) or sinks.device != device:
        raise ValueError(
            f"sinks must be (heads,) = ({heads},) on {device}, got {tuple(sinks.shape)} on "
            f"{sinks.device}"
        )
    if not sinks.is_floating_point():
        raise ValueError(f"sinks are logits and must be floating point, got {sinks.dtype}")
