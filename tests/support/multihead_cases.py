"""One call of an attention module as plain data: whole, by torch or by us, or cut over a mesh."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import pool
import torch
from hypothesis import strategies as st
from torch import Tensor, nn

import usp
from usp.planning.shares import local_positions

F64 = torch.float64
Results = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """How a module is built, and with what it is called. Everything random comes from ``seed``."""

    seed: int = 0
    batch: int = 2
    query_len: int = 7
    key_len: int = 7
    num_heads: int = 3
    head_dim: int = 4
    kdim: int | None = None
    vdim: int | None = None
    bias: bool = True
    add_bias_kv: bool = False
    add_zero_attn: bool = False
    batch_first: bool = False
    batched: bool = True
    inputs: str = "self"  # self: one tensor; memory: key is value; cross: three tensors
    padding: str | None = None  # bool | float
    mask: str | None = None  # bool | float | causal
    mask_dims: int = 2
    hint: bool = False  # is_causal, for us only
    causal: bool = False  # the options of ours
    window: tuple[int | None, int | None] = (None, None)
    dropout: float = 0.0
    need_weights: bool = True
    average: bool = True
    training: bool = True

    def arguments(self) -> dict[str, Any]:
        names = ("num_heads", "bias", "add_bias_kv", "add_zero_attn", "kdim", "vdim", "batch_first")
        given = {name: getattr(self, name) for name in (*names, "dropout")}
        return given | {"embed_dim": self.num_heads * self.head_dim, "dtype": F64}


@dataclass(frozen=True)
class Place:
    """A mesh, and what lies where on it."""

    ulysses: int = 1
    ring: int = 1
    layout: str | usp.DocumentZigzag = "contiguous"
    transport: str = "ring"
    infer: bool = False

    @property
    def ranks(self) -> int:
        return self.ulysses * self.ring

    def positions(self, seq_len: int, rank: int) -> Tensor:
        place = divmod(rank, self.ulysses)
        return local_positions(self.layout, seq_len, self.ring, self.ulysses, place)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    inputs = draw(st.sampled_from(["self", "memory", "cross"]))
    batched = draw(st.booleans())
    query_len = draw(st.integers(1, 13))
    size = st.one_of(st.none(), st.integers(1, 9))
    mask = draw(st.sampled_from([None, "bool", "float", "causal"]))
    flags = {
        name: draw(st.booleans())
        for name in (
            "bias",
            "add_bias_kv",
            "add_zero_attn",
            "batch_first",
            "need_weights",
            "average",
            "training",
        )
    }
    # a key for every row, whatever else is hidden: torch has NaN where there is none
    always_seen = flags["add_zero_attn"] or flags["add_bias_kv"]
    bound = st.one_of(st.none(), st.integers(0, 9)) if always_seen else st.none()
    return Case(
        seed=draw(st.integers(0, 2**20)),
        batch=draw(st.integers(1, 3)) if batched else 1,
        query_len=query_len,
        key_len=query_len if inputs == "self" else draw(st.integers(1, 13)),
        num_heads=draw(st.integers(1, 4)),
        head_dim=draw(st.integers(1, 5)),
        kdim=draw(size) if inputs == "cross" else None,
        vdim=draw(size) if inputs == "cross" else None,
        batched=batched,
        inputs=inputs,
        padding=draw(st.sampled_from([None, "bool", "float"])),
        mask=mask,
        mask_dims=draw(st.sampled_from([2, 3])),
        hint=mask == "causal" and draw(st.booleans()),
        causal=always_seen and draw(st.booleans()),
        window=(draw(bound), draw(bound)),
        **flags,
    )


def make_tensors(case: Case) -> dict[str, Tensor]:
    """Inputs and masks of whole sequences; no mask hides the first key."""
    g = torch.Generator().manual_seed(case.seed)
    embed_dim = case.num_heads * case.head_dim

    def random(length: int, dim: int) -> Tensor:
        shape = (case.batch, length, dim) if case.batch_first else (length, case.batch, dim)
        x = torch.randn(shape, generator=g, dtype=F64)
        return x if case.batched else x.squeeze(0 if case.batch_first else 1)

    tensors = {"query": random(case.query_len, embed_dim)}
    if case.inputs != "self":
        tensors["key"] = random(case.key_len, case.kdim or embed_dim)
    if case.inputs == "cross":
        tensors["value"] = random(case.key_len, case.vdim or embed_dim)
    if case.padding:
        padding = torch.rand((case.batch, case.key_len), generator=g) < 0.3
        padding[:, 0] = False
        if case.padding == "float":
            values = torch.randn(padding.shape, generator=g, dtype=F64)
            padding = values.masked_fill(padding, -torch.inf)
        tensors["key_padding_mask"] = padding if case.batched else padding[0]
    if case.mask:
        tensors["attn_mask"] = _mask(case, g)
    return tensors


def _mask(case: Case, g: torch.Generator) -> Tensor:
    shape: tuple[int, ...] = (case.query_len, case.key_len)
    if case.mask_dims == 3:
        shape = (case.batch * case.num_heads, *shape)
    hidden = torch.rand(shape, generator=g) < 0.3
    if case.mask == "causal":
        hidden = torch.ones(shape, dtype=torch.bool).triu(1)
    hidden[..., 0] = False
    if case.mask == "float":
        return torch.randn(shape, generator=g, dtype=F64).masked_fill(hidden, -torch.inf)
    return hidden


def cotangents(case: Case) -> list[Tensor]:
    """Of the output and of the weights of whole sequences."""
    g = torch.Generator().manual_seed(case.seed + 1)
    embed_dim = case.num_heads * case.head_dim
    shape = [case.batch, case.query_len] if case.batch_first else [case.query_len, case.batch]
    shapes = [[*(shape if case.batched else [case.query_len]), embed_dim]]
    if case.need_weights:
        keys = case.key_len + case.add_bias_kv + case.add_zero_attn
        dims = [case.batch] * case.batched + [case.num_heads] * (not case.average)
        shapes.append([*dims, case.query_len, keys])
    return [torch.randn(shape, generator=g, dtype=F64) for shape in shapes]


def set_parameters(module: nn.Module, seed: int) -> None:
    g = torch.Generator().manual_seed(seed + 2)
    with torch.no_grad():
        for _, parameter in sorted(module.named_parameters()):
            parameter.copy_(torch.randn(parameter.shape, generator=g, dtype=F64))


def evaluate(
    module: nn.MultiheadAttention, case: Case, tensors: dict[str, Tensor], given: list[Tensor]
) -> Results:
    """Output, weights, and the gradients of every parameter and of every floating tensor."""
    tensors = {k: t.detach().requires_grad_(t.is_floating_point()) for k, t in tensors.items()}
    sources = {k: t for k, t in tensors.items() if t.requires_grad}
    sources |= dict(module.named_parameters())
    query = tensors.pop("query")
    key = tensors.pop("key", query)
    value = tensors.pop("value", key)
    options = {"need_weights": case.need_weights, "average_attn_weights": case.average, **tensors}
    if case.hint and isinstance(module, usp.MultiheadAttention):
        options["is_causal"] = True
    module.train(case.training)
    torch.manual_seed(case.seed)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Support for mismatched")
        results = module(query, key, value, **options)
    assert isinstance(results, tuple) and len(results) == 2
    assert (results[1] is not None) == case.need_weights
    outputs = [result for result in results if result is not None]
    gradients = torch.autograd.grad(outputs, list(sources.values()), given, allow_unused=True)
    found = {f"gradient of {k}": g for k, g in zip(sources, gradients, strict=True)}
    outputs = [output.detach() for output in outputs]
    found |= dict(zip(("output", "weights"), outputs, strict=False))
    return {name: tensor for name, tensor in found.items() if tensor is not None}


def by_torch(case: Case) -> Results:
    """What torch computes, on the plain way: in evaluation a fused one has less precision."""
    module = nn.MultiheadAttention(**case.arguments())
    set_parameters(module, case.seed)
    tensors = make_tensors(case)
    _hide(case, tensors)
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        return evaluate(module, case, tensors, cotangents(case))
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


def _hide(case: Case, tensors: dict[str, Tensor]) -> None:
    """Write our options into the mask that torch knows."""
    offset = torch.arange(case.key_len) - torch.arange(case.query_len)[:, None]
    left, right = case.window
    hidden = offset > 0 if case.causal else torch.zeros_like(offset, dtype=torch.bool)
    hidden = hidden | (offset < -left) if left is not None else hidden
    hidden = hidden | (offset > right) if right is not None else hidden
    mask = tensors.get("attn_mask")
    if hidden.any():
        if mask is None:
            tensors["attn_mask"] = hidden
        elif mask.dtype == torch.bool:
            tensors["attn_mask"] = mask | hidden
        else:
            tensors["attn_mask"] = mask.masked_fill(hidden, -torch.inf)


def make_ours(case: Case, **options: Any) -> usp.MultiheadAttention:
    ours = {"causal": case.causal, "window_size": case.window}
    module = usp.MultiheadAttention(**case.arguments(), **ours, **options)
    set_parameters(module, case.seed)
    return module


def by_us(case: Case) -> Results:
    return evaluate(make_ours(case), case, make_tensors(case), cotangents(case))


def on_worker(case: Case, place: Place, compiler: Any = None) -> Results:
    """This rank's part, on request through ``torch.compile``."""
    mesh = pool.mesh(place.ulysses, place.ring)
    cut = _Cut(case, place, mesh.rank)
    module = make_ours(
        case,
        mesh=mesh,
        layout=place.layout,
        transport=place.transport,
        seq_len="infer" if place.infer else (case.query_len, case.key_len),
    )
    if compiler is not None:
        module.compile(backend=compiler)
    tensors = {name: cut.part(name, tensor) for name, tensor in make_tensors(case).items()}
    given = [
        cut.part(name, t) for name, t in zip(("output", "weights"), cotangents(case), strict=False)
    ]
    return evaluate(module, case, tensors, given)


