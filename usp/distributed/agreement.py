"""Ranks compare what they were asked for, so that a difference is an error and not a hang."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar, cast

from usp.distributed.comm import untraced
from usp.distributed.mesh import SequenceMesh

Found = TypeVar("Found")
VALIDATE = ("first", "always", "never")
LENGTH_ADVICE = "where shards are uneven pass seq_len="
_REFUSALS = {"ValueError": ValueError, "NotImplementedError": NotImplementedError}


@dataclass(frozen=True)
class Advised:
    """A fact, and what to do where ranks disagree on it."""

    value: object
    advice: str

    def __str__(self) -> str:
        return str(self.value)


# By name; ranks compare them as text.
Facts = dict[str, object]


def check_validate(validate: str) -> None:
    """Refuse an unknown word for when ranks compare.

    Raises:
        ValueError: names it and those there are.
    """
    if validate not in VALIDATE:
        raise ValueError(f"validate must be one of {', '.join(VALIDATE)}, got {validate!r}")


def compares_now(validate: str, compared: bool) -> bool:
    """Whether ranks compare at this call of a module.

    Args:
        validate: Of VALIDATE.
        compared: Whether they did before.
    """
    return validate == "always" or (validate == "first" and not compared)


def check_on_all_ranks(
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
    said = {name: str(fact) for name, fact in facts.items()}
    told = (said, type(error).__name__ if error else None, str(error))
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
    names = {name: None for said, _, _ in everyone for name in said}
    for name in names:
        # A rank that cannot tell leaves the fact out.
        values = [(rank, said[name]) for rank, (said, _, _) in enumerate(everyone) if name in said]
        for rank, value in values[1:]:
            if value != values[0][1]:
                raise ValueError(
                    f"ranks of the mesh disagree on {name}: rank {values[0][0]} has "
                    f"{values[0][1]}, rank {rank} has {value}{_advice(facts.get(name))}"
                )


def _advice(fact: object) -> str:
    return f"; {fact.advice}" if isinstance(fact, Advised) else ""
