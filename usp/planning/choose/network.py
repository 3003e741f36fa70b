"""How long messages and collectives take: a latency for each rank, and bytes by the link's rate."""

from __future__ import annotations

from typing import NamedTuple

from usp.planning.choose.cluster import Cluster, Link


class Group(NamedTuple):
    """Ranks that talk: ``size`` of them, ``stride`` devices apart, and others like them beside."""

    size: int
    stride: int = 1


ALONE = Group(1)


def level_of(cluster: Cluster, group: Group) -> Link:
    """The innermost level that holds the whole group."""
    for link in cluster.levels:
        if not link.ranks or group.size * group.stride <= link.ranks:
            return link
    return cluster.levels[-1]


def spans_nodes(cluster: Cluster, group: Group) -> bool:
    return group.size > 1 and group.size * group.stride > cluster.node


def _in_a_node(cluster: Cluster, group: Group) -> int:
    """Members of the group in each node."""
    return max(1, min(group.size, cluster.node // group.stride))


def gather(cluster: Cluster, group: Group, whole: float) -> float:
    """Seconds of an all-gather to ``whole`` bytes, or of a reduce-scatter of them.

    Each rank gets all but its own. Over nodes the members in a node bring what their adapters
    carry together, as rings of NCCL and RCCL do.
    """
    if group.size == 1:
        return 0.0
    link = level_of(cluster, group)
    rate = link.rate
    if spans_nodes(cluster, group):
        members = _in_a_node(cluster, group)
        rate = max(min(rate * members, _inner(cluster).rate), min(rate, link.of_flow))
    return link.latency * (group.size - 1) + whole * (group.size - 1) / group.size / rate


def _inner(cluster: Cluster) -> Link:
    """The widest level inside a node."""
    inside = [link for link in cluster.levels if link.ranks]
    return inside[-1] if inside else cluster.levels[-1]


def all_reduce(cluster: Cluster, group: Group, size: float) -> float:
    """A reduce-scatter and an all-gather, unless the link's rate of both together is known."""
    link = level_of(cluster, group)
    if not link.all_reduce or group.size == 1:
        return 2 * gather(cluster, group, size)
    others = group.size - 1
    return 2 * (link.latency * others + size * others / group.size / link.all_reduce)


def all_to_all(cluster: Cluster, group: Group, sent: float) -> float:
    """Seconds of an all-to-all in which each rank sends so many bytes to others.

    Each message that leaves a node costs what a message of its own costs: in an all-to-all over
    many ranks they are small.
    """
    if group.size == 1:
        return 0.0
    link = level_of(cluster, group)
    waits = link.latency * (group.size - 1) + link.hop
    if not spans_nodes(cluster, group):
        return waits + sent / link.of_all_to_all
    members = _in_a_node(cluster, group)
    waits += link.hop * (group.size - members - 1)
    inside = sent * (members - 1) / (group.size - 1)
    return waits + max((sent - inside) / link.of_all_to_all, inside / _inner(cluster).rate)


def hop(cluster: Cluster, group: Group, message: float) -> float:
    """Seconds in which every rank passes such a message to its neighbour."""
    if group.size == 1 or not message:
        return 0.0
    link = level_of(cluster, group)
    rate = link.of_flow
    if spans_nodes(cluster, group):
        # of a ring that goes through a node once, the last member alone sends out of it
        flows = min(group.stride, cluster.node)
        rate = min(link.of_flow, link.rate * cluster.node / flows)
    return link.hop + message / rate
