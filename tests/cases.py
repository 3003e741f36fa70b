"""One distributed attention problem as plain data, how workers run it and how it is judged.

``python tests/cases.py "Case(ring=2, seq_len=5)"`` replays a case that a test printed.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, fields
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from usp.testing import dense_attention, dropout_multiplier

DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
# largest error of each dtype, as a share of the largest value or summand, or of 1 if that is less
TOLERANCE = {"float64": 1e-9, "float32": 1e-5, "bfloat16": 2e-2, "float16": 2.5e-3}


@dataclass(frozen=True, repr=False)
class Case:
    """A problem on a mesh. Everything random in it comes from ``seed``.

    Attributes:
        on_mesh: With one rank: whether to pass a mesh of size 1 rather than None.
        layout: A layout's name, or "documents" for DocumentZigzag of ``cu_seqlens``.
        key_len: Another number of keys than ``seq_len`` (cross-attention), or None.
        padding: Share of the keys that the padding mask ignores; None for no mask.
        bias: Letters of the dims in which the bias is not broadcast, out of "bhq"; None for none.
        alibi: "h" or "bh", the dims of the slopes.
        strided: Whether q, k, v lie in memory as (B, H, L, D).
        magnitude: Factor of q: large ones make one key win.
    """

    ulysses: int = 1
    ring: int = 1
    on_mesh: bool = True
    layout: str = "contiguous"
    transport: str = "ring"
    backend: str = "auto"
    batch: int = 1
    seq_len: int = 8
    key_len: int | None = None
    heads: int = 1
    kv_heads: int = 1
    head_dim: int = 4
    value_dim: int = 4
    dtype: str = "float64"
    causal: bool = False
    window: tuple[int | None, int | None] = (None, None)
    cu_seqlens: tuple[int, ...] | None = None
    prefix_len: int | None = None
    softmax_scale: float | None = None
    padding: float | None = None
    bias: str | None = None
    softcap: float | None = None
    alibi: str | None = None
    dropout_p: float = 0.0
    return_lse: bool = False
    strided: bool = False
    magnitude: float = 1.0
    seed: int = 0

    def __repr__(self) -> str:
        changed = (
            f"{field.name}={getattr(self, field.name)!r}"
            for field in fields(self)
            if getattr(self, field.name) != field.default
        )
        return f"Case({', '.join(changed)})"

    @property
    def ranks(self) -> int:
        return self.ulysses * self.ring

    @property
    def num_keys(self) -> int:
        return self.seq_len if self.key_len is None else self.key_len

    @property
    def masks(self) -> dict[str, Any]:
        """The options that say who sees whom, and the scale: ours and the oracle's alike."""
        return {
            "causal": self.causal,
            "window_size": self.window,
            "cu_seqlens": self.cu_seqlens,
            "prefix_len": self.prefix_len,
            "softmax_scale": self.softmax_scale,
            "softcap": self.softcap,
        }


@dataclass
class Tensors:
    """Inputs and cotangents, of the whole sequence or of one rank."""

    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor
    dlse: Tensor
    bias: Tensor | None
    padding: Tensor | None
    slopes: Tensor | None


def whole(case: Case) -> Tensors:
    """The whole problem, the same on every process."""
    random = torch.Generator().manual_seed(case.seed)
    dtype = DTYPES[case.dtype]
    state_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    b, sq, sk, h = case.batch, case.seq_len, case.num_keys, case.heads

    def normal(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, generator=random, dtype=torch.float64).to(dtype)

    bias = padding = slopes = None
    q, k = normal(b, sq, h, case.head_dim), normal(b, sk, case.kv_heads, case.head_dim)
    v = normal(b, sk, case.kv_heads, case.value_dim)
    dout, dlse = normal(b, sq, h, case.value_dim), normal(b, h, sq, dtype=state_dtype)
    if case.bias is not None:
        sizes = zip("bhq", (b, h, sq), strict=True)
        bias = normal(*(size if dim in case.bias else 1 for dim, size in sizes), sk)
    if case.padding is not None:
        padding = torch.rand(b, sk, generator=random) < case.padding
    if case.alibi is not None:
        shape = (b, h) if case.alibi == "bh" else (h,)
        slopes = torch.rand(shape, generator=random, dtype=state_dtype)
    return Tensors((q * case.magnitude).to(dtype), k, v, dout, dlse, bias, padding, slopes)


