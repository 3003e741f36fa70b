"""The likely cause of a difference, in a sentence: guessed from what differs, and where."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import nn

from usp.nn.across import reason
from usp.verification.compare import Comparison, Difference
from usp.verification.evidence import (
    Evidence,
    all_near_seams,
    by_local_index,
    evidence_of,
    is_named,
    is_unused,
    own_parameters,
    right_up_to,
    window_of,
)

_ATTENTION = {"scaled_dot_product_attention", "multi_head_attention_forward", "flex_attention"}
_MOMENTS = {"mean", "var", "std", "var_mean", "std_mean", "sum", "norm", "nanmean", "cumsum"}
_MOMENTS |= {"instance_norm", "group_norm", "batch_norm", "amax", "max", "logsumexp", "median"}
_MOMENTS |= {"normalize", "softmax", "log_softmax", "linalg_vector_norm", "topk", "amin", "min"}
_ORDER = {"flip", "fliplr", "sort", "argsort", "msort"}
_PLACES = {"arange", "embedding", "cos", "sin", "outer", "narrow", "linspace", "cumsum"}
_EDGES = {"roll", "unfold", "pad", "conv1d", "conv2d", "conv3d", "shift", "diff"}
_GOES_ON = {"lstm", "gru", "rnn_tanh", "rnn_relu", "cumsum", "cumprod", "logcumsumexp"}

Guess = Callable[[Evidence], str | None]


def cause(
    comparison: Comparison, difference: Difference, name: str, module: nn.Module | None
) -> str:
    """A sentence.

    Args:
        name, module: Whose code is at fault.
    """
    evidence = evidence_of(comparison, difference, name, module)
    for guess in _OF_GRADIENTS if difference.kind == "gradient" else _OF_OUTPUTS:
        found = guess(evidence)
        if found is not None:
            return found
    return _unknown(evidence)


# Of outputs --------------------------------------------------------------------------------------


def _added(e: Evidence) -> str | None:
    if e.difference.joined is not None or e.difference.key is None:
        return None
    held = [tuple(part.shape) for part in e.difference.parts if part is not None]
    return (
        f"the ranks hold {held} where one device has {tuple(e.difference.whole.shape)}: each rank "
        "adds a token of its own, such as a CLS token; add it before the sequence is cut, or on "
        "the rank of its position alone"
    )


def _of_labels(e: Evidence) -> str | None:
    """The loss is another, and the labels are."""
    if e.difference.whole.dim():
        return None
    wholes = [c.target for c in e.comparison.whole.called if c.target is not None]
    ranks = [[c.target for c in r.called if c.target is not None] for r in e.comparison.ranks]
    for n, whole in enumerate(wholes):
        parts = [targets[n] for targets in ranks if len(targets) > n]
        if len(parts) < len(ranks) or whole.is_floating_point():
            continue
        joined = e.comparison.joined(whole, parts)
        if joined is None or any(bool((v != whole).any()) for v in joined.values):
            return (
                f"{sum(len(p.flatten()) for p in parts)} labels on the ranks where one device has "
                f"{len(whole.flatten())}, or others: labels shifted at a seam, after the sequence "
                "was cut; shift them before (usp.cut_batch)"
            )
    return None


def _of_loss(e: Evidence) -> str | None:
    if e.difference.whole.dim():
        return None
    values = [float(part) for part in e.difference.parts if part is not None]
    whole = float(e.difference.whole)
    size = e.comparison.places.size
    if whole and max(values) - min(values) <= 1e-6 * abs(whole):
        factor = values[0] / whole
        for number, said in ((1 / size**2, "divided"), (size, "multiplied")):
            if abs(factor / number - 1) < 1e-6:
                return f"a loss scaled twice: {said} by the {size} ranks of the mesh once too often"
    return (
        "a mean over local tokens: the mean of the ranks' means weighs tokens unequally; divide by "
        "the count of all ranks (usp.cross_entropy, usp.mean)"
    )


def _of_integers(e: Evidence) -> str | None:
    whole = e.difference.whole
    if whole.is_floating_point() or not e.is_cut:
        return None
    joined = e.difference.joined
    assert joined is not None and joined.dim is not None
    starts = [
        bool((part == whole.narrow(joined.dim, 0, part.shape[joined.dim])).all())
        for part in e.difference.parts
        if part is not None
    ]
    if all(starts):
        return _POSITIONS
    return (
        "integers of another rank's tokens: ids, labels or positions were shifted at a seam, after "
        "the sequence was cut; make them before (usp.cut_batch, usp.positions)"
    )


_POSITIONS = (
    "positions that start at 0 on every rank: take usp.positions(seq_len, mesh, layout), or add "
    "them before the sequence is cut"
)


def _of_attention(e: Evidence) -> str | None:
    if not e.functions & _ATTENTION and not is_named(e.module, "attention|attn"):
        return None
    sinks = [n for n, _ in own_parameters(e.module) if "sink" in n]
    if sinks and all(is_unused(e, name) for name in sinks):
        return (
            f"dropped sinks: {', '.join(sinks)} has no gradient on the ranks; pass it as sinks= of "
            "long_context_attention"
        )
    early = right_up_to(e)
    width = window_of(e.module)
    if width is not None and early is not None and 1 < early <= width + 1:
        return (
            f"an ignored window: queries below position {early} are right and later ones are not, "
            f"where the module says {width}; pass window_size= to long_context_attention"
        )
    if e.on_ranks & _ATTENTION:
        return (
            "attention among this rank's own tokens: it is not that of the whole sequence; let "
            "usp answer it (usp.parallelize, usp.spread_attention, usp.long_context_attention)"
        )
    if e.functions & _PLACES and by_local_index(e):
        return _POSITIONS
    return (
        "attention with other options or masks than on one device: causal, windows, sinks, "
        "documents and scales must be said to usp.long_context_attention, and masks by global "
        "positions"
    )


def _of_extent(e: Evidence) -> str | None:
    """Torch's own modules that look at several tokens."""
    why = None if e.module is None else reason(e.module)
    if why is None:
        return None
    if "statistics" in why:
        return f"statistics over local tokens: {why}"
    if "reaches over" in why:
        return f"{why}: roll what is missing in from the neighbours (usp.roll)"
    if "joins tokens" in why:
        return f"a mean over local tokens: {why}; usp.mean has that of all"
    return f"{why}, and starts anew on every rank"


