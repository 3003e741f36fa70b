"""Every way of spreading a job: meshes, layouts, transports, and who shares states."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import product

from usp.planning.choose.job import Choice, Job
from usp.planning.choose.network import spans_nodes
from usp.planning.choose.steps import EVERYTHING, same_for_any_length
from usp.planning.layout import DocumentZigzag, Layout
from usp.planning.masks.mask import Intersection
from usp.planning.masks.terms import Documents


def meshes(job: Job, limit: Sequence[str] = (), every_layout: bool = False) -> Iterator[Choice]:
    """Every mesh of a job's devices, with each layout and transport.

    Args:
        job: Of the devices.
        limit: Names of degrees that must be 1.
        every_layout: Also those that take long to plan.
    """
    model, devices = job.model, job.devices
    most = min(devices, job.cluster.node)
    for tp in _divisors(model.kv_heads, 1 if "tp" in limit else most):
        for pp in _divisors(model.layers, 1 if "pp" in limit else devices):
            if devices % (tp * pp):
                continue
            for sp in _divisors(devices // (tp * pp), devices):
                dp = devices // (tp * pp * sp)
                if job.batch % dp or sp > job.seq_len:
                    continue
                for ulysses in _divisors(sp, 1 if "ulysses" in limit else model.heads):
                    ring = sp // ulysses
                    if "ring" in limit and ring > 1:
                        continue
                    degrees = Choice(dp, 1, ring, ulysses, tp, pp)
                    yield from _ways(job, degrees, every_layout)


def _ways(job: Job, degrees: Choice, every_layout: bool) -> Iterator[Choice]:
    layouts: list[Layout] = ["contiguous"]
    transports = ["ring"]
    if degrees.ring > 1:
        if job.who_sees != EVERYTHING:
            layouts += ["zigzag", *(_planned_layouts(job) if every_layout else ())]
        transports.append("allgather")
        if job.mask is not None and degrees.ring <= 64:
            transports.append("direct")
        if job.backward and _queries_are_less(job):
            transports.append("query_ring")
    whole = replace(degrees, fsdp=degrees.dp * degrees.sp)
    for layout, transport in product(layouts, transports):
        yield replace(whole, layout=layout, transport=transport)
    outer = _nodes_of_ring(job, degrees)
    if outer is None:
        return
    two = ("ring",) if job.model.latent else ("ring", "grid")
    for layout, transport in product(layouts, two):
        yield replace(whole, layout=layout, transport=transport, ring_outer=outer)


def _queries_are_less(job: Job) -> bool:
    """In a backward, than keys and their gradients, row by row (docs/rings.md)."""
    model, size, wide = job.model, job.precision.element, 4
    queries = size * (model.query + model.result) + wide * (model.query + 2 * model.heads)
    return queries < (size + wide) * model.keys


def _nodes_of_ring(job: Job, degrees: Choice) -> int | None:
    """Over how many nodes the ring goes, where each holds several of its ranks."""
    inner = job.cluster.node // (degrees.tp * degrees.ulysses)
    if inner < 2 or degrees.ring % inner or degrees.ring <= inner:
        return None
    return degrees.ring // inner


def refined(job: Job, choice: Choice) -> Iterator[Choice]:
    """The same mesh with other numbers of ranks that share states, and of samples at a time."""
    for fsdp, micro in product(_shares(job, choice), _micros(job, choice)):
        yield replace(choice, fsdp=fsdp, micro=micro)


def relaid(job: Job, choice: Choice) -> Iterator[Choice]:
    """The same mesh with the layouts that have no formula."""
    if choice.ring > 1:
        for layout in _planned_layouts(job):
            yield replace(choice, layout=layout)


def _planned_layouts(job: Job) -> Iterator[Layout]:
    """Striped, and zigzag in each document. Without a mask, or with a causal one alone, they work
    as evenly as zigzag, and no better."""
    mask = job.who_sees
    if same_for_any_length(mask, "zigzag"):
        return
    yield "striped"
    for part in mask.masks if isinstance(mask, Intersection) else (mask,):
        if isinstance(part, Documents):
            yield DocumentZigzag(part.cu_seqlens)


def _shares(job: Job, degrees: Choice) -> list[int]:
    """Over how many ranks states are shared: none, those of a few nodes, all."""
    ranks = degrees.dp * degrees.sp
    found = {1, ranks}
    for nodes in (1, 4, 16):
        inside = nodes * job.cluster.node // degrees.tp
        if inside and not ranks % inside:
            found.add(inside)
    return sorted(found)


def _micros(job: Job, degrees: Choice) -> list[int]:
    each = job.batch // degrees.dp
    return [n for n in (1, 2, 4, 8) if not each % n]


def _divisors(number: int, most: int) -> list[int]:
    return [n for n in range(1, min(number, most) + 1) if not number % n]


def crosses_nodes(job: Job, choice: Choice) -> bool:
    """Whether the ring goes over nodes."""
    return spans_nodes(job.cluster, choice.way.ring)
