"""What a graph can hold of a call: the arguments of the op, in one table."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from usp.attention.arguments import drops, needs_gradients, seed_of
from usp.attention.given import Options, Tensors
from usp.attention.op_masks import ReadMasks, mask_options, read_masks
from usp.distributed.agreement import When, check_when
from usp.distributed.mesh import SequenceMesh, mesh_of
from usp.planning.kinds import flag
from usp.planning.layout import Layout, both, from_told, replicated, told
from usp.planning.masks.options import check_window
from usp.planning.shares import named_lengths

# Those that may be symbols of a graph, so that other ones need no other graph.
Numbers = Sequence[int]


class Arguments(NamedTuple):
    """What the op takes: the six tensors in their order, those whose values are read when the graph
    runs, then what a graph can hold of the rest.

    The op's schema is made of this table.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    key_padding_mask: Tensor | None
    attn_bias: Tensor | None
    alibi_slopes: Tensor | None
    dropout_seed: Tensor | None
    cu_seqlens: Tensor | None
    cu_counts: Tensor | None
    key_lengths: Tensor | None
    query_offset: Tensor | None
    mask_tensors: Tensor | None
    seed_is_drawn: bool
    causal: bool
    window_left: int | None
    window_right: int | None
    prefix_len: int | None
    masks: str | None
    mask_numbers: Numbers
    softmax_scale: float | None
    layout: str
    layout_numbers: Sequence[int] | None
    key_layout: str
    key_layout_numbers: Sequence[int] | None
    query_len: int | None
    key_len: int | None
    dropout_p: float
    softcap: float | None
    transport: str
    return_lse: bool
    backend: str
    heads: Sequence[int] | None
    mesh: str | None
    validate: bool | None
    is_first: bool
    gradients: Sequence[bool]

    @property
    def tensors(self) -> Tensors:
        return Tensors(*cast(Any, self[: len(Tensors._fields)]))

    @property
    def held(self) -> tuple[Tensor | None, ...]:
        """All that are tensors."""
        return cast("tuple[Tensor | None, ...]", self[:TENSORS])

    @property
    def layouts(self) -> tuple[Layout, Layout]:
        """Of queries and of keys."""
        of = (self.layout, self.layout_numbers), (self.key_layout, self.key_layout_numbers)
        queries, keys = (from_told(name, numbers) for name, numbers in of)
        return queries, keys

    @property
    def options(self) -> Options:
        """The options of the call; what is read when the graph runs is read here."""
        lengths = None
        if self.query_len is not None and self.key_len is not None:
            lengths = self.query_len, self.key_len
        return Options(
            causal=self.causal,
            window_size=(self.window_left, self.window_right),
            prefix_len=self.prefix_len,
            softmax_scale=self.softmax_scale,
            layout=self.layouts,
            seq_len=lengths,
            dropout_p=self.dropout_p,
            softcap=self.softcap,
            transport=self.transport,
            return_lse=self.return_lse,
            backend=self.backend,
            heads=None if self.heads is None else cast("tuple[int, int]", tuple(self.heads)),
            **mask_options(ReadMasks(*cast(Any, self[_READ])), self.masks, self.mask_numbers),
        )

    @property
    def compares(self) -> bool | None:
        """Whether ranks compare now; calls of one kind are told apart by what all ranks share."""
        mesh = self.on
        if not self.is_first or mesh is None:
            return self.validate
        given = self._replace(query_len=None, key_len=None, gradients=())
        kind = repr(given[TENSORS:])
        first = kind not in mesh.compared
        mesh.compared.add(kind)
        return True if first else None

    @property
    def on(self) -> SequenceMesh | None:
        """The mesh itself."""
        return None if self.mesh is None else mesh_of(self.mesh)

    @property
    def heads_change_hands(self) -> bool:
        """Whether the ranks of a row exchange heads."""
        mesh = self.on
        return mesh is not None and mesh.ulysses_degree > 1 and not replicated(self.layouts)

    @property
    def number(self) -> int | None:
        """The seed as a number; the tensor's has a sign."""
        return None if self.dropout_seed is None else int(self.dropout_seed) % 2**64


_TYPES = {
    "Tensor": "Tensor",
    "Tensor | None": "Tensor?",
    "bool": "bool",
    "bool | None": "bool?",
    "int | None": "SymInt?",
    "Sequence[int] | None": "int[]?",
    "Numbers": "SymInt[]",
    "float": "float",
    "float | None": "float?",
    "str": "str",
    "str | None": "str?",
    "Sequence[bool]": "bool[]",
}
_READ = slice(len(Tensors._fields) + 1, len(Tensors._fields) + 1 + len(ReadMasks._fields))
TENSORS = _READ.stop
SCHEMA = ", ".join(
    f"{_TYPES[str(getattr(kind, '__forward_arg__', kind))]} {name}"
    for name, kind in inspect.get_annotations(Arguments).items()
)


def arguments(
    tensors: Tensors,
    options: Options,
    mesh: SequenceMesh | None,
    dropout_seed: int | Tensor | None,
    validate: When,
) -> Arguments:
    """What the op takes of a call of ``long_context_attention``.

    Args:
        tensors, options, mesh, dropout_seed: As there.
        validate: As there, or "first": at the first of such calls on the mesh.
    """
    check_when(None if validate == "first" else validate)
    read, masks, mask_numbers = read_masks(options)
    window, layouts = check_window(options.window_size), both(options.layout)
    (layout, numbers), (key_layout, key_numbers) = map(told, layouts)
    query_len, key_len = named_lengths(options.seq_len, options.layout) or (None, None)
    return Arguments(
        *tensors,
        dropout_seed=_seed(options, dropout_seed),
        **read._asdict(),
        seed_is_drawn=dropout_seed is None,
        causal=flag("causal", options.causal),
        window_left=window.left,
        window_right=window.right,
        prefix_len=options.prefix_len,
        masks=masks,
        mask_numbers=mask_numbers,
        softmax_scale=cast("float | None", options.softmax_scale),  # a tensor is part of q by now
        layout=layout,
        layout_numbers=numbers,
        key_layout=key_layout,
        key_layout_numbers=key_numbers,
        query_len=query_len,
        key_len=key_len,
        dropout_p=options.dropout_p,
        softcap=options.softcap,
        transport=options.transport,
        return_lse=flag("return_lse", options.return_lse),
        backend=options.backend,
        heads=options.heads,
        mesh=None if mesh is None else mesh.name,
        validate=validate if isinstance(validate, bool) else None,
        is_first=validate == "first",
        gradients=needs_gradients(tensors),
    )


def _seed(options: Options, dropout_seed: int | Tensor | None) -> Tensor | None:
    if not drops(options.dropout_p):
        return None
    if isinstance(dropout_seed, Tensor):
        return dropout_seed
    if dropout_seed is not None:
        return torch.tensor(seed_of(dropout_seed), device="cpu")
    return torch.randint(2**62, (), device="cpu")
