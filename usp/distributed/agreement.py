"""Ranks compare what they were asked for, so that a difference is an error and not a hang."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import TypeVar, cast

from usp.distributed.comm import untraced
from usp.distributed.mesh import SequenceMesh

Facts = dict[str, str]
Found = TypeVar("Found")
_REFUSALS = {"ValueError": ValueError, "NotImplementedError": NotImplementedError}


def together(
    mesh: SequenceMesh | None,
    validate: bool,
    check: Callable[[], Found],
    facts: Callable[[Found], Facts],
) -> Found:
    """What ``check`` finds or raises, on request only together with all ranks of the mesh.

    Args:
        mesh: All its ranks call this.
        validate: Whether they compare.
        check: Looks at what this rank was given.
        facts: What of its findings all ranks must agree on, by name.
    """
    if mesh is None or mesh.size == 1 or not validate:
        return check()
    found, told, error = None, {}, None
    try:
        found = check()
        told = facts(found)
    except Exception as refusal:  # whatever it is, the others must not wait for this rank
        error = refusal
    compare(mesh, told, error)
    return cast(Found, found)


@untraced
def compare(mesh: SequenceMesh, facts: Facts, error: Exception | None) -> None:
    """Collective: raise on every rank if any rank refused, or if two differ in a fact.

    Eight bytes from each rank, and only where these differ what they stand for.

    Args:
        mesh: All its ranks call this.
        facts: What this rank was asked for, by name; empty if it refused.
        error: This rank's own refusal.

    Raises:
        ValueError, NotImplementedError: the own refusal, another rank's, or a difference with
            both values.
    """
    told = (facts, type(error).__name__ if error else None, str(error))
    digest = hashlib.blake2b(repr(told).encode(), digest_size=8).digest()
    digests = mesh.gather_numbers(int.from_bytes(digest, "little", signed=True))
    if error is None and len(set(digests)) == 1:
        return
    everyone = mesh.gather_objects(told)
    if error is not None:
        raise error
    for rank, (_, kind, message) in enumerate(everyone):
        if kind is not None:
            raise _REFUSALS.get(kind, ValueError)(f"rank {rank} of the mesh refused: {message}")
    names = {name: None for facts, _, _ in everyone for name in facts}
    for name in names:
        # A rank that cannot tell leaves the fact out.
        values = [(rank, f[name]) for rank, (f, _, _) in enumerate(everyone) if name in f]
        for rank, value in values[1:]:
            if value != values[0][1]:
                raise ValueError(
                    f"ranks of the mesh disagree on {name}: rank {values[0][0]} has "
                    f"{values[0][1]}, rank {rank} has {value}{_advice(name)}"
                )


def _advice(name: str) -> str:
    if "dropout seed" in name:
        return "; seed all ranks alike, or draw inside usp.rng.replicated(mesh)"
    if name == "seq_len":
        return "; where shards are uneven pass seq_len="
    return ""
