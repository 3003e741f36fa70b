"""What modules of a trunk are given beside their tokens, with an entry for each of these."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from usp.integrations._answer import Tokens, refuse
from usp.integrations._boundary import Boundary, Entries
from usp.integrations._streams import cut_both, cut_stream


def cut_beside(tokens: Tokens, boundary: Boundary, name: str, whole: Any) -> Any:
    """An argument as this rank's tokens need it: their entries, where it has one for each.

    Raises:
        ValueError: it has not; names both numbers.
    """
    if name == boundary.documents and _are_of_several(whole, tokens):
        if torch.compiler.is_compiling():  # numbers that a graph knows
            return torch.tensor((0, tokens.held), dtype=whole.dtype, device="cpu").to(whole.device)
        # one document, this rank's tokens; what is computed again finds the others behind it
        return torch.cat([whole.new_tensor([0, tokens.held]), whole])[:2]
    if name not in boundary.beside:
        return whole
    asked = boundary.beside[name]
    if isinstance(asked, tuple):
        if not isinstance(whole, tuple | list) or len(whole) != len(asked):
            return _cut(tokens, boundary, name, asked[0], whole)
        pairs = zip(asked, whole, strict=True)
        return type(whole)(_cut(tokens, boundary, name, each, item) for each, item in pairs)
    return _cut(tokens, boundary, name, Entries(asked) if isinstance(asked, int) else asked, whole)


def _cut(tokens: Tokens, boundary: Boundary, name: str, asked: Entries, whole: Any) -> Any:
    if isinstance(whole, tuple | list):
        return type(whole)(_cut(tokens, boundary, name, asked, item) for item in whole)
    if whole is None:
        return whole
    if asked.dims is not None and not (isinstance(whole, Tensor) and whole.dim() == asked.dims):
        return whole
    dim, length, joint = asked.dim, tokens.spread.seq_len, boundary.joint
    entries = whole.shape[dim]
    if asked.one and entries == 1:
        return whole
    if asked.of is not None and joint is not None and tokens.parts is not None:
        place = joint.place(asked.of)
        if entries == (length := tokens.parts[place]):
            return cut_stream(tokens, whole, dim, place)
    elif tokens.cut and entries == tokens.held:
        return whole
    elif entries == length and not tokens.cut:
        return cut_both(tokens, whole, dim)
    elif entries < length and not tokens.cut and name in boundary.after_prefix:
        return _of_the_others(tokens, whole, dim)
    refusal = f"{name} is {tuple(whole.shape)} with {entries} entries along dim {dim}"
    refuse(
        tokens.spread,
        ValueError(f"{refusal} for {length} tokens: beside= says that it has one for each"),
    )


def with_documents(tokens: Tokens, boundaries: Tensor | None) -> Tokens:
    """The same tokens, of documents that attention keeps apart.

    Raises:
        ValueError: they are not of all tokens.
        NotImplementedError: whoever cut the batch has said which documents there are.
    """
    if not _are_of_several(boundaries, tokens):
        return tokens
    spread = tokens.spread
    if tokens.cut:
        refuse(
            spread,
            NotImplementedError(
                f"boundaries of {tuple(boundaries.shape)} from the model, whose tokens were cut "
                "before it: say which documents there are to usp.cut_batch(cu_seqlens=)"
            ),
        )
    if torch.compiler.is_compiling():
        return replace(tokens, documents=boundaries.cpu())
    ends = tuple(boundaries.tolist())
    if ends[-1:] != (spread.seq_len,):
        refuse(
            spread,
            ValueError(
                f"documents end at {ends[-1:]}, where {spread.seq_len} tokens are spread: "
                "documents= says that they are of all"
            ),
        )
    return replace(tokens, spread=replace(spread, cu_seqlens=ends))


@contextmanager
def attributes_while(
    module: nn.Module, boundary: Boundary, tokens: Tokens, is_attention: bool
) -> Iterator[None]:
    """While it runs, a module counts the tokens of the prefix that are here, and attention has the
    attributes that its family says."""
    found: dict[str, Any] = {}
    if len(tokens.shares) > 1:
        name = boundary.prefix_count
        if name is not None and (whole := getattr(module, name, None)) is not None:
            found[name] = tokens.count_first(whole)
        if is_attention and boundary.attributes is not None:
            found |= boundary.attributes(module)
    before = {name: getattr(module, name) for name in found}
    for name, value in found.items():
        setattr(module, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(module, name, value)


def documents_again(tokens: Tokens, local: Tensor | None) -> Tokens:
    """The same tokens, of the documents behind what ``cut_beside`` has made of their boundaries.

    Raises:
        NotImplementedError: it has been copied, and they were left behind.
    """
    if not _are_of_several(local, tokens):
        return tokens
    held = local.untyped_storage().nbytes() // local.element_size()
    if local.storage_offset() or held < 4:
        raise NotImplementedError(
            f"boundaries of {tuple(local.shape)} were moved before the backward, and those "
            "of the other ranks' documents stayed behind: leave what modules are given in place"
        )
    return with_documents(tokens, local.as_strided((held - 2,), (1,), 2))


def _are_of_several(boundaries: Tensor | None, tokens: Tokens) -> TypeGuard[Tensor]:
    """Whether documents are of more than one rank: else the module parts them itself."""
    return boundaries is not None and len(tokens.shares) > 1


def _of_the_others(tokens: Tokens, whole: Tensor, dim: int) -> Tensor:
    """Entries for this rank's tokens but for those of the prefix, which stand first on each rank,
    for all hold theirs in their order."""
    dim %= whole.dim()
    prefix = tokens.spread.seq_len - whole.shape[dim]
    behind = 2 * (whole.dim() - dim - 1)
    held = tokens.spread.shard(pad(whole, (*[0] * behind, prefix, 0)), dim)
    first = tokens.count_first(prefix)
    return held.narrow(dim, first, tokens.held - first)
