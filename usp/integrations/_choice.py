"""Which modules of a model somebody means."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase

from torch import nn

Choice = str | type[nn.Module] | Callable[[str, nn.Module], bool]
Only = Choice | Sequence[Choice]


def choices(only: Only) -> tuple[Choice, ...]:
    """One choice, or several, as a tuple.

    Raises:
        TypeError: one is neither a name nor a class nor a function.
    """
    several = tuple(only) if isinstance(only, Sequence) and not isinstance(only, str) else (only,)
    for choice in several:
        if not isinstance(choice, str) and not callable(choice):
            raise TypeError(
                "only= takes names or patterns of names, classes, a function of (name, module), or "
                f"a list of these, got {choice!r}"
            )
    return several


def means(choice: Choice, name: str, modules: Mapping[str, nn.Module]) -> bool:
    """Whether a choice means the module of that name; names and classes mean what they hold too.

    Args:
        modules: All of the model, by name.
    """
    if not isinstance(choice, str | type):
        return bool(choice(name, modules[name]))
    parts = name.split(".") if name else []
    holders = [".".join(parts[:n]) for n in range(len(parts) + 1)]
    if isinstance(choice, str):
        return any(holder == choice or fnmatchcase(holder, choice) for holder in holders)
    return any(isinstance(modules.get(holder), choice) for holder in holders)


def any_means(only: Only, name: str, modules: Mapping[str, nn.Module]) -> bool:
    """Whether one of the choices means the module of that name."""
    return any(means(choice, name, modules) for choice in choices(only))


def outermost(names: Iterable[str]) -> list[str]:
    """Names of modules, without what others of them hold."""
    meant = dict.fromkeys(names)
    return [n for n in meant if not any(_holds(other, n) for other in meant)]


def _holds(holder: str, name: str) -> bool:
    return holder != name and (not holder or name.startswith(f"{holder}."))


def shortened(names: Iterable[str], most: int = 5) -> str:
    """A list for a message, with a count of what it leaves out."""
    listed = [name or "itself" for name in names]
    more = f" and {len(listed) - most} more" if len(listed) > most else ""
    return ", ".join(listed[:most]) + more