def chunks(length: int, parts: int) -> list[list[int]]:
    """0..length-1 in consecutive parts, the first ones longer."""
    small, longer = divmod(length, parts)
    ends = [0]
    for i in range(parts):
        ends.append(ends[-1] + small + (i < longer))
    return [list(range(a, b)) for a, b in pairwise(ends)]


def ring_rows(
    layout: str, length: int, ring: int, cu_seqlens: tuple[int, ...] | None = None
) -> list[list[int]]:
    """Positions of each ring rank, written down independently of usp.layout."""
    if layout == "contiguous":
        return chunks(length, ring)
    if layout == "striped":
        return [list(range(r, length, ring)) for r in range(ring)]
    if layout == "zigzag":
        parts = chunks(length, 2 * ring)
        return [parts[r] + parts[2 * ring - 1 - r] for r in range(ring)]
    assert layout == "documents" and cu_seqlens is not None
    rows: list[list[int]] = [[] for _ in range(ring)]
    for document, start in enumerate(cu_seqlens[:-1]):
        inside = ring_rows("zigzag", cu_seqlens[document + 1] - start, ring)
        for r in range(ring):
            rows[r] += [start + i for i in inside[(r + document) % ring]]
    return rows


def shards(case: Case, length: int) -> list[list[int]]:
    """Positions of each rank of the mesh."""
    rows = ring_rows(case.layout, length, case.ring, case.cu_seqlens)
    return [[row[i] for i in piece] for row in rows for piece in chunks(len(row), case.ulysses)]


def local(case: Case, rank: int) -> Tensors:
    """What one rank holds of the problem."""
    t = whole(case)
    queries, keys = shards(case, case.seq_len)[rank], shards(case, case.num_keys)[rank]
    bias = t.bias
    if bias is not None and "q" in case.bias:
        bias = bias[:, :, queries]
    return Tensors(
        t.q[:, queries],
        t.k[:, keys],
        t.v[:, keys],
        t.dout[:, queries],
        t.dlse[:, :, queries],
        bias,
        None if t.padding is None else t.padding[:, keys],
        t.slopes,
    )


def run(case: Case) -> dict[str, Tensor]:
    """On a worker: this rank's results and gradients."""
    import pool
    import torch.distributed as dist

    mesh = pool.mesh(case.ulysses, case.ring) if case.on_mesh else None
    return attend(case, local(case, dist.get_rank()), mesh)


def attend(case: Case, t: Tensors, mesh: Any) -> dict[str, Tensor]:
    """The function under test, forward and backward."""
    import usp

    q, k, v = leaves = [_leaf(case, x) for x in (t.q, t.k, t.v)]
    if t.bias is not None:
        t.bias.requires_grad_()
        leaves.append(t.bias)
    documents = case.layout == "documents"
    result = usp.long_context_attention(
        q,
        k,
        v,
        mesh,
        **case.masks,
        layout=usp.DocumentZigzag(case.cu_seqlens) if documents else case.layout,
        seq_len=case.seq_len if case.key_len is None else (case.seq_len, case.key_len),
        key_padding_mask=t.padding,
        attn_bias=t.bias,
        dropout_p=case.dropout_p,
        alibi_slopes=t.slopes,
        transport=case.transport,
        return_lse=case.return_lse,
        backend=case.backend,
    )
    out, lse = result if case.return_lse else (result, None)
    outputs, cotangents = ([out, lse], [t.dout, t.dlse]) if case.return_lse else ([out], [t.dout])
    gradients = torch.autograd.grad(outputs, leaves, cotangents)
    names = ["out", "lse", "dq", "dk", "dv", "dbias"]
    values = [out.detach(), None if lse is None else lse.detach(), *gradients]
    return {name: x for name, x in zip(names, values, strict=False) if x is not None}


def _leaf(case: Case, x: Tensor) -> Tensor:
    x = x.detach().clone()
    if case.strided:
        x = x.transpose(1, 2).contiguous().transpose(1, 2)
    return x.requires_grad_()


