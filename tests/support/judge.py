"""How workers run a case, and how its results are judged: by the oracle, joined by position.

``python tests/judge.py "Case(ring=2, seq_len=5)"`` replays a case that a test printed.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from cases import DTYPES, Case, Tensors, key_shards, local, seen, shards, whole
from torch import Tensor

from usp.testing import dense_attention, dropout_multiplier

# largest error of each dtype, as a share of the largest value or summand, or of 1 if that is less
TOLERANCE = {"float64": 1e-9, "float32": 1e-5, "bfloat16": 2e-2, "float16": 2.5e-3}
_NOTHING = nullcontext()


def run(case: Case) -> dict[str, Tensor]:
    """On a worker: this rank's results and gradients."""
    import pool
    import torch.distributed as dist

    mesh = pool.mesh(case.ulysses, case.ring, case.ring_outer) if case.on_mesh else None
    return attend(case, local(case, dist.get_rank()), mesh)


def attend(
    case: Case,
    t: Tensors,
    mesh: Any,
    around_forward: AbstractContextManager[Any] = _NOTHING,
    around_backward: AbstractContextManager[Any] = _NOTHING,
) -> dict[str, Tensor]:
    """The function under test, forward and backward."""
    import usp

    q, k, v = (_leaf(case, x) for x in (t.q, t.k, t.v))
    bias = None if t.bias is None else _leaf(case, t.bias)
    sinks = None if t.sinks is None else t.sinks.clone().requires_grad_()
    given = seen(case).given
    if "attn_mask" in given:
        mine = slice(None) if t.queries is None else t.queries
        given = given | {"attn_mask": given["attn_mask"][mine]}
    with around_forward:
        result = usp.long_context_attention(
            q,
            k,
            v,
            mesh,
            **case.masks,
            **given,
            layout=case.placed,
            seq_len=case.seq_len if case.key_len is None else (case.seq_len, case.key_len),
            key_padding_mask=t.padding,
            attn_bias=bias,
            sinks=sinks,
            dropout_p=case.dropout_p,
            dropout_seed=case.dropout_seed,
            alibi_slopes=t.slopes,
            transport=case.transport,
            return_lse=case.return_lse,
            backend=case.backend,
            chunks=case.chunks,
            head_chunks=case.head_chunks,
            offload=case.offload,
            **({} if case.replicated is None else {case.replicated: "replicated"}),
        )
    out, lse = result if case.return_lse else (result, None)
    outputs, cotangents = ([out, lse], [t.dout, t.dlse]) if case.return_lse else ([out], [t.dout])
    leaves = {"dq": q, "dk": k, "dv": v, "dbias": bias, "dsinks": sinks}
    leaves = {name: leaf for name, leaf in leaves.items() if leaf is not None}
    with around_backward:
        gradients = torch.autograd.grad(outputs, list(leaves.values()), cotangents)
    results = {"out": out.detach()} | ({} if lse is None else {"lse": lse.detach()})
    return results | dict(zip(leaves, gradients, strict=True))


def _leaf(case: Case, x: Tensor) -> Tensor:
    """A copy to differentiate by, which lies in memory as the case wants it."""
    first, second = {None: (0, 0), "heads": (1, 2), "last": (1, 3)}[case.strided]
    x = x.detach().transpose(first, second).clone(memory_format=torch.contiguous_format)
    return x.transpose(first, second).requires_grad_()


