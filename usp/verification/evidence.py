"""What is known of a difference, and of the code that is at fault."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from usp.verification.compare import Comparison, Difference
from usp.verification.join import wrong_entries


@dataclass(frozen=True)
class Evidence:
    """A difference, seen from the code that is at fault.

    Attributes:
        comparison, difference: Of the runs.
        name, module: Whose code it is; None where it is nobody's.
        functions: Of torch, that this code called on one device since a module was entered or
            left.
        on_ranks: The same on the first rank.
        wrong: See ``wrong_entries``.
    """

    comparison: Comparison
    difference: Difference
    name: str
    module: nn.Module | None
    functions: frozenset[str]
    on_ranks: frozenset[str]
    wrong: tuple[Tensor, ...]

    @property
    def is_cut(self) -> bool:
        joined = self.difference.joined
        return joined is not None and joined.dim is not None

    @property
    def owners(self) -> Tensor:
        joined = self.difference.joined
        assert joined is not None and joined.owners is not None
        return joined.owners

    def right_ranks(self) -> list[int]:
        """Ranks all of whose entries are right."""
        size = self.comparison.places.size
        if not self.is_cut:
            return [r for r, off in enumerate(self.wrong) if not bool(off.any())]
        return [r for r in range(size) if not bool(self.wrong[0][self.owners == r].any())]


def evidence_of(
    comparison: Comparison, difference: Difference, name: str, module: nn.Module | None
) -> Evidence:
    """Args:
    name, module: Whose code is at fault.
    """
    functions: frozenset[str] = frozenset()
    on_ranks: frozenset[str] = frozenset()
    if difference.key is not None:
        functions = frozenset(c.name for c in comparison.whole.segment(difference.key))
        first = comparison.ranks[0]
        if difference.key[:3] in first.events:
            on_ranks = frozenset(c.name for c in first.segment(difference.key))
    else:
        last = max(comparison.whole.events.values(), default=-1)
        functions = frozenset(c.name for c in comparison.whole.called if c.event > last)
    wrong: tuple[Tensor, ...] = ()
    if difference.joined is not None and difference.kind == "output":
        wrong = tuple(wrong_entries(difference.whole, difference.joined, comparison.tolerance))
    return Evidence(comparison, difference, name, module, functions, on_ranks, wrong)


def is_named(module: nn.Module | None, pattern: str) -> bool:
    return module is not None and bool(re.search(pattern, type(module).__name__, re.IGNORECASE))


def own_parameters(module: nn.Module | None) -> list[tuple[str, nn.Parameter]]:
    return [] if module is None else list(module.named_parameters(recurse=False))


def is_unused(e: Evidence, name: str) -> bool:
    """Whether no rank has a gradient of it, and the whole has."""
    full = f"{e.name}.{name}" if e.name else name
    if e.comparison.whole.parameters.get(full) is None:
        return False
    found = [rank.parameters.get(full) for rank in e.comparison.ranks]
    return all(g is None or not bool(g.any()) for g in found)


def window_of(module: nn.Module | None) -> int | None:
    """A number that a module calls its window."""
    for name, value in vars(module).items() if module is not None else ():
        if "window" in name.lower():
            numbers = value if isinstance(value, tuple | list) else (value,)
            found = [n for n in numbers if isinstance(n, int) and not isinstance(n, bool)]
            if found:
                return max(found)
    return None


def right_up_to(e: Evidence) -> int | None:
    """The first entry that is wrong, of those that are cut."""
    if not e.is_cut or not bool(e.wrong[0].any()):
        return None
    return int(e.wrong[0].nonzero()[0, 0])


def by_local_index(e: Evidence) -> bool:
    """Whether just those entries are right whose index on their rank is their index in all."""
    if not e.is_cut:
        return False
    same = torch.zeros_like(e.wrong[0])
    for rank in range(e.comparison.places.size):
        at = (e.owners == rank).nonzero()[:, 0]
        same[at] = at == torch.arange(len(at))
    return bool((e.wrong[0] != same).all())


def all_near_seams(e: Evidence) -> bool:
    """Whether some entries are wrong and all of these are beside another rank's."""
    off = e.wrong[0]
    seam = e.owners.diff() != 0
    near = torch.zeros_like(off)
    near[1:] |= seam
    near[:-1] |= seam
    return bool(off.any()) and bool((~off | near).all()) and not bool(near.all())
