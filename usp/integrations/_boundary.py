"""Where the tokens of a model are spread: data, one line for a family of models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import nn

from usp.integrations._choice import Only
from usp.planning.kinds import integer


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
            dim: ``{"rope": -2}``. Each module's own are cut as they come; tuples of tensors, too.
        after_prefix: Which of ``beside`` may have entries for the last tokens alone, as tables of
            patches have none for class tokens and registers in front of them; what they are given
            to must see by their length how many that leaves out, or by ``prefix_count``.
        prefix_count: The attribute of attention modules that says how many: while one runs, it is
            how many of these this rank holds.
        documents: The argument of these modules that holds boundaries ``(0, ..., tokens)`` of
            documents, as flash-attn takes them (``cu_seqlens``): on several ranks attention keeps
            these apart, and the modules are told of one, this rank's tokens.
        never: Arguments of these modules that must be None on several ranks: what they keep (a
            cache) would be of this rank's tokens alone.

    Example:
        >>> usp.Boundary("blocks", "*.attn", beside={"rope": -2})
    """

    trunk: str
    attention: Only | None = None
    local: Only = ()
    dim: int | None = None
    beside: Mapping[str, int] = field(default_factory=dict)
    after_prefix: Sequence[str] = ()
    prefix_count: str | None = None
    documents: str | None = None
    never: Sequence[str] = ()

    def blocks(self, model: nn.Module) -> dict[str, nn.Module]:
        """The modules that follow each other, by name.

        Raises:
            ValueError: there is no such module, or it holds none.
        """
        modules = dict(model.named_modules(remove_duplicate=False))
        if self.trunk not in modules:
            holders = [
                n for n, m in modules.items() if isinstance(m, nn.ModuleList | nn.Sequential)
            ]
            raise ValueError(
                f"{type(model).__name__} has no module {self.trunk!r}; of modules that follow each "
                f"other it has {', '.join(holders) or 'none'}"
            )
        whole = modules[self.trunk]
        if not isinstance(whole, nn.ModuleList | nn.Sequential):
            return {self.trunk: whole}
        if not len(whole):
            raise ValueError(f"{self.trunk} of {type(model).__name__} holds no modules")
        prefix = f"{self.trunk}." if self.trunk else ""
        return {f"{prefix}{name}": block for name, block in whole.named_children()}

    def token_dim(self, block: nn.Module) -> int:
        """The dim of tokens of what a block takes."""
        if self.dim is not None:
            return integer("dim", self.dim)
        attention = getattr(block, "self_attn", None)
        sequence_first = isinstance(attention, nn.MultiheadAttention) and not attention.batch_first
        return 0 if sequence_first else 1
