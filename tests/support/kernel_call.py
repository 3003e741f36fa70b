"""One call of the kernels as data: its inputs, the dense fp64 answer, the kernels' answer."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from usp.testing import philox


@dataclass(frozen=True)
class Call:
    """One call. Sizes as in docs/contract.md; ``heads`` is (held here, offset, group size)."""

    batch: int = 2
    lq: int = 67
    lk: int = 131
    heads: tuple[int, int, int] = (4, 0, 2)
    head_dim: int = 16
    value_head_dim: int = 16
    dtype: torch.dtype = torch.float32
    span: str = "all"
    bias: str | None = None  # four letters of BHQK, "1" where broadcast
    bias_holes: bool = False
    alibi: str | None = None  # "BH" or "1H"
    softcap: float = 0.0
    dropout_p: float = 0.0
    layout: str = "contiguous"
    prior_keys: int = 0  # keys that a first call lets into the state
    seed: int = 0

    @property
    def bands_at_once(self) -> bool:
        """Whether its bands are one call; else a call each."""
        return self.span in ("bands_at_once", "many_bands", "sinks_and_registers")

    @property
    def acc(self) -> torch.dtype:
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    @property
    def num_kv_heads(self) -> int:
        held, offset, group = self.heads
        return (held - 1 + offset) // group - offset // group + 1 if held else 0

    @property
    def num_heads(self) -> int:
        held, offset, group = self.heads
        return math.ceil((held + offset) / group) * group + group


@dataclass
class Inputs:
    """Tensors of a case, keys of the prior call first."""

    q: Tensor
    k: Tensor
    v: Tensor
    first: Tensor | None
    stop: Tensor | None
    bias: Tensor | None
    alibi_slopes: Tensor | None
    q_pos: Tensor
    k_pos: Tensor
    dout: Tensor
    dlse: Tensor
    seed: int = field(default=-(2**40) + 12345)


def strided(x: Tensor, layout: str) -> Tensor:
    """The same values behind other strides; the last dim stays contiguous."""
    if layout == "heads_first":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "sliced":  # every second row of a packed, wider tensor
        wide = torch.full((x.shape[0], 2 * x.shape[1], 3, *x.shape[2:]), torch.nan, dtype=x.dtype)
        wide[:, ::2, 1] = x
        return wide[:, ::2, 1]
    if layout == "expanded":
        return x[:1].expand(x.shape)
    return x


def make_span(case: Call, generator: torch.Generator) -> tuple[Tensor | None, Tensor | None]:
    i = torch.arange(case.lq)
    lk = case.lk
    if case.span == "all":
        return None, None
    if case.span == "causal":
        first, stop = torch.zeros_like(i), i + 1
    elif case.span == "window":
        first, stop = i - 11, i + 6
    elif case.span == "strictly_causal":
        first, stop = torch.zeros_like(i), i
    elif case.span == "documents":
        edges = torch.tensor([0, 5, 5, 40, 64, 120, 10**6])
        which = torch.bucketize(i, edges[1:], right=True)
        first, stop = edges[which], edges[which + 1]
    elif case.span == "nothing":
        first = stop = torch.full_like(i, 7)
    elif case.span == "gaps":  # two far runs of rows, as zigzag with a window makes them
        late = (i >= case.lq // 2).long()
        first, stop = i // 8 + late * (lk * 2 // 3), i // 8 + 3 + late * (lk * 2 // 3)
    elif case.span == "terraces":
        first, stop = i // 32 * 128, i // 32 * 128 + 300
    elif case.span in ("bands", "bands_at_once"):  # sinks, a window and what lies far ahead
        window = (i - 11).clamp(0, lk), (i + 6).clamp(0, lk)
        far = torch.maximum(i + 40, window[1]), i + 43
        first = torch.stack((torch.zeros_like(i), window[0], far[0]))
        stop = torch.stack((window[0].clamp(max=5), window[1], far[1]))
    elif case.span == "sinks_and_registers":  # a window along the diagonal, and what all see or are
        diagonal = i * lk // case.lq
        begin, end = (diagonal - 40).clamp(0, lk), (diagonal + 60).clamp(0, lk)
        first = torch.stack((torch.zeros_like(i), begin, torch.where(i < 3, end, lk)))
        stop = torch.stack((begin.clamp(max=5), end, torch.full_like(i, lk)))
    elif case.span == "many_bands":  # some of them empty for some rows
        ends = torch.randint(0, lk + 1, (26, case.lq), generator=generator).sort(dim=1).values
        first, stop = ends.sort(dim=0).values.unflatten(0, (13, 2)).unbind(1)
    else:
        ends = torch.randint(0, lk + 1, (2, case.lq), generator=generator).sort(dim=1).values
        first, stop = torch.minimum(ends[0], ends[1]), torch.maximum(ends[0], ends[1])
    first = first.clamp(0, lk)
    return first.int().contiguous(), torch.maximum(first, stop.clamp(0, lk)).int()


def make_inputs(case: Call) -> Inputs:
    generator = torch.Generator().manual_seed(case.seed)

    def randn(*shape: int, dtype: torch.dtype = case.dtype) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    b, lq, h, g = case.batch, case.lq, case.heads[0], case.num_kv_heads
    lk = case.prior_keys + case.lk
    first, stop = make_span(case, generator)
    bias = alibi = None
    if case.bias is not None:
        sizes = zip(case.bias, (b, h, lq, lk), strict=True)
        shape = [1 if letter == "1" else size for letter, size in sizes]
        bias = randn(*shape, dtype=case.acc)
        if case.bias_holes:
            holes = torch.rand(shape, generator=generator) < 0.6
            bias = bias.masked_fill(holes, -torch.inf)
    if case.alibi is not None:
        alibi = randn(b if case.alibi[0] == "B" else 1, h, dtype=case.acc).abs() * 0.1
    spread = torch.randperm(4 * (lq + lk) + 1, generator=generator).int()
    return Inputs(
        q=strided(randn(b, lq, h, case.head_dim), case.layout),
        k=strided(randn(b, lk, g, case.head_dim), case.layout),
        v=strided(randn(b, lk, g, case.value_head_dim), case.layout),
        first=first,
        stop=stop,
        bias=bias,
        alibi_slopes=alibi,
        q_pos=spread[:lq].sort().values,
        k_pos=spread[-lk:].sort().values if lk else spread[:0],
        dout=strided(randn(b, lq, h, case.value_head_dim), case.layout),
        dlse=randn(b, h, lq, dtype=case.acc),
    )


def dropout_multiplier(case: Call, x: Inputs) -> Tensor:
    held, offset, _ = case.heads
    row = torch.arange(case.batch)[:, None] * case.num_heads + offset + torch.arange(held)
    words = philox(
        (x.k_pos.long() >> 2, x.q_pos.long()[:, None], row[:, :, None, None], 0),
        (x.seed & 0xFFFFFFFF, (x.seed >> 32) & 0xFFFFFFFF),
    )
    lane = (x.k_pos.long() & 3).expand(words[0].shape)
    word = torch.stack(words, -1).gather(-1, lane[..., None])[..., 0]
    return (word >= int(case.dropout_p * 2**32)).double() / (1 - case.dropout_p)


def dense(case: Call, x: Inputs, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Any:
    """out, lse in fp64 by the full score matrix; prior keys are seen by every row."""
    held, offset, group = case.heads
    heads = [(offset + h) // group - offset // group for h in range(held)]
    scores = torch.einsum("bihd,bjhd->bhij", q, k[:, :, heads]) * case.head_dim**-0.5
    if case.softcap:
        scores = case.softcap * torch.tanh(scores / case.softcap)
    if bias is not None:
        scores = scores + bias
    if x.alibi_slopes is not None:
        distance = (x.q_pos[:, None].long() - x.k_pos.long()).abs()
        scores = scores - x.alibi_slopes.double()[:, :, None, None] * distance
    if x.first is not None and x.stop is not None:
        j = torch.arange(k.shape[1]) - case.prior_keys
        first, stop = (torch.atleast_2d(end)[..., None] for end in (x.first, x.stop))
        visible = ((j >= first) & (j < stop)).any(0) | (j < 0)
        scores = scores.masked_fill(~visible, -torch.inf)
    top = scores.detach().amax(-1) if k.shape[1] else scores.new_full(scores.shape[:3], -torch.inf)
    seen = top > -torch.inf
    top = torch.where(seen, top, 0)
    weights = (scores - top[..., None]).exp()
    total = torch.where(seen, weights.sum(-1), 1)
    p = weights / total[..., None]
    if case.dropout_p:
        p = p * dropout_multiplier(case, x)
    lse = torch.where(seen, top + total.log(), -torch.inf)
    return torch.einsum("bhij,bjhd->bihd", p, v[:, :, heads]), lse


@lru_cache(maxsize=32)
def problem(case: Call) -> tuple[Inputs, dict[str, Tensor]]:
    """Inputs and the dense answer, for many subjects; neither is to be changed."""
    x = make_inputs(case)
    return x, expected(case, x)


def expected(case: Call, x: Inputs) -> dict[str, Tensor]:
    leaves = [t.double().detach().requires_grad_() for t in (x.q, x.k, x.v)]
    bias = None if x.bias is None else x.bias.double().requires_grad_()
    out, lse = dense(case, x, *leaves, bias)
    finite = lse > -torch.inf
    loss = (out * x.dout.double()).sum() + torch.where(finite, lse * x.dlse.double(), 0).sum()
    wanted = leaves if bias is None else [*leaves, bias]
    grads = torch.autograd.grad(loss, wanted, materialize_grads=True)
    found = dict(zip(("dq", "dk", "dv", "dbias"), grads, strict=False))
    return {"out": out.detach(), "lse": lse.detach(), **found}


def bands(case: Call, x: Inputs, masked: bool) -> list[int | None]:
    """The calls for a run of keys: one, or one for each band by its number."""
    if not masked or x.first is None or x.first.dim() == 1 or case.bands_at_once:
        return [None]
    return list(range(len(x.first)))


def options(
    case: Call, x: Inputs, keys: slice, *, masked: bool, band: int | None = None
) -> list[Any]:
    """The arguments that both ops share, for a run of keys."""
    first, stop = x.first, x.stop
    if band is not None and first is not None and stop is not None:
        first, stop = first[band], stop[band]
    positional = case.alibi is not None or case.dropout_p > 0
    return [
        first if masked else None,
        stop if masked else None,
        None if x.bias is None else x.bias[..., keys],
        x.alibi_slopes,
        x.q_pos if positional else None,
        x.k_pos[keys] if positional else None,
        case.heads[1],
        case.num_heads,
        case.heads[2],
        case.head_dim**-0.5,
        case.softcap,
        case.dropout_p,
        x.seed,
    ]


def new_state(case: Call) -> tuple[Tensor, Tensor]:
    b, lq, h = case.batch, case.lq, case.heads[0]
    out = torch.zeros(b, lq, h, case.value_head_dim, dtype=case.acc)
    return out, torch.full((b, h, lq), -torch.inf, dtype=case.acc)


def blocks(case: Call) -> list[tuple[slice, bool]]:
    prior = slice(0, case.prior_keys)
    return [(prior, False)] * bool(case.prior_keys) + [(slice(case.prior_keys, None), True)]


def computed(case: Call, x: Inputs, ops: Any = torch.ops.usp) -> dict[str, Tensor]:
    """The kernels' own results, one call for each block of keys.

    Args:
        ops: Has ``attention_forward`` and ``attention_backward`` of the contract.
    """
    out, lse = new_state(case)
    for keys, masked in blocks(case):
        for band in bands(case, x, masked):
            shared = options(case, x, keys, masked=masked, band=band)
            ops.attention_forward(x.q, x.k[:, keys], x.v[:, keys], *shared, out, lse)
    delta = (x.dout.to(case.acc) * out).sum(-1).transpose(1, 2) - x.dlse
    results = {"out": out, "lse": lse, "dq": torch.zeros(x.q.shape, dtype=case.acc)}
    parts: dict[str, list[Tensor]] = {"dk": [], "dv": [], "dbias": []}
    for keys, masked in blocks(case):
        k, v = x.k[:, keys], x.v[:, keys]
        dk, dv = (torch.zeros(t.shape, dtype=case.acc) for t in (k, v))
        dbias = None if x.bias is None else torch.zeros(x.bias[..., keys].shape, dtype=case.acc)
        for band in bands(case, x, masked):
            shared = options(case, x, keys, masked=masked, band=band)
            ops.attention_backward(
                x.dout, x.q, k, v, delta.contiguous(), lse, *shared, results["dq"], dk, dv, dbias
            )
        for name, part in (("dk", dk), ("dv", dv), ("dbias", dbias)):
            if part is not None:
                parts[name].append(part)
    joined = {"dk": 1, "dv": 1, "dbias": 3}
    return results | {n: torch.cat(p, joined[n]) for n, p in parts.items() if p}


def whole_and_in_blocks(
    case: Call, x: Inputs, ops: Any = torch.ops.usp
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """The state after all 300 keys at once, and after three blocks of them in some order."""
    whole, parts = new_state(case), new_state(case)
    order = (slice(200, 300), slice(0, 77), slice(77, 200))
    for state, runs in ((whole, (slice(None),)), (parts, order)):
        for keys in runs:
            shared = options(case, x, keys, masked=False)
            ops.attention_forward(x.q, x.k[:, keys], x.v[:, keys], *shared, *state)
    return whole, parts


def largest(x: Tensor) -> float:
    """Largest magnitude, 0 for an empty tensor; NaN stays NaN and fails every bound."""
    return x.abs().amax().item() if x.numel() else 0.0


def error_scale(case: Call, x: Inputs, want: dict[str, Tensor], name: str) -> float:
    """What the rounding errors of a result are relative to.

    Its own size; and for gradients of scores, that of dout * out, which cancels in them against
    dout * v: with one key, nothing but the rounding of its weight may be left.
    """
    seen = torch.where(want[name] == -torch.inf, 0, want[name])
    factors = {"dq": x.k, "dk": x.q, "dbias": torch.ones(1)}
    if name not in factors:
        return max(1.0, largest(seen))
    cancelling = largest((x.dout.double() * want["out"]).sum(-1)) * largest(factors[name].double())
    scale = 1.0 if name == "dbias" else case.head_dim**-0.5
    return max(1.0, largest(seen), scale * cancelling)


def assert_right(
    case: Call,
    x: Inputs,
    got: dict[str, Tensor],
    tolerance: float,
    lse: float | None = None,
    want: dict[str, Tensor] | None = None,
) -> None:
    """Every result is within the tolerance of dense attention, relative to ``error_scale``.

    Args:
        lse: Another tolerance of that one.
        want: Dense attention, where it is known.
    """
    want = expected(case, x) if want is None else want
    assert got.keys() == want.keys()
    for name, reference in want.items():
        result = got[name].cpu().double()
        assert result.shape == reference.shape, name
        empty = reference == -torch.inf
        assert torch.equal(result == -torch.inf, empty), f"{name}: rows that see nothing differ"
        worst = largest(torch.where(empty, 0, result - reference))
        allowed = lse if name == "lse" and lse is not None else tolerance
        scale = error_scale(case, x, want, name)
        # a NaN is no success
        assert worst <= allowed * scale, f"{name} is off by {worst:.2e} of {scale:.1f} in {case}"