def join(case: Case, results: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The whole results, put together from those of all ranks by position."""
    queries, keys = shards(case, case.seq_len), key_shards(case)
    copies = {"queries": ("out", "lse"), "keys": (), None: ()}[case.replicated]
    summed = {"queries": ("dq",), "keys": ("dk", "dv"), None: ()}[case.replicated]
    dims = {"out": 1, "lse": 2, "dq": 1, "dk": 1, "dv": 1, "dbias": 2}
    joined = {}
    for name in results[0]:
        parts = [result[name] for result in results]
        if name in copies:
            assert all(torch.equal(part, parts[0]) for part in parts), f"copies of {name} differ"
            joined[name] = parts[0]
            continue
        if name == "dsinks" or name in summed or (name == "dbias" and "q" not in case.bias):
            # each rank holds its part of the sum
            joined[name] = torch.stack([part.double() for part in parts]).sum(0)
            continue
        places = keys if name in ("dk", "dv") else queries
        order = torch.tensor([i for place in places for i in place], dtype=torch.int64)
        everything = torch.cat(parts, dims[name])
        joined[name] = torch.empty_like(everything).index_copy_(dims[name], order, everything)
    return joined


def oracle(case: Case) -> dict[str, Tensor]:
    """The same results by dense attention in fp64 over the whole sequences."""
    t = whole(case)
    if t.bias is not None:  # what the lowest number of a dtype means would be lost in fp64
        lowest = torch.finfo(t.bias.dtype).min
        t.bias = t.bias.double().masked_fill(t.bias == lowest, -torch.inf)
    leaves = {"dq": t.q, "dk": t.k, "dv": t.v, "dbias": t.bias, "dsinks": t.sinks}
    leaves = {name: x.double().requires_grad_() for name, x in leaves.items() if x is not None}
    who, keep = seen(case), None
    table = who.table(case.seq_len, case.num_keys)
    offset = {"query_offset": who.query_offset}
    if case.dropout_p:
        shape = case.batch, case.heads, case.seq_len, case.num_keys
        keep = dropout_multiplier(case.dropout_p, case.dropout_seed, *shape, **offset)
    out, lse = dense_attention(
        leaves["dq"],
        leaves["dk"],
        leaves["dv"],
        **case.masks,
        **offset,
        attn_mask=None if table is None else table[:, None],
        key_padding_mask=t.padding,
        attn_bias=leaves.get("dbias"),
        alibi_slopes=t.slopes,
        sinks=leaves.get("dsinks"),
        dropout_keep=keep,
    )
    outputs, cotangents = [out], [t.dout.double()]
    if case.return_lse:
        outputs, cotangents = [out, lse], [t.dout.double(), t.dlse.double()]
    gradients = torch.autograd.grad(
        outputs, list(leaves.values()), cotangents, allow_unused=True, materialize_grads=True
    )
    results = {"out": out.detach()} | ({"lse": lse.detach()} if case.return_lse else {})
    return results | dict(zip(leaves, gradients, strict=True))


def assert_close(case: Case, ours: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Every result within the tolerance of the case's dtype; names all that are not."""
    assert list(ours) == list(expected)
    wrong, sizes, tolerance = [], summand_sizes(case, expected["out"]), TOLERANCE[case.dtype]
    for name, reference in expected.items():
        result = ours[name].double()
        assert result.shape == reference.shape, f"{name}: {result.shape} is not {reference.shape}"
        if name == "lse":
            assert torch.equal(result == -torch.inf, reference == -torch.inf), "empty rows differ"
            result, reference = result.nan_to_num(neginf=0.0), reference.nan_to_num(neginf=0.0)
        if reference.numel():
            scale = max(1.0, sizes.get(name, 0.0), largest(reference))
            error = largest(result - reference) / scale
            # a NaN is no success
            if not error <= tolerance:
                wrong.append(f"{name}: error {error:.2e} of {scale:.2g}, allowed {tolerance:.0e}")
    assert not wrong, f"{'; '.join(wrong)}\nreplay: python tests/judge.py {str(case)!r}"


def largest(x: Tensor) -> float:
    return x.abs().max().item() if x.numel() else 0.0


def summand_sizes(case: Case, out: Tensor) -> dict[str, float]:
    """How large the terms are whose difference is a gradient: what cancels leaves their rounding.

    ``ds = p (dp - delta)`` may be 0 for any size of ``dp`` and ``delta``.
    """
    t = whole(case)
    delta = largest((t.dout.double() * out).sum(-1))
    scale = case.head_dim**-0.5 if case.softmax_scale is None else abs(case.softmax_scale)
    q, k = (largest(x.double()) * scale for x in (t.q, t.k))
    rows = t.q.shape[0] * t.q.shape[1]
    return {"dq": delta * k, "dk": delta * q, "dbias": delta, "dsinks": delta * rows}


def judge(case: Case, pool: Any, run: Callable[[Case], dict[str, Tensor]] = run) -> None:
    """Run a case on the pool and compare everything with the oracle."""
    results = pool.run(run, case, ranks=case.ranks)
    dtype = DTYPES[case.dtype]
    wide = {"lse": torch.float64 if dtype == torch.float64 else torch.float32}
    wide["dbias"] = DTYPES[case.bias_dtype or case.dtype]
    for result in results:
        for name, tensor in result.items():
            assert tensor.dtype == wide.get(name, dtype), name
    assert_close(case, join(case, results), oracle(case))


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
    import judge as importable

    importable.main()