def join(case: Case, place: Place, parts: list[Results]) -> Results:
    """The results of all ranks as those of one: rows put together, parameters' gradients added."""
    joined: Results = {}
    cuts = [_Cut(case, place, rank) for rank in range(place.ranks)]
    for name in parts[0]:
        held = [part[name] for part in parts]
        dim = cuts[0].dim(name.removeprefix("gradient of "), held[0])
        if dim is None:
            joined[name] = sum(held[1:], held[0])
            continue
        index = torch.cat([cut.index(name.removeprefix("gradient of ")) for cut in cuts])
        joined[name] = torch.cat(held, dim).index_select(dim, index.argsort())
    return joined


@dataclass(frozen=True)
class _Cut:
    """What of each tensor of a call belongs to one rank."""

    case: Case
    place: Place
    rank: int

    def dim(self, name: str, tensor: Tensor) -> int | None:
        """The sequence dim; None for parameters."""
        if name in ("attn_mask", "weights"):
            return tensor.dim() - 2
        if name == "key_padding_mask":
            return tensor.dim() - 1
        if name in ("query", "key", "value", "output"):
            return 1 if self.case.batch_first and self.case.batched else 0
        return None

    def index(self, name: str) -> Tensor:
        of_keys = name in ("key", "value", "key_padding_mask")
        seq_len = self.case.key_len if of_keys else self.case.query_len
        return self.place.positions(seq_len, self.rank)

    def part(self, name: str, tensor: Tensor) -> Tensor:
        dim = self.dim(name, tensor)
        assert dim is not None
        return tensor.index_select(dim, self.index(name))


def assert_same(ours: Results, theirs: Results, tolerance: float = 1e-9) -> None:
    """Every tensor agrees within ``tolerance`` of its largest value."""
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        assert ours[name].shape == expected.shape, name
        scale = max(1.0, expected.abs().max().item()) if expected.numel() else 1.0
        torch.testing.assert_close(
            ours[name],
            expected,
            rtol=0,
            atol=tolerance * scale,
            msg=lambda message, name=name: f"{name}: {message}",
        )
