"""Where the tokens of a model are spread: data, one line for a family of models."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from torch import nn

from usp.integrations._choice import Only
from usp.planning.kinds import integer

T = TypeVar("T")


@dataclass(frozen=True)
class Entries:
    """For which tokens an argument of a module has entries.

    Args:
        dim: Their dim.
        of: The argument that holds these tokens, where two streams are joined; None is both.
        dims: How many dims what has an entry for each token has; others have none.
        one: Whether there may be a single entry for all.
    """

    dim: int
    of: str | None = None
    dims: int | None = None
    one: bool = False


@dataclass(frozen=True)
class Joint:
    """A second stream of tokens, a text say, which attention joins to the first.

    Both are one sequence, that of their attention, and are cut as one, so that ranks hold equally
    many tokens and each token is on one rank. A rank may then hold none of a stream.

    Args:
        argument: Its name among the arguments of the trunk's modules. Where it is None in the
            middle of a trunk, the first argument holds both, joined.
        behind: Whether it stands behind the first in attention.
        returned: Its place in the pair that modules return; the first stream may also come alone.
        alone: Which attention modules see the first stream alone.
        each: Cut each stream by itself, so that a rank holds some of both, for modules that could
            not do with none. Masks then hold this rank's keys alone.
    """

    argument: str
    behind: bool = False
    returned: int = 0
    alone: Only = ()
    each: bool = False

    def ordered(self, first: T, second: T) -> tuple[T, T]:
        """What is of the two streams in the order of attention, or the other way round."""
        return (first, second) if self.behind else (second, first)

    def place(self, argument: str) -> int:
        """Of a stream in the order of attention."""
        return int((argument == self.argument) == self.behind)


@dataclass(frozen=True)
class Boundary:
    """A trunk: modules that follow each other and treat tokens one by one, but for attention.

    Tokens are cut before the first and joined behind the last. What goes by a token's place in the
    whole (tables of positions) comes before, what looks at several (pooling, a class token's head)
    behind.

    Args:
        trunk: Name of the ``nn.ModuleList`` or ``nn.Sequential`` of them, as in ``named_modules``;
            or of one module.
        attention: Which modules in it are attention, each of whose calls must be answered; see
            ``only`` of ``replace_attention``. None: each module of the trunk holds some.
        local: Which modules in it mean what this rank holds, on purpose: nothing that they call is
            answered or refused.
        dim: The dim of tokens in what the first takes; None is 1, and 0 in torch's own layers
            without ``batch_first``.
        beside: Arguments of these modules that have an entry for each token, by name, with that
            dim, or ``Entries``: ``{"rope": -2}``. Each module's own are cut as they come; tuples of
            tensors, too, whose ``Entries`` may be a tuple.
        after_prefix: Which of ``beside`` may have entries for the last tokens alone, as tables of
            patches have none for class tokens and registers in front of them; what they are given
            to must see by their length how many that leaves out, or by ``prefix_count``.
        prefix_count: The attribute of attention modules that says how many: while one runs, it is
            how many of these this rank holds.
        documents: The argument of these modules that holds boundaries ``(0, ..., tokens)`` of
            documents, as flash-attn takes them (``cu_seqlens``): on several ranks attention keeps
            these apart, and the modules are told of one, this rank's tokens.
        then: Names of further lists whose modules follow those of ``trunk``.
        whole: Attention modules that look at tokens which every rank holds whole, a text say: by
            name or pattern, with the argument that holds these.
        joint: A second stream of tokens that attention joins to the first.
        never: Arguments of these modules that must be None on several ranks: what they keep (a
            cache) would be of this rank's tokens alone.
        reads: Modules outside of the trunk that are given what a module of it returns, and look at
            several tokens: they get those of all ranks. By name or pattern.
        attributes: Of an attention module, attributes that it has on several ranks while it runs
            (a flag by which it calls torch's function), by name; raises NotImplementedError for one
            that would not compute the same with them.
        check: Called with the module that holds the trunk, for several ranks: raises
            NotImplementedError where what it does between the modules would be wrong.
        states: Whether the module that holds the trunk returns what is between its modules (hidden
            states): they are joined then, all of them on every rank.
        mlp: Which modules in it are MLPs, that treat each token by itself: ``tiles=`` is for them.

    Example:
        >>> usp.Boundary("blocks", "*.attn", beside={"rope": -2})
    """

    trunk: str
    attention: Only | None = None
    local: Only = ()
    dim: int | None = None
    beside: Mapping[str, int | Entries | tuple[Entries, ...]] = field(default_factory=dict)
    after_prefix: Sequence[str] = ()
    prefix_count: str | None = None
    documents: str | None = None
    never: Sequence[str] = ()
    then: Sequence[str] = ()
    whole: Mapping[str, str] = field(default_factory=dict)
    joint: Joint | None = None
    reads: Only = ()
    attributes: Callable[[nn.Module], Mapping[str, Any]] | None = None
    check: Callable[[nn.Module], None] | None = None
    states: bool = False
    mlp: Only = ()

    def __post_init__(self) -> None:
        if self.joint is not None and (self.after_prefix or self.prefix_count or self.documents):
            raise ValueError(
                f"two streams (joint={self.joint.argument!r}) beside a prefix or documents: say of "
                "which stream entries are, beside={name: Entries(dim, argument)}"
            )

    def under(self, prefix: str) -> Boundary:
        """The same in a model that holds the one that it is of; with a dot at the end, or ""."""
        lists = tuple(f"{prefix}{name}" for name in self.then)
        return replace(self, trunk=f"{prefix}{self.trunk}", then=lists)

    def blocks(self, model: nn.Module) -> dict[str, nn.Module]:
        """The modules that follow each other, by name.

        Raises:
            ValueError: there is no such module, or it holds none.
        """
        modules = dict(model.named_modules(remove_duplicate=False))
        found: dict[str, nn.Module] = {}
        for name in (self.trunk, *self.then):
            found |= _blocks_of(model, modules, name)
        if not found:
            raise ValueError(f"{self.trunk} of {type(model).__name__} holds no modules")
        return found

    def token_dim(self, block: nn.Module) -> int:
        """The dim of tokens of what a block takes."""
        if self.dim is not None:
            return integer("dim", self.dim)
        attention = getattr(block, "self_attn", None)
        sequence_first = isinstance(attention, nn.MultiheadAttention) and not attention.batch_first
        return 0 if sequence_first else 1


def _blocks_of(
    model: nn.Module, modules: Mapping[str, nn.Module], trunk: str
) -> dict[str, nn.Module]:
    if trunk not in modules:
        holders = [n for n, m in modules.items() if isinstance(m, nn.ModuleList | nn.Sequential)]
        raise ValueError(
            f"{type(model).__name__} has no module {trunk!r}; of modules that follow each other it "
            f"has {', '.join(holders) or 'none'}"
        )
    whole = modules[trunk]
    if not isinstance(whole, nn.ModuleList | nn.Sequential):
        return {trunk: whole}
    prefix = f"{trunk}." if trunk else ""
    return {f"{prefix}{name}": block for name, block in whole.named_children()}
