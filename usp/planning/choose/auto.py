"""Degrees of a mesh for one attention, without a model around it."""

from __future__ import annotations

from typing import TypedDict

import torch

from usp.planning.choose.attention import Way, attention_seconds
from usp.planning.choose.cluster import CLUSTERS, Cluster, cluster_of
from usp.planning.choose.here import NAME, measured_here
from usp.planning.choose.network import Group
from usp.planning.choose.steps import CAUSAL, EVERYTHING
from usp.planning.cost import Shape
from usp.planning.kinds import integer


class Attention(TypedDict, total=False):
    """What ``init_mesh("auto", ...)`` asks.

    Attributes:
        seq_len: Tokens of a whole sequence.
        heads, kv_heads, head_dim: H, G (default: H) and D (default: 128).
        causal: Whether it is (default: no).
        cluster: A name of ``usp plan --sources``, or "here"; by default what was measured here,
            else what the device is called.
    """

    seq_len: int
    heads: int
    kv_heads: int
    head_dim: int
    causal: bool
    cluster: str


_NEEDED = ("seq_len", "heads")
_KNOWN = (*_NEEDED, "kv_heads", "head_dim", "causal", "cluster")


def choose_degrees(ranks: int, attention: Attention, device: str) -> tuple[int, int]:
    """Ulysses and ring degree, the fastest of those that make up ``ranks``.

    By the predicted time of a forward and a backward of one layer; causal ones lie in zigzag.

    Args:
        ranks: Of the mesh.
        attention: Its lengths and heads.
        device: The name of a rank's device, "NVIDIA H100 80GB HBM3" say, or "cpu".

    Raises:
        TypeError: an argument that nobody knows, or one of another type.
        ValueError: seq_len or heads is missing, a number below 1, heads that are no multiple of
            kv_heads, or a cluster that is not known.
    """
    if strange := sorted(set(attention) - set(_KNOWN)):
        raise TypeError(f'init_mesh("auto", ...) takes {", ".join(_KNOWN)}, not {strange[0]!r}')
    if missing := [name for name in _NEEDED if attention.get(name) is None]:
        raise ValueError(
            f'init_mesh("auto", ...) needs {" and ".join(missing)}: how long the whole sequence '
            "is, and how many query heads attend"
        )
    length = integer("seq_len", attention["seq_len"], least=1)
    heads = integer("heads", attention["heads"], least=1)
    kv_heads = integer("kv_heads", attention.get("kv_heads") or heads, least=1)
    dim = integer("head_dim", attention.get("head_dim", 128), least=1)
    if heads % kv_heads:
        raise ValueError(f"heads {heads} is not a multiple of kv_heads {kv_heads}")
    cluster = _cluster(attention.get("cluster"), device)
    shape = Shape(1, length, length, heads, kv_heads, dim, dim, torch.bfloat16)
    mask, layout = (CAUSAL, "zigzag") if attention.get("causal") else (EVERYTHING, "contiguous")

    def seconds(ulysses: int) -> float:
        way = Way(Group(ranks // ulysses, ulysses), Group(ulysses), layout)
        both = (attention_seconds(shape, mask, way, cluster, back) for back in (False, True))
        return sum(one.total for one in both)

    degrees = [n for n in range(1, min(ranks, heads) + 1) if not ranks % n]
    best = min(degrees, key=seconds)
    return best, ranks // best


def _cluster(name: str | None, device: str) -> Cluster:
    if name is not None and name != NAME:
        return cluster_of(name)
    found = measured_here()
    if found is None and name == NAME:
        raise ValueError(f"cluster {NAME!r} was not measured yet: usp plan --calibrate")
    if found is not None and (name == NAME or device == "cpu"):
        return found
    return named_like(device)


# What devices call themselves, and the cluster that has them.
_SIGNS = {
    "B200": "b200",
    "H200": "h200",
    "H100": "h100",
    "A800": "a800",
    "A100-PCIE": "a100-pcie",
    "A100 80GB PCIe": "a100-pcie",
    "A100": "a100",
    "L20": "l20",
    "MI250": "frontier",
    "MI300": "mi300x",
}


def named_like(device: str) -> Cluster:
    """The cluster of such devices.

    Raises:
        ValueError: nobody knows one; says how to name it.
    """
    if device == "cpu":
        return CLUSTERS["laptop"]
    found = next((name for sign, name in _SIGNS.items() if sign in device), None)
    if found is None:
        raise ValueError(
            f'init_mesh("auto", ...) knows no cluster of {device!r}: pass cluster=, one of '
            f"{', '.join(CLUSTERS)}"
        )
    return CLUSTERS[found]
