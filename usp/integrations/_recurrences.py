"""Linear layers of transformers' models, for what a rank holds: gated DeltaNet, and the short
convolution in front of it.

Both are functions of the file of a model, which looks them up by name when it calls them. So they
are led through here, once; outside of regions, and in regions of one rank without documents, they
are as they were.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn

from usp.integrations._answer import Tokens, refuse
from usp.integrations._region import Region, current_region
from usp.linear_attention.functional import linear_attention
from usp.planning.problem import state_dtype
from usp.sharding.convolution import causal_conv1d

_MODELS = "transformers.models"
_FILES = (
    f"{_MODELS}.qwen3_next.modeling_qwen3_next",
    f"{_MODELS}.qwen3_5.modeling_qwen3_5",
    f"{_MODELS}.qwen3_5_moe.modeling_qwen3_5_moe",
)
Told = dict[str, Any]


def lead_through() -> None:
    """From here on these functions ask whether they are called in a region; once for a process.

    Of files that nobody has imported there is nothing to do yet.
    """
    if torch.compiler.is_compiling():
        return
    for file in _FILES:
        names = vars(sys.modules[file]) if file in sys.modules else {}
        for name, ours in _ANSWERS.items():
            theirs = names.get(name)
            if callable(theirs) and not hasattr(theirs, "called_in_usp"):
                names[name] = _led(theirs, ours)


def check_linear_layers(model: nn.Module) -> None:
    """Refuse layers that do not call what is led through here.

    Raises:
        NotImplementedError: names the class.
    """
    for kind in {type(module) for module in model.modules() if hasattr(module, "conv1d")}:
        called = inspect.unwrap(kind.forward).__code__.co_names
        names = vars(sys.modules[kind.__module__])
        for name in _ANSWERS:
            if name not in called or not hasattr(names.get(name), "called_in_usp"):
                raise NotImplementedError(
                    f"{kind.__qualname__} of this transformers does not call {name}, and so would "
                    "see this rank's own tokens alone: 5.24 does"
                )


def _led(theirs: Callable[..., Any], ours: Callable[[Region, Told], Any]) -> Callable[..., Any]:
    signature = inspect.signature(theirs)

    @wraps(theirs)
    def called(*args: Any, **kwargs: Any) -> Any:
        region = current_region()
        if region is None or region.tokens.is_alone:
            return theirs(*args, **kwargs)
        if torch.compiler.is_compiling():
            return torch.compiler.disable(answered)(region, args, kwargs)
        return answered(region, args, kwargs)

    def answered(region: Region, args: tuple[Any, ...], kwargs: Told) -> Any:
        told = signature.bind(*args, **kwargs)
        told.apply_defaults()
        region.count()
        given = told.arguments | told.arguments.pop("kwargs", {})
        fault = _fault(region, given)
        if fault is not None:
            refuse(region.tokens.spread, fault)
        with region.paused():
            return ours(region, given)

    called.called_in_usp = True  # type: ignore[attr-defined]
    return called


def _fault(region: Region, told: Told) -> Exception | None:
    """What a rank cannot do for the whole."""
    tokens = region.tokens
    for name in ("cu_seqlens", "seq_idx"):
        if told.get(name) is not None:
            return NotImplementedError(
                f"{name} of documents in the model, whose tokens are cut: say which documents "
                'there are to usp.cut_batch(cu_seqlens=), with parallelize(outputs="local")'
            )
    keeps = told.get("output_final_state") and not region.keeps_state
    if told.get("initial_state") is not None or keeps:
        return NotImplementedError(
            "a cache of states, which would be of this rank's tokens alone: call the model with "
            "use_cache=False, or an empty sharded_cache of the door of transformers"
        )
    x = told.get("hidden_states")
    held = told["query"].shape[1] if x is None else x.shape[-1]
    if held != tokens.held:
        return ValueError(
            f"a linear layer has {held} tokens, where this rank holds {tokens.held} of "
            f"{tokens.spread.seq_len}"
        )
    if tokens.cut and 1 in tokens.shares and len(tokens.shares) > 1:
        return NotImplementedError(
            f"ranks hold {tokens.shares} tokens, and transformers hides no padding from a linear "
            'layer of a single one: cut less, or outputs="joined"'
        )
    return None


def _placed(tokens: Tokens) -> Told:
    spread = tokens.spread
    return spread.options | {"validate": spread.validate}


def _convolved(region: Region, told: Told) -> Tensor:
    """(B, C, local tokens) -> the same."""
    from transformers.activations import ACT2FN

    x, weight = told["hidden_states"], told["weight"]
    mixed = x.to(weight.dtype).transpose(1, 2)
    out = causal_conv1d(mixed, weight, told["bias"], **_placed(region.tokens))
    if told["activation"] is not None:
        out = ACT2FN[told["activation"]](out)
    return out.transpose(1, 2).to(x.dtype)


def _delta_rule(region: Region, told: Told) -> tuple[Tensor, Tensor | None]:
    """(B, local tokens, heads, value head dim), and the state behind the last token of the whole
    where a cache keeps it."""
    names, keeps = ("query", "key", "value"), bool(told["output_final_state"])
    region.keeps_state = False
    dtype = state_dtype(told["query"].dtype)
    q, k, v = (told[name].to(dtype) for name in names)
    if told["use_qk_l2norm_in_kernel"]:
        q, k = (x * (x.square().sum(-1, keepdim=True) + 1e-6).rsqrt() for x in (q, k))
    q = q * q.shape[-1] ** -0.5
    options = _placed(region.tokens) | {"beta": told["beta"], "return_state": keeps}
    found = linear_attention(q, k, v, told["g"], **options)
    out, state = found if isinstance(found, tuple) else (found, None)
    return out.to(told["query"].dtype), state


_ANSWERS: dict[str, Callable[[Region, Told], Any]] = {
    "causal_conv1d_fn": _convolved,
    "torch_chunk_gated_delta_rule": _delta_rule,
}