def _of_place(e: Evidence) -> str | None:
    if e.functions & _PLACES | e.functions & {"__getitem__"} and e.is_cut and by_local_index(e):
        return _POSITIONS
    return None


def _of_one_token(e: Evidence) -> str | None:
    """Every rank reads a token, and one has the right one."""
    if e.is_cut or e.difference.joined is None or e.functions & _MOMENTS:
        return None
    if len(e.right_ranks()) >= 1 and e.functions & {"__getitem__", "select", "narrow", "unbind"}:
        return (
            "a token that one rank holds, such as a CLS token, is read on every rank by its local "
            "index: usp.take(x, mesh, [0]) has it on all"
        )
    return None


def _by_pattern(e: Evidence) -> str | None:
    return _POSITIONS if by_local_index(e) else None


_OVER_EDGES = (
    "tokens at the edges of shards are wrong: its kernel or shift reaches over the edge of a "
    "shard; usp.roll brings the neighbours' tokens"
)


def _of_shifts(e: Evidence) -> str | None:
    return _OVER_EDGES if e.is_cut and e.functions & _EDGES else None


def _of_edges(e: Evidence) -> str | None:
    return _OVER_EDGES if e.is_cut and all_near_seams(e) else None


def _of_recurrence(e: Evidence) -> str | None:
    if e.is_cut and e.functions & _GOES_ON:
        return "it goes from token to token, and starts anew on every rank"
    return None


def _of_order(e: Evidence) -> str | None:
    if e.is_cut and e.functions & _ORDER:
        return (
            "tokens in another order: it turns round or sorts those that a rank holds; do so "
            "before the sequence is cut, or behind usp.unshard_sequence"
        )
    return None


def _of_moments(e: Evidence) -> str | None:
    if not e.functions & _MOMENTS:
        return None
    if e.is_cut:
        return (
            "statistics over local tokens: means and variances are of the tokens that a rank "
            "holds; usp.mean and usp.var_mean have those of all"
        )
    return "a mean over local tokens: usp.mean has that of all ranks' tokens"


_OF_OUTPUTS: Sequence[Guess] = (
    _added,
    _of_labels,
    _of_loss,
    _of_integers,
    _of_extent,
    _of_attention,
    _of_recurrence,
    _of_one_token,
    _of_shifts,
    _of_place,
    _of_edges,
    _of_order,
    _of_moments,
    _by_pattern,
)


# Of gradients ------------------------------------------------------------------------------------


def _scaled(e: Evidence) -> str | None:
    """The same factor in every parameter's gradient."""
    size, factor = e.comparison.places.size, e.comparison.common_factor()
    if factor is None:
        return None
    if abs(factor * size - 1) < 1e-6:
        return (
            f"a loss scaled twice: every gradient, summed over the ranks, is 1/{size} of the whole "
            "one's; it is divided by mesh.size and the outputs send back a share already, or a "
            "wrapper (DDP, FSDP) averages where sequence ranks add: loss * mesh.size"
        )
    if abs(factor / size - 1) < 1e-6:
        return (
            f"a loss that all {size} ranks compute alike and nobody divides: every gradient, "
            f"summed over the ranks, is {size} times the whole one's; divide by mesh.size, once"
        )
    return f"a loss scaled otherwise: every gradient is {factor:.4g} times the whole one's"


def _of_sinks(e: Evidence) -> str | None:
    sinks = [n for n, _ in own_parameters(e.module) if "sink" in n]
    return "dropped sinks" if sinks and all(is_unused(e, name) for name in sinks) else None


def _one_way(e: Evidence) -> str:
    return (
        "its output is right and its backward is not: a collective that sends nothing back, or "
        "sends all of it back on every rank; take usp.unshard_sequence, usp.take, usp.roll or "
        "usp.mean, each of which has its adjoint"
    )


_OF_GRADIENTS: Sequence[Guess] = (_scaled, _of_sinks, _one_way)


def _unknown(e: Evidence) -> str:
    if e.difference.joined is None:
        shapes = [tuple(part.shape) for part in e.difference.parts if part is not None]
        return (
            f"the ranks have {shapes} where one device has {tuple(e.difference.whole.shape)}: "
            "neither the whole nor shares of it"
        )
    right = e.right_ranks()
    who = f"ranks {right} are right" if right else "no rank is right"
    return f"given the same, it makes something else of this rank's tokens than of all; {who}"
