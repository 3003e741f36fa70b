"""The stand-ins as torch ops: flash-attn 3's by its schema, and torch's own on CPU tensors.

torch has no CPU kernels of these ops; those made here are called through its dispatcher, which
holds the callers to the schema: names, types, defaults.
"""

from __future__ import annotations

from typing import Any

import torch
from stand_ins import (
    backward,
    bounds,
    checked,
    each_sequence,
    forward,
    packed_backward,
    packed_forward,
)
from torch import Tensor

_libraries: list[torch.library.Library] = []  # what is registered lives as long as these

# hopper/flash_api.cpp of flash-attn 3
FLASH3_FWD = """fwd(Tensor q, Tensor k, Tensor v, Tensor(k_new!)? k_new = None,
 Tensor(v_new!)? v_new = None, Tensor? q_v = None, Tensor(out!)? out = None,
 Tensor? cu_seqlens_q = None, Tensor? cu_seqlens_k = None, Tensor? cu_seqlens_k_new = None,
 Tensor? seqused_q = None, Tensor? seqused_k = None, int? max_seqlen_q = None,
 int? max_seqlen_k = None, Tensor? page_table = None, Tensor? kv_batch_idx = None,
 Tensor? leftpad_k = None, Tensor? rotary_cos = None, Tensor? rotary_sin = None,
 Tensor? seqlens_rotary = None, Tensor? q_descale = None, Tensor? k_descale = None,
 Tensor? v_descale = None, float? softmax_scale = None, bool is_causal = False,
 int window_size_left = -1, int window_size_right = -1, int attention_chunk = 0,
 float softcap = 0.0, bool is_rotary_interleaved = False, Tensor? scheduler_metadata = None,
 int num_splits = 0, bool? pack_gqa = None, int sm_margin = 0)
 -> (Tensor(out!), Tensor, Tensor, Tensor)"""
FLASH3_BWD = """bwd(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor softmax_lse,
 Tensor(dq!)? dq = None, Tensor(dk!)? dk = None, Tensor(dv!)? dv = None,
 Tensor? cu_seqlens_q = None, Tensor? cu_seqlens_k = None, Tensor? seqused_q = None,
 Tensor? seqused_k = None, int? max_seqlen_q = None, int? max_seqlen_k = None,
 float? softmax_scale = None, bool is_causal = False, int window_size_left = -1,
 int window_size_right = -1, float softcap = 0.0, bool deterministic = False, int sm_margin = 0)
 -> (Tensor(dq!), Tensor(dk!), Tensor(dv!), Tensor, Tensor, Tensor, Tensor, Tensor)"""


