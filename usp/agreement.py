"""Ranks compare what they were asked for, so that a difference is an error and not a hang."""

from __future__ import annotations

from usp.mesh import SequenceMesh

Facts = dict[str, str]
_REFUSALS = {"ValueError": ValueError, "NotImplementedError": NotImplementedError}


def compare(mesh: SequenceMesh, facts: Facts, error: Exception | None) -> None:
    """Collective: raise on every rank if any rank refused, or if two differ in a fact.

    Args:
        mesh: All its ranks call this.
        facts: What this rank was asked for, by name; empty if it refused.
        error: This rank's own refusal.

    Raises:
        ValueError, NotImplementedError: the own refusal, another rank's, or a difference with
            both values.
    """
    told = (facts, type(error).__name__ if error else None, str(error))
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