def join(case: Case, results: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The whole results, put together from those of all ranks by position."""
    queries, keys = shards(case, case.seq_len), shards(case, case.num_keys)
    dims = {"out": 1, "lse": 2, "dq": 1, "dk": 1, "dv": 1, "dbias": 2}
    joined = {}
    for name in results[0]:
        parts = [result[name] for result in results]
        if name == "dbias" and "q" not in case.bias:
            # each rank holds its part of the sum
            joined[name] = torch.stack([part.double() for part in parts]).sum(0)
            continue
        places = keys if name in ("dk", "dv") else queries
        order = torch.tensor([i for place in places for i in place], dtype=torch.int64)
        everything = torch.cat(parts, dims[name])
        joined[name] = torch.empty_like(everything).index_copy_(dims[name], order, everything)
    return joined


def oracle(case: Case, dropout_seed: int | None = None) -> dict[str, Tensor]:
    """The same results by dense attention in fp64 over the whole sequences."""
    t = whole(case)
    leaves = [x.double().requires_grad_() for x in (t.q, t.k, t.v, t.bias) if x is not None]
    keep = None
    if case.dropout_p:
        assert dropout_seed is not None
        shape = case.batch, case.heads, case.seq_len, case.num_keys
        keep = dropout_multiplier(case.dropout_p, dropout_seed, *shape)
    out, lse = dense_attention(
        *leaves[:3],
        **case.masks,
        key_padding_mask=t.padding,
        attn_bias=leaves[3] if len(leaves) > 3 else None,
        alibi_slopes=t.slopes,
        dropout_keep=keep,
    )
    outputs, cotangents = [out], [t.dout.double()]
    if case.return_lse:
        outputs, cotangents = [out, lse], [t.dout.double(), t.dlse.double()]
    gradients = torch.autograd.grad(outputs, leaves, cotangents, allow_unused=True)
    results = {"out": out.detach()}
    if case.return_lse:
        results["lse"] = lse.detach()
    for name, leaf, gradient in zip(("dq", "dk", "dv", "dbias"), leaves, gradients, strict=False):
        results[name] = torch.zeros_like(leaf) if gradient is None else gradient
    return results


def assert_close(
    case: Case, ours: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float | None = None
) -> None:
    """Every result within the tolerance of the case's dtype; names all that are not."""
    tolerance = TOLERANCE[case.dtype] if tolerance is None else tolerance
    assert list(ours) == list(expected)
    wrong, sizes = [], summand_sizes(case, expected["out"])
    for name, reference in expected.items():
        result = ours[name].double()
        assert result.shape == reference.shape, f"{name}: {result.shape} is not {reference.shape}"
        if name == "lse":
            assert torch.equal(result == -torch.inf, reference == -torch.inf), "empty rows differ"
            result, reference = result.nan_to_num(neginf=0.0), reference.nan_to_num(neginf=0.0)
        if reference.numel():
            scale = max(1.0, sizes.get(name, 0.0), reference.abs().max().item())
            error = (result - reference).abs().max().item() / scale
            # a NaN is no success
            if not error <= tolerance:
                wrong.append(f"{name}: error {error:.2e} of {scale:.2g}, allowed {tolerance:.0e}")
    assert not wrong, f"{'; '.join(wrong)}\nreplay: python tests/cases.py {str(case)!r}"


def summand_sizes(case: Case, out: Tensor) -> dict[str, float]:
    """How large the terms are whose difference is a gradient: what cancels leaves their rounding.

    ``ds = p (dp - delta)`` may be 0 for any size of ``dp`` and ``delta``.
    """
    t = whole(case)
    delta = (t.dout.double() * out).sum(-1).abs().max().item()
    scale = case.head_dim**-0.5 if case.softmax_scale is None else abs(case.softmax_scale)
    q, k = (x.double().abs().max().item() * scale for x in (t.q, t.k))
    return {"dq": delta * k, "dk": delta * q, "dbias": delta}


def dropout_seed() -> int:
    """The seed that a call draws on a worker, whose generator the pool seeds with 0."""
    state = torch.get_rng_state()
    torch.manual_seed(0)
    seed = int(torch.randint(2**62, ()))
    torch.set_rng_state(state)
    return seed


def judge(case: Case, pool: Any) -> None:
    """Run a case on the pool and compare everything with the oracle."""
    results = pool.run(run, case, ranks=case.ranks)
    dtype, state_dtype = DTYPES[case.dtype], DTYPES[case.dtype]
    if state_dtype != torch.float64:
        state_dtype = torch.float32
    for result in results:
        for name, tensor in result.items():
            assert tensor.dtype == (state_dtype if name == "lse" else dtype), name
    assert_close(case, join(case, results), oracle(case, dropout_seed()))


def main() -> None:
    from pool import Pool

    case = eval(sys.argv[1], {"Case": Case})
    pool = Pool()
    try:
        judge(case, pool)
    finally:
        pool.close()
    print(f"right: {case!r}")


if __name__ == "__main__":
    # by its importable name, so that workers can unpickle what it sends
    import cases

    cases.main()
