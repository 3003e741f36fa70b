"""The batch of a language model, cut: each rank gets its tokens, and what it must know of all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from usp.distributed.mesh import SequenceMesh, check_mesh
from usp.nn.spread import Spread
from usp.planning.kinds import integer
from usp.planning.layout import DocumentZigzag, Layout
from usp.planning.masks.bounds import check_cu_seqlens
from usp.sharding.loss import mean_count

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_TOKENS = ("input_ids", "inputs_embeds", "ids")


def cut_batch(
    batch: Mapping[str, Any],
    mesh: SequenceMesh | None,
    layout: Layout = "contiguous",
    *,
    cu_seqlens: Sequence[int] | Tensor | None = None,
    ignore_index: int = -100,
    data_parallel_group: ProcessGroup | None = None,
) -> dict[str, Any]:
    """This rank's part of a batch of a language model that every rank holds whole.

    Made for ``usp.parallelize(model, mesh, outputs="local")``, which wants the ``spread`` in it.
    Names are those of transformers: ``model(**usp.cut_batch(batch, mesh))`` is right there, and
    its ``.loss`` this rank's part of the mean over the valid labels of all ranks.

    Args:
        batch: By name: ``input_ids`` (B, S), or ``ids``, or ``inputs_embeds`` (B, S, C);
            ``labels`` (B, S), the token that stands there, as in transformers; ``position_ids``
            (B, S) or (1, S), or of M-RoPE (3, B, S), or (4, B, S) with those in the documents
            first; ``attention_mask`` (B, S), nonzero where a token is no padding; and whatever
            else has tokens along dim 1. What is no tensor passes through.
        mesh: The ranks that share the sequence; None is one device.
        layout: Which token goes where.
        cu_seqlens: Boundaries ``(0, ..., S)`` of packed documents, the same in all samples; by
            default those of a ``DocumentZigzag``, or those at which ``position_ids`` jump where
            there is no ``attention_mask``.
        ignore_index: The label that is none.
        data_parallel_group: Ranks with other samples, over which gradients are averaged: then
            every valid label of all samples counts the same, which asks them.

    Returns:
        The same names, each (.., local tokens, ..), and

        - ``labels``: shifted before they were cut, so that each is the label of its token's
          output, ``ignore_index`` at the end of the sequence and of each document; the same
          tensor as ``shift_labels``, by which transformers knows that this is done;
        - ``num_items_in_batch``: how many labels of all ranks are valid, () on their device; the
          mean over ``data_parallel_group``. The same on every rank;
        - ``position_ids``: also where there were none: of each token in its document;
        - ``spread``: the ``usp.Spread`` of the whole.

    Raises:
        ValueError: a tensor has not the same tokens along dim 1 as the others, lengths or
            documents contradict each other, or samples have different documents; names both.
    """
    check_mesh(mesh)
    length = _length(batch)
    if cu_seqlens is None and isinstance(layout, DocumentZigzag):
        cu_seqlens = layout.cu_seqlens
    if cu_seqlens is None and batch.get("attention_mask") is None:
        cu_seqlens = _documents(batch.get("position_ids"))
    documents = None if cu_seqlens is None else check_cu_seqlens(cu_seqlens)
    spread = Spread(mesh, layout, length, documents)
    found = dict(batch)
    if found.get("position_ids") is None:
        tokens = next(batch[name] for name in _TOKENS if batch.get(name) is not None)
        found["position_ids"] = _positions(length, documents, tokens.device).expand(len(tokens), -1)
    more: dict[str, Any] = {}
    if found.get("labels") is not None:
        labels = _shifted(found["labels"], documents, ignore_index)
        more["num_items_in_batch"] = _count(labels, ignore_index, data_parallel_group)
        found["labels"] = labels
    cut = {
        n: spread.shard(x, _dim(n, x.dim())) if isinstance(x, Tensor) else x
        for n, x in found.items()
    }
    if more:
        more["shift_labels"] = cut["labels"]
    return cut | more | {"spread": spread}


def _length(batch: Mapping[str, Any]) -> int:
    """Tokens of the whole sequence, of which every tensor has one entry each along dim 1."""
    if not any(isinstance(batch.get(name), Tensor) for name in _TOKENS):
        raise ValueError(f"a batch needs one of {', '.join(_TOKENS)}, got {', '.join(batch)}")
    shapes = {name: tuple(x.shape) for name, x in batch.items() if isinstance(x, Tensor)}
    length = next(shapes[name] for name in _TOKENS if name in shapes)[1:2]
    for name, shape in shapes.items():
        dim = _dim(name, len(shape))
        if shape[dim : dim + 1] != length or not length:
            raise ValueError(
                f"{name} is {shape}, and the batch has {length[0] if length else 'no'} tokens "
                "along dim 1: cut_batch takes what has an entry for each, (B, S, ...); a mask by "
                "key and query is none, and boundaries of documents are its cu_seqlens"
            )
    return integer("tokens of the batch", length[0], least=0)


def _dim(name: str, dims: int) -> int:
    """Of tokens; several positions a token stand in front of the samples."""
    return 2 if name == "position_ids" and dims == 3 else 1


def _documents(positions: Tensor | None) -> tuple[int, ...] | None:
    """Boundaries where positions do not go on by one; None where they all do.

    Raises:
        ValueError: they are at other places in other samples.
    """
    if positions is not None and positions.dim() == 3 and len(positions) == 4:
        positions = positions[0]  # the others are of frame, row and column
    if positions is None or positions.dim() != 2:
        return None
    jumps = positions.diff(dim=1) != 1
    if not bool(jumps.any()):
        return None
    if not bool((jumps == jumps[:1]).all()):
        raise ValueError(
            f"position_ids jump {jumps.sum(1).tolist()} times in the samples, at different places: "
            "documents must be the same in all samples of a batch. Pack them into one sample, or "
            "say cu_seqlens=(0, S) where jumps are no documents"
        )
    return (0, *(jumps[0].nonzero()[:, 0] + 1).tolist(), positions.shape[1])


def _positions(length: int, documents: tuple[int, ...] | None, device: torch.device) -> Tensor:
    """(1, S): of each token in its document."""
    positions = torch.arange(length, device=device)
    if documents is not None:
        starts = torch.tensor(documents, device=device)
        positions = positions - starts[torch.searchsorted(starts, positions, right=True) - 1]
    return positions[None]


def _shifted(labels: Tensor, documents: tuple[int, ...] | None, ignore_index: int) -> Tensor:
    """Each token's next one: (B, S)."""
    shifted = labels.roll(-1, 1)
    ends = torch.tensor((documents or (0, labels.shape[1]))[1:], device=labels.device) - 1
    return shifted.index_fill(1, ends[ends >= 0], ignore_index)


def _count(labels: Tensor, ignore_index: int, group: ProcessGroup | None) -> Tensor:
    valid = (labels != ignore_index).sum()
    return valid if group is None else mean_count(valid.double(), group)
