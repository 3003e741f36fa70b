"""What a call is to compute, checked; where ranks share a sequence, by all of them together."""

from __future__ import annotations

from collections.abc import Sequence

from usp.attention.arguments import (
    Alone,
    Request,
    check,
    check_alone,
    complete,
    facts,
    needs_gradients,
    seed_of,
)
from usp.attention.given import Options, Tensors
from usp.distributed.agreement import Facts, When, check_on_all_ranks, check_when, meets, new_name
from usp.distributed.mesh import SequenceMesh, check_mesh
from usp.planning.layout import both
from usp.planning.shares import names_lengths, summed_length


def agree_on_request(
    tensors: Tensors,
    options: Options,
    mesh: SequenceMesh | None,
    dropout_seed: int | None,
    drawn: int | None,
    validate: When,
    gradients: Sequence[bool] | None = None,
) -> tuple[Request, int | None]:
    """The arguments, checked; together with all ranks of the mesh where these meet.

    Args:
        tensors, options, mesh, dropout_seed, validate: As in ``long_context_attention``.
        drawn: The seed where this rank drew one.
        gradients: Which of q, k, v and bias need one, where the tensors cannot tell.

    Returns:
        What to compute, and the name of this call where the ranks have met.
    """
    named = names_lengths(options.seq_len, options.layout)
    # no rank can tell the whole length from what it holds itself, whoever vouches for the rest
    when, asks = validate if named else None, drawn is not None or not named
    if mesh is not None and meets(check_mesh(mesh), when, asks):
        return _together(tensors, options, mesh, (dropout_seed, drawn), validate, gradients)
    check_when(validate)
    return check(tensors, options, mesh, seed_of(dropout_seed) or drawn or 0), None


def _together(
    tensors: Tensors,
    options: Options,
    mesh: SequenceMesh,
    seeds: tuple[int | None, int | None],
    validate: When,
    gradients: Sequence[bool] | None,
) -> tuple[Request, int]:
    """Whole lengths that nobody named are the sum of what the ranks hold, and a seed that they
    drew is that of the first.

    Args:
        seeds: The one that was given, and the one that was drawn in its place.
    """
    dropout_seed, drawn = seeds

    def complete_with(alone: Alone, lengths: tuple[int, int], seed: int) -> Request:
        return complete(alone, lengths, tensors, options, mesh, seed)

    def check_here() -> tuple[Alone, Request | None]:
        alone = check_alone(tensors, options)
        seed_of(dropout_seed)
        check_when(validate)
        # here, that the others hear of what is refused
        lengths = alone.lengths
        return alone, None if lengths is None else complete_with(alone, lengths, 0)

    def said(found: tuple[Alone, Request | None]) -> Facts:
        needed = needs_gradients(tensors) if gradients is None else gradients
        seed = None if dropout_seed is None else int(dropout_seed)  # a tensor of one number, too
        return facts(tensors, options, found[0], seed, needed)

    (alone, whole), told = check_on_all_ranks(
        mesh,
        "long_context_attention",
        check_here,
        said,
        lambda: (tensors.q.shape[1], tensors.k.shape[1], drawn or 0, new_name()),
    )
    queries, keys, theirs, names = zip(*told, strict=True)
    seed = theirs[0] if drawn is not None else seed_of(dropout_seed) or 0
    if whole is not None and not seed:
        return whole, names[0]
    lengths = alone.lengths
    if lengths is None:
        degrees, layouts = (mesh.ring_degree, mesh.ulysses_degree), both(options.layout)
        lengths = (
            summed_length("q", queries, layouts[0], degrees),
            summed_length("k", keys, layouts[1], degrees),
        )
    return complete_with(alone, lengths, seed), names[0]