def _flash3_fwd(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    named = _named("fwd", rest, skip=3)
    checked(q, k, v)
    how = _how3(named)
    if named["cu_seqlens_q"] is None:
        found = forward(q, k, v, *how)
    else:
        found = packed_forward(q, k, v, _sequences3(named), *how)
    return *found, q.new_empty(0), q.new_empty(0)


def _flash3_bwd(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    named = _named("bwd", rest, skip=6)
    checked(q, k, v, dout, out)
    assert lse.dtype == torch.float32
    how = _how3(named)
    if named["cu_seqlens_q"] is None:
        found = backward(dout, q, k, v, out, lse, *how)
    else:
        found = packed_backward(dout, q, k, v, out, lse, _sequences3(named), how)
    grads = named["dq"], named["dk"], named["dv"]
    for grad, part in zip(grads, found, strict=True):
        grad.copy_(part)
    return *grads, *(q.new_empty(0) for _ in range(5))


def _named(op: str, rest: tuple[Any, ...], skip: int) -> dict[str, Any]:
    """Arguments behind the tensors by name; those at the end with their default do not come."""
    arguments = getattr(torch.ops.flash_attn_3, op).default._schema.arguments[skip:]
    defaults = {argument.name: argument.default_value for argument in arguments}
    return defaults | dict(zip(defaults, rest, strict=False))


def _how3(named: dict[str, Any]) -> tuple[Any, ...]:
    window = named["is_causal"], named["window_size_left"], named["window_size_right"]
    return named["softmax_scale"], *bounds(*window), named["softcap"]


def _sequences3(named: dict[str, Any]) -> list[tuple[slice, slice]]:
    names = "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"
    return each_sequence(*(named[name] for name in names))


def define_flash3() -> None:
    """``torch.ops.flash_attn_3``, once in a process."""
    if hasattr(torch.ops.flash_attn_3, "fwd"):
        return
    library = torch.library.Library("flash_attn_3", "DEF")
    for schema, call in ((FLASH3_FWD, _flash3_fwd), (FLASH3_BWD, _flash3_bwd)):
        name = library.define(schema.replace("\n", ""))
        library.impl(name.split("::")[-1], call, "CPU")
    _libraries.append(library)


def _flash_forward(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Any, cu_k: Any, max_q: int, max_k: int,
    dropout: float, causal: bool, debug: bool, *, scale: float, window_size_left: Any = None,
    window_size_right: Any = None, **others: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    checked(q, k, v)
    assert not dropout and not debug and not any(x is not None for x in others.values())
    how = scale, *_aten_bounds(causal, window_size_left, window_size_right)
    if cu_q is None:
        assert (max_q, max_k) == (q.shape[1], k.shape[1])
        out, lse = forward(q, k, v, *how)
    else:
        out, lse = packed_forward(q, k, v, each_sequence(cu_q, cu_k, max_q, max_k), *how)
    state = torch.zeros(2, dtype=torch.uint64)
    return out, lse, state, torch.zeros((), dtype=torch.uint64), q.new_empty(0)


def _flash_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, cu_q: Any, cu_k: Any,
    max_q: int, max_k: int, dropout: float, causal: bool, state: Tensor, unused: Tensor, *,
    scale: float, window_size_left: Any = None, window_size_right: Any = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    checked(q, k, v, dout, out)
    assert not dropout and state.dtype == unused.dtype == torch.uint64
    how = scale, *_aten_bounds(causal, window_size_left, window_size_right)
    if cu_q is None:
        return tuple(backward(dout, q, k, v, out, lse, *how))
    sequences = each_sequence(cu_q, cu_k, max_q, max_k)
    return tuple(packed_backward(dout, q, k, v, out, lse, sequences, how))


def _aten_bounds(causal: bool, left: int | None, right: int | None) -> tuple[Any, Any]:
    return bounds(causal, -1 if left is None else left, -1 if right is None else right)


def _cudnn_forward(
    q: Tensor, k: Tensor, v: Tensor, bias: None, lse_too: bool, dropout: float = 0.0,
    causal: bool = False, debug: bool = False, *, scale: float,
) -> tuple[Any, ...]:  # fmt: skip
    assert bias is None and lse_too and not dropout and q.dtype in (torch.float16, torch.bfloat16)
    assert q.shape[1] == k.shape[1] == v.shape[1] and (not causal or q.shape[2] == k.shape[2])
    out, lse = forward(*_tokens_first(q, k, v), scale, None, 0 if causal else None)
    none, scalar = torch.empty(0), torch.zeros((), dtype=torch.int64)
    lengths = q.shape[2], k.shape[2]
    return out.transpose(1, 2), lse[..., None], none, none, *lengths, scalar, scalar, none


def _cudnn_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, seed: Tensor,
    offset: Tensor, bias: None, cu_q: None, cu_k: None, max_q: int, max_k: int, dropout: float,
    causal: bool, *, scale: float,
) -> tuple[Tensor, ...]:  # fmt: skip
    assert lse.shape == (*q.shape[:3], 1) and lse.dtype == torch.float32
    assert (max_q, max_k) == (q.shape[2], k.shape[2]) and not dropout
    assert bias is cu_q is cu_k is None, "any tensor that is defined is one"
    tensors = _tokens_first(dout, q, k, v, out)
    found = backward(*tensors, lse[..., 0], scale, None, 0 if causal else None)
    return tuple(_tokens_first(*found))


def _tokens_first(*tensors: Tensor) -> list[Tensor]:
    return [x.transpose(1, 2) for x in tensors]


def _efficient_forward(
    q: Tensor, k: Tensor, v: Tensor, bias: None, cu_q: None, cu_k: None, max_q: Any, max_k: Any,
    dropout: float, mask: int, lse_too: bool = False, *, scale: float, **others: Any,
) -> tuple[Any, ...]:  # fmt: skip
    assert bias is cu_q is cu_k is None and lse_too and not dropout and not others
    assert q.shape[2] == k.shape[2] == v.shape[2] and mask in (0, 1)
    assert not mask or q.shape[1] == k.shape[1], "1 counts from the top left corner"
    out, lse = forward(q, k, v, scale, None, 0 if mask else None)
    padded = torch.nn.functional.pad(lse, (0, -q.shape[1] % 32), value=torch.nan)
    scalar = torch.zeros((), dtype=torch.int64)
    return out, padded, scalar, scalar, q.shape[1], k.shape[1]


def _efficient_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: None, out: Tensor, cu_q: None, cu_k: None,
    max_q: int, max_k: int, lse: Tensor, dropout: float, seed: Tensor, offset: Tensor, mask: int,
    bias_too: bool, *, scale: float, **others: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    n = q.shape[1]
    assert lse.shape[2] % 32 == 0 and lse.is_contiguous() and lse.dtype == torch.float32
    assert lse[:, :, n:].eq(torch.inf).all() and (max_q, max_k) == (n, k.shape[1])
    assert bias is cu_q is cu_k is None and not dropout and not bias_too and not others
    lse = lse[:, :, :n].contiguous()
    found = backward(dout, q, k, v, out, lse, scale, None, 0 if mask else None)
    return *found, q.new_empty(0)


ATEN = {
    "_flash_attention_forward": _flash_forward,
    "_flash_attention_backward": _flash_backward,
    "_scaled_dot_product_cudnn_attention": _cudnn_forward,
    "_scaled_dot_product_cudnn_attention_backward": _cudnn_backward,
    "_efficient_attention_forward": _efficient_forward,
    "_efficient_attention_backward": _efficient_backward,
}


def define_aten() -> None:
    """CPU kernels of torch's ops, once in a process."""
    if torch._C._dispatch_has_kernel_for_dispatch_key("aten::_flash_attention_forward", "CPU"):
        return
    library = torch.library.Library("aten", "IMPL")
    for name, call in ATEN.items():
        library.impl(name, call, "CPU")
    _libraries.append(library)
