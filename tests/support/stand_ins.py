"""Stand-ins for the compiled parts of attention libraries, which compute in torch on the CPU.

They keep a library's signature, its checks and its habits: which corner a mask counts from, what it
answers for a row that sees nothing, and that it reads the LSE through its pointer. What stands in
for flash-attn 2's extension is under that library's own Python, too (``tests/backends/library``).
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

HALVES = (torch.float16, torch.bfloat16)


def scores_of(
    q: Tensor, k: Tensor, scale: float, left: int | None, right: int | None, softcap: float = 0.0
) -> tuple[Tensor, Tensor]:
    """(B, H, n, m) fp64: -inf where hidden by a window from the bottom right corner; and raw."""
    n, m = q.shape[1], k.shape[1]
    raw = torch.einsum("bihd,bjhd->bhij", q.double(), k.double()) * scale
    capped = softcap * torch.tanh(raw / softcap) if softcap else raw
    apart = torch.arange(m) - (torch.arange(n)[:, None] + m - n)
    hidden = torch.zeros(n, m, dtype=torch.bool)
    if left is not None:
        hidden |= apart < -left
    if right is not None:
        hidden |= apart > right
    return capped.masked_fill(hidden, -torch.inf), capped


def one_each(q: Tensor, *keys: Tensor) -> list[Tensor]:
    """A key head for each query head, in even groups."""
    assert q.shape[2] % keys[0].shape[2] == 0, "query heads in groups of one size"
    return [x.repeat_interleave(q.shape[2] // x.shape[2], 2) for x in keys]


def forward(
    q: Tensor, k: Tensor, v: Tensor, scale: float, left: Any, right: Any, softcap: float = 0.0
) -> tuple[Tensor, Tensor]:
    """out in the dtype of q; lse (B, H, n) fp32, -inf for a row that sees nothing."""
    k, v = one_each(q, k, v)
    scores, _ = scores_of(q, k, scale, left, right, softcap)
    lse = scores.logsumexp(-1)
    p = (scores - lse.nan_to_num(neginf=0.0)[..., None]).exp()
    return torch.einsum("bhij,bjhd->bihd", p, v.double()).to(q.dtype), lse.float()


def backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    left: Any,
    right: Any,
    softcap: float = 0.0,
    dlse: Tensor | None = None,
) -> list[Tensor]:
    """dq, dk, dv in the dtype of q; out and lse are taken as they are given."""
    batch, n, heads, _ = q.shape
    # through its pointer: whatever its strides say
    lse = torch.as_strided(lse, (batch, heads, n), (heads * n, n, 1), lse.storage_offset())
    num_heads = k.shape[2]
    kk, vv = one_each(q, k, v)
    scores, capped = scores_of(q, kk, scale, left, right, softcap)
    p, do = (scores - lse.double()[..., None]).exp(), dout.double()
    delta = (do * out.double()).sum(-1).transpose(1, 2)
    delta = delta if dlse is None else delta - dlse.double()
    ds = p * (torch.einsum("bihd,bjhd->bhij", do, vv.double()) - delta[..., None])
    ds = ds * (1 - (capped / softcap).square()) if softcap else ds
    dq = torch.einsum("bhij,bjhd->bihd", ds, kk.double()) * scale
    dk = torch.einsum("bhij,bihd->bjhd", ds, q.double()) * scale
    dv = torch.einsum("bhij,bihd->bjhd", p, do)
    dk, dv = (x.unflatten(2, (num_heads, -1)).sum(3) for x in (dk, dv))
    return [x.to(q.dtype) for x in (dq, dk, dv)]


def each_sequence(cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int) -> list[tuple[slice, slice]]:
    """Rows and keys of each sequence of a packed call, as their boundaries say."""
    assert cu_q.dtype == cu_k.dtype == torch.int32 and len(cu_q) == len(cu_k)
    pairs = [
        (slice(*cu_q[i : i + 2].tolist()), slice(*cu_k[i : i + 2].tolist()))
        for i in range(len(cu_q) - 1)
    ]
    assert max(2, *(r.stop - r.start for r, _ in pairs)) == max_q, "single rows go another way"
    assert max(2, *(c.stop - c.start for _, c in pairs)) == max_k
    assert all(r.start < r.stop and c.start < c.stop for r, c in pairs), "an empty sequence"
    return pairs


def packed_forward(
    q: Tensor, k: Tensor, v: Tensor, sequences: list[tuple[slice, slice]], *how: Any
) -> tuple[Tensor, Tensor]:
    """(tokens, H, Dv), (H, tokens)."""
    found = [forward(q[r][None], k[c][None], v[c][None], *how) for r, c in sequences]
    return torch.cat([out[0] for out, _ in found]), torch.cat([lse[0] for _, lse in found], 1)


def packed_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    sequences: list[tuple[slice, slice]],
    how: tuple[Any, ...],
    dlse: Tensor | None = None,
) -> list[Tensor]:
    heads, total = q.shape[1], q.shape[0]
    lse = torch.as_strided(lse, (heads, total), (total, 1), lse.storage_offset())
    grads = [torch.zeros_like(x) for x in (q, k, v)]
    for r, c in sequences:
        inputs = [x[a][None] for x, a in ((dout, r), (q, r), (k, c), (v, c), (out, r))]
        more = None if dlse is None else dlse[None, :, r]
        parts = backward(*inputs, lse[:, r].contiguous()[None], *how, more)
        for grad, part, a in zip(grads, parts, (r, c, c), strict=True):
            grad[a] = part[0]
    return grads


def checked(q: Tensor, k: Tensor, v: Tensor, *more: Tensor) -> None:
    """What a compiled extension refuses."""
    assert q.dtype in HALVES, "only fp16 and bf16"
    assert all(x.dtype == q.dtype for x in (k, v, *more)), "all of one dtype"
    assert all(x.stride(-1) == 1 for x in (q, k, v, *more)), "the last dim is contiguous"
    assert q.shape[-1] == k.shape[-1] == v.shape[-1] <= 256 and q.shape[-1] % 8 == 0


def bounds(causal: bool, left: int, right: int) -> tuple[int | None, int | None]:
    """Of flash-attn 2 and 3: below 0 is no bound, causal is a right one of 0."""
    return (left if left >= 0 else None), (0 if causal else right if right >= 0 else None)


class Extension:
    """``flash_attn_2_cuda``, in the signatures of 2.7 and 2.8."""

    @staticmethod
    def fwd(
        q: Tensor, k: Tensor, v: Tensor, out: None, alibi: None, dropout: float, scale: float,
        causal: bool, left: int, right: int, softcap: float, return_softmax: bool, gen: None,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        checked(q, k, v)
        assert alibi is None and not dropout and not return_softmax
        got, lse = forward(q, k, v, scale, *bounds(causal, left, right), softcap)
        lse = lse.masked_fill(lse == -torch.inf, torch.inf)
        return got, lse, torch.empty(0), torch.zeros(2, dtype=torch.int64)

    @staticmethod
    def bwd(
        dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, dq: Tensor,
        dk: Tensor, dv: Tensor, alibi: None, dropout: float, scale: float, causal: bool, left: int,
        right: int, softcap: float, deterministic: bool, gen: None, rng: None,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        checked(q, k, v, dout, out)
        assert lse.dtype == torch.float32 and alibi is None and not dropout
        how = scale, *bounds(causal, left, right), softcap
        for grad, found in zip((dq, dk, dv), backward(dout, q, k, v, out, lse, *how), strict=True):
            grad.copy_(found)
        return dq, dk, dv, torch.empty(0)

    @staticmethod
    def varlen_fwd(
        q: Tensor, k: Tensor, v: Tensor, out: None, cu_q: Tensor, cu_k: Tensor, used: None,
        leftpad: None, table: None, alibi: None, max_q: int, max_k: int, dropout: float,
        scale: float, zero: bool, causal: bool, left: int, right: int, softcap: float,
        return_softmax: bool, gen: None,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        checked(q, k, v)
        assert used is leftpad is table is alibi is None and not dropout and not return_softmax
        sequences = each_sequence(cu_q, cu_k, max_q, max_k)
        how = scale, *bounds(causal, left, right), softcap
        got, lse = packed_forward(q, k, v, sequences, *how)
        return got, lse, torch.empty(0), torch.zeros(2, dtype=torch.int64)

    @staticmethod
    def varlen_bwd(
        dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, dq: Tensor,
        dk: Tensor, dv: Tensor, cu_q: Tensor, cu_k: Tensor, alibi: None, max_q: int, max_k: int,
        dropout: float, scale: float, zero: bool, causal: bool, left: int, right: int,
        softcap: float, deterministic: bool, gen: None, rng: None,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        checked(q, k, v, dout, out)
        assert lse.dtype == torch.float32 and alibi is None and not dropout
        sequences = each_sequence(cu_q, cu_k, max_q, max_k)
        how = scale, *bounds(causal, left, right), softcap
        found = packed_backward(dout, q, k, v, out, lse, sequences, how)
        for grad, part in zip((dq, dk, dv), found, strict=True):
            grad.copy_(part)
        return dq, dk, dv, torch.empty(0)


def _module(*functions: Any) -> SimpleNamespace:
    return SimpleNamespace(**{function.__name__: function for function in functions})


def flash2_functions(lse_lies: str = "hn") -> Any:
    """The four functions of ``flash_attn_interface`` over the extension, without their library.

    Args:
        lse_lies: Of a packed call: (heads, tokens), or "nh" for the other way round.
    """

    def turned(lse: Tensor) -> Tensor:
        return lse if lse_lies == "hn" else lse.T.contiguous()

    def _flash_attn_forward(
        q: Tensor, k: Tensor, v: Tensor, dropout_p: float, softmax_scale: float, causal: bool,
        window_size_left: int, window_size_right: int, softcap: float, alibi_slopes: Tensor | None,
        return_softmax: bool,
    ) -> Any:  # fmt: skip
        return Extension.fwd(
            q, k, v, None, alibi_slopes, dropout_p, softmax_scale, causal, window_size_left,
            window_size_right, softcap, return_softmax, None,
        )  # fmt: skip

    def _flash_attn_backward(
        dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, softmax_lse: Tensor, dq: Tensor,
        dk: Tensor, dv: Tensor, dropout_p: float, softmax_scale: float, causal: bool,
        window_size_left: int, window_size_right: int, softcap: float, alibi_slopes: Tensor | None,
        deterministic: bool, rng_state: Tensor | None = None,
    ) -> Any:  # fmt: skip
        return Extension.bwd(
            dout, q, k, v, out, softmax_lse, dq, dk, dv, alibi_slopes, dropout_p, softmax_scale,
            causal, window_size_left, window_size_right, softcap, deterministic, None, rng_state,
        )[3]  # fmt: skip

    def _flash_attn_varlen_forward(
        q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor,
        max_seqlen_q: int, max_seqlen_k: int, dropout_p: float, softmax_scale: float, causal: bool,
        window_size_left: int = -1, window_size_right: int = -1, softcap: float = 0.0,
        alibi_slopes: Tensor | None = None, return_softmax: bool = False,
    ) -> Any:  # fmt: skip
        out, lse, *rest = Extension.varlen_fwd(
            q, k, v, None, cu_seqlens_q, cu_seqlens_k, None, None, None, alibi_slopes,
            max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, False, causal, window_size_left,
            window_size_right, softcap, return_softmax, None,
        )  # fmt: skip
        return out, turned(lse), *rest

    def _flash_attn_varlen_backward(
        dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, softmax_lse: Tensor, dq: Tensor,
        dk: Tensor, dv: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int,
        max_seqlen_k: int, dropout_p: float, softmax_scale: float, causal: bool,
        window_size_left: int, window_size_right: int, softcap: float, alibi_slopes: Tensor | None,
        deterministic: bool, rng_state: Tensor | None = None, zero_tensors: bool = False,
    ) -> Any:  # fmt: skip
        return Extension.varlen_bwd(
            dout, q, k, v, out, turned(softmax_lse), dq, dk, dv, cu_seqlens_q, cu_seqlens_k,
            alibi_slopes, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, zero_tensors,
            causal, window_size_left, window_size_right, softcap, deterministic, None, rng_state,
        )[3]  # fmt: skip

    return _module(
        _flash_attn_forward,
        _flash_attn_backward,
        _flash_attn_varlen_forward,
        _flash_attn_varlen_backward,
    )


def flash26_functions() -> Any:
    """Those of 2.6: a window is a pair, and there are eight results."""
    late = flash2_functions()

    def eight(q: Tensor, k: Tensor, v: Tensor, found: Any) -> Any:
        out, lse, *rest = found
        return out, q, k, v, out, lse, *rest

    def _flash_attn_forward(
        q: Tensor, k: Tensor, v: Tensor, dropout_p: float, softmax_scale: float, causal: bool,
        window_size: tuple[int, int], softcap: float, alibi_slopes: Tensor | None,
        return_softmax: bool,
    ) -> Any:  # fmt: skip
        how = dropout_p, softmax_scale, causal, *window_size, softcap, alibi_slopes, return_softmax
        return eight(q, k, v, late._flash_attn_forward(q, k, v, *how))

    def _flash_attn_varlen_forward(
        q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor,
        max_seqlen_q: int, max_seqlen_k: int, dropout_p: float, softmax_scale: float, causal: bool,
        window_size: tuple[int, int] = (-1, -1), softcap: float = 0.0,
        alibi_slopes: Tensor | None = None, return_softmax: bool = False,
    ) -> Any:  # fmt: skip
        where = cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
        how = dropout_p, softmax_scale, causal, *window_size, softcap, alibi_slopes, return_softmax
        return eight(q, k, v, late._flash_attn_varlen_forward(q, k, v, *where, *how))

    def _flash_attn_backward(*given: Any) -> Any:
        *tensors, dropout_p, scale, causal, window, softcap, alibi, fixed = given
        assert len(tensors) == 9
        how = dropout_p, scale, causal, *window, softcap, alibi, fixed
        return late._flash_attn_backward(*tensors, *how)

    def _flash_attn_varlen_backward(*given: Any) -> Any:
        *tensors, dropout_p, scale, causal, window, softcap, alibi, fixed = given
        assert len(tensors) == 13
        how = dropout_p, scale, causal, *window, softcap, alibi, fixed
        return late._flash_attn_varlen_backward(*tensors, *how)

    return _module(
        _flash_attn_forward,
        _flash_attn_backward,
        _flash_attn_varlen_forward,
        _flash_attn_varlen_backward,
    )


def flash3_functions() -> Any:
    """The two functions of flash-attn 3, as they are called in the builds of the hub."""

    def _flash_attn_forward(
        q: Tensor, k: Tensor, v: Tensor, k_new: Tensor | None = None,
        cu_seqlens_q: Tensor | None = None, cu_seqlens_k: Tensor | None = None,
        max_seqlen_q: int | None = None, max_seqlen_k: int | None = None,
        softmax_scale: float | None = None, causal: bool = False, window_size_left: int = -1,
        window_size_right: int = -1, softcap: float = 0.0, num_splits: int = 1,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
        checked(q, k, v)
        assert k_new is None and num_splits == 1 and softmax_scale is not None
        how = softmax_scale, *bounds(causal, window_size_left, window_size_right), softcap
        if cu_seqlens_q is None:
            found = forward(q, k, v, *how)
        else:
            assert cu_seqlens_k is not None and max_seqlen_q and max_seqlen_k
            sequences = each_sequence(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
            found = packed_forward(q, k, v, sequences, *how)
        return *found, torch.empty(0), torch.empty(0)

    def _flash_attn_backward(
        dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, softmax_lse: Tensor,
        cu_seqlens_q: Tensor | None = None, cu_seqlens_k: Tensor | None = None,
        max_seqlen_q: int | None = None, max_seqlen_k: int | None = None, dq: Tensor | None = None,
        dk: Tensor | None = None, dv: Tensor | None = None, softmax_scale: float | None = None,
        is_causal: bool = False, window_size_left: int = -1, window_size_right: int = -1,
        softcap: float = 0.0, deterministic: bool = False,
    ) -> Tensor:  # fmt: skip
        checked(q, k, v, dout, out)
        assert softmax_scale is not None and dq is not None and dk is not None and dv is not None
        how = softmax_scale, *bounds(is_causal, window_size_left, window_size_right), softcap
        if cu_seqlens_q is None:
            found = backward(dout, q, k, v, out, softmax_lse, *how)
        else:
            assert cu_seqlens_k is not None and max_seqlen_q and max_seqlen_k
            sequences = each_sequence(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
            found = packed_backward(dout, q, k, v, out, softmax_lse, sequences, how)
        for grad, part in zip((dq, dk, dv), found, strict=True):
            grad.copy_(part)
        return torch.empty(0)

    return SimpleNamespace(
        _flash_attn_forward=_flash_attn_forward, _flash_attn_backward=_flash_attn_backward
    )


class Flash4:
    """``flash_attn.cute.interface``: None is no bound, a negative one is a bound."""

    @staticmethod
    def _flash_attn_fwd(
        q: Tensor, k: Tensor, v: Tensor, qv: None = None, cu_seqlens_q: Tensor | None = None,
        cu_seqlens_k: Tensor | None = None, max_seqlen_q: int | None = None,
        max_seqlen_k: int | None = None, softmax_scale: float | None = None, causal: bool = False,
        softcap: float | None = None, window_size_left: int | None = None,
        window_size_right: int | None = None, return_lse: bool = False,
    ) -> tuple[Tensor | None, ...]:  # fmt: skip
        assert qv is None and return_lse and softmax_scale is not None
        how = softmax_scale, window_size_left, 0 if causal else window_size_right, softcap or 0.0
        if cu_seqlens_q is None:
            return *forward(q, k, v, *how), None, None, None
        assert cu_seqlens_k is not None and max_seqlen_q and max_seqlen_k
        sequences = each_sequence(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        return *packed_forward(q, k, v, sequences, *how), None, None, None

    @staticmethod
    def _flash_attn_bwd(
        q: Tensor, k: Tensor, v: Tensor, out: Tensor, dout: Tensor, lse: Tensor,
        softmax_scale: float | None = None, causal: bool = False, softcap: float = 0.0,
        window_size_left: int | None = None, window_size_right: int | None = None,
        cu_seqlens_q: Tensor | None = None, cu_seqlens_k: Tensor | None = None,
        max_seqlen_q: int | None = None, max_seqlen_k: int | None = None,
        deterministic: bool = False, dlse: Tensor | None = None,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        assert softmax_scale is not None and lse.is_contiguous()
        how = softmax_scale, window_size_left, 0 if causal else window_size_right, softcap
        if cu_seqlens_q is None:
            return tuple(backward(dout, q, k, v, out, lse, *how, dlse))
        assert cu_seqlens_k is not None and max_seqlen_q and max_seqlen_k
        sequences = each_sequence(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        return tuple(packed_backward(dout, q, k, v, out, lse, sequences, how, dlse))


class Aiter:
    """``flash_attn_triton_amd.flash_attn_2`` of aiter, which the table takes to know no windows."""

    @staticmethod
    def fwd(
        q: Tensor, k: Tensor, v: Tensor, out: None, alibi: None, dropout: float, scale: float,
        causal: bool, left: int, right: int, softcap: float, return_softmax: bool, gen: None = None,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        assert (left, right, softcap) == (-1, -1, 0.0) and q.shape[1] and k.shape[1]
        assert not causal or q.shape[1] == k.shape[1], "a row that sees nothing is answered 0"
        return *forward(q, k, v, scale, None, 0 if causal else None), torch.empty(0), None

    @staticmethod
    def bwd(
        dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, dq: Tensor,
        dk: Tensor, dv: Tensor, alibi: None, dropout: float, scale: float, causal: bool, left: int,
        right: int, softcap: float, deterministic: bool, gen: None = None, rng: None = None,
    ) -> Tensor:  # fmt: skip
        assert (left, right, softcap) == (-1, -1, 0.0)
        assert dout.stride() == out.stride(), "dout is read by the strides of out"
        how = scale, None, 0 if causal else None
        for grad, part in zip((dq, dk, dv), backward(dout, q, k, v, out, lse, *how), strict=True):
            grad.copy_(part)
        return torch.empty(0)

    @staticmethod
    def varlen_fwd(
        q: Tensor, k: Tensor, v: Tensor, out: None, cu_q: Tensor, cu_k: Tensor, used: None,
        leftpad: None, table: None, alibi: None, max_q: int, max_k: int, dropout: float,
        scale: float, zero: bool, causal: bool, left: int, right: int, softcap: float,
        return_softmax: bool, gen: None = None,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        assert (left, right, softcap) == (-1, -1, 0.0)
        sequences = each_sequence(cu_q, cu_k, max_q, max_k)
        return *packed_forward(q, k, v, sequences, scale, None, 0 if causal else None), None, None

    @staticmethod
    def varlen_bwd(
        dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, dq: Tensor,
        dk: Tensor, dv: Tensor, cu_q: Tensor, cu_k: Tensor, alibi: None, max_q: int, max_k: int,
        dropout: float, scale: float, zero: bool, causal: bool, left: int, right: int,
        softcap: float, deterministic: bool, gen: None = None, rng: None = None,
    ) -> Tensor:  # fmt: skip
        assert (left, right, softcap) == (-1, -1, 0.0) and dout.stride() == out.stride()
        sequences = each_sequence(cu_q, cu_k, max_q, max_k)
        how = scale, None, 0 if causal else None
        found = packed_backward(dout, q, k, v, out, lse, sequences, how)
        for grad, part in zip((dq, dk, dv), found, strict=True):
            grad.copy_(part)
        return torch.empty(0)
