"""Which ranks of a mesh compute on the same cores, and how many of them at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from usp.machine import cpu
from usp.planning.degrees import Shared
from usp.planning.kinds import integer


@dataclass(frozen=True)
class Seat:
    """Where a rank computes.

    Attributes:
        system: Of those that ranks are in.
        cores: That it may use.
        threads: That it computes with.
        told: How many cores the ranks of a system share, where somebody says so.
        refusal: Why what was said is wrong.
    """

    system: str
    cores: frozenset[int]
    threads: int
    told: int | None
    refusal: str | None = None


def own_seat(told: int | None, device_type: str) -> Seat:
    """This rank's; one on a GPU has no cores that it could share."""
    number, refusal = None, None
    try:
        number = None if told is None else integer("cores", told, least=1)
    except (TypeError, ValueError) as error:
        refusal = str(error)
    if number is not None and device_type != "cpu":
        refusal = f"cores = {number} is for ranks on CPUs: each on {device_type} has its device"
    found = cpu.cores() if device_type == "cpu" else ()
    return Seat(cpu.running_system(), frozenset(found), torch.get_num_threads(), number, refusal)


def shared_cores(seats: Sequence[Seat]) -> tuple[Shared, ...]:
    """Of ranks by their seats: those that have less cores together than they would keep busy.

    Ranks share what one of them may use, too; a rank keeps as many cores busy as it has threads.

    Raises:
        ValueError: a rank was told a number of cores that is none, or another than the others.
    """
    for rank, seat in enumerate(seats):
        if seat.refusal is not None:
            raise ValueError(f"rank {rank} of the mesh refused: {seat.refusal}")
        if seat.told != seats[0].told:
            raise ValueError(
                f"ranks of the mesh disagree on cores: rank 0 has {seats[0].told}, rank {rank} "
                f"has {seat.told}"
            )
    found = []
    for ranks, cores in _together(seats):
        busy = sum(min(seats[rank].threads, cores) for rank in ranks)
        if busy > cores > 0:
            found.append(Shared(ranks, cores * len(ranks) / busy))
    return tuple(found)


def _together(seats: Sequence[Seat]) -> list[tuple[tuple[int, ...], int]]:
    """Ranks that share cores, and how many these are."""
    found: list[tuple[set[int], str, set[int]]] = []  # ranks, system, cores
    for rank, seat in enumerate(seats):
        joined = {rank}, seat.system, set(seat.cores)
        for each in list(found):
            if each[1] == seat.system and (seat.told is not None or each[2] & joined[2]):
                joined[0].update(each[0])
                joined[2].update(each[2])
                found.remove(each)
        found.append(joined)
    told = seats[0].told
    return [(tuple(sorted(ranks)), told or len(cores)) for ranks, _, cores in found]
