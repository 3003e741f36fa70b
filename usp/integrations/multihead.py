"""``nn.MultiheadAttention`` in a model that exists, swapped in place."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, TypeVar

from torch import nn

from usp.distributed.mesh import SequenceMesh
from usp.integrations._choice import Only, any_means, choices, means, shortened
from usp.integrations._other_attention import other_attention
from usp.nn.multihead.module import MultiheadAttention, check_class
from usp.nn.multihead.placement import Placement

Model = TypeVar("Model", bound=nn.Module)


def replace_attention(
    model: Model, mesh: SequenceMesh | None = None, *, only: Only | None = None, **options: Any
) -> Model:
    """Turn ``nn.MultiheadAttention`` in a model into ``usp.MultiheadAttention``, in place.

    The modules stay the objects they were, with their parameters, hooks and training flag, so
    optimizers and shared modules keep holding them; one that is ours already moves to ``mesh``.
    The rest of the model runs as before, on what it is given: give each rank its own tokens
    (``usp.shard_sequence``). Where modules need options of their own, call this for each part.

    Args:
        model: A module that holds attention modules, or is one.
        mesh: The ranks that share the sequence; None is one device.
        only: Which attention is meant, where not all is: names as in ``named_modules``, or
            patterns of them (``"*.self_attn"``), or classes, each for a module and all it holds;
            or a function of (name, module); or several of these. The rest stays as it is.
        options: The keyword arguments of ``usp.MultiheadAttention`` behind ``mesh``. In the
            layers of ``nn.Transformer`` a pair as ``seq_len`` or ``layout`` is that of source and
            target, and each attention in them gets its own of the two; elsewhere it is a query's
            and a key's as always.

    Returns:
        ``model``.

    Raises:
        NotImplementedError: a module derives from ``nn.MultiheadAttention``, and what it changes
            would be lost; or, on several ranks, the model seems to hold attention of another
            kind, which would see each rank's own tokens alone. Names them. Nothing has been
            replaced.
        ValueError: there is no ``nn.MultiheadAttention`` (that ``only`` means), or an option is
            unknown.
    """
    placement = Placement(mesh, **options)
    found = _find(model, only)
    for name, module in found.items():
        try:
            check_class(module)
        except NotImplementedError as refusal:
            raise NotImplementedError(f"cannot replace {name or 'the model'}: {refusal}") from None
    if placement.size > 1:
        _refuse_other_attention(model, only)
    lengths = _of_layers(model, placement.seq_len)
    layouts = _of_layers(model, placement.layout)
    for module in found.values():
        seq_len = lengths.get(module, placement.seq_len)
        layout = layouts.get(module, placement.layout)
        MultiheadAttention.adopt(module, replace(placement, seq_len=seq_len, layout=layout))
    _refuse_nested_tensors(model)
    return model


def _find(model: nn.Module, only: Only | None) -> dict[str, nn.MultiheadAttention]:
    """The modules to replace, each once, by name."""
    everything = dict(model.named_modules(remove_duplicate=False))
    known = {n: m for n, m in everything.items() if isinstance(m, nn.MultiheadAttention)}
    if not known:
        raise ValueError(
            f"{type(model).__name__} holds no nn.MultiheadAttention, so there is nothing to replace"
        )
    if only is None:
        meant = known
    else:
        for choice in choices(only):
            if not any(means(choice, name, everything) for name in known):
                raise ValueError(
                    f"only={choice!r} means no nn.MultiheadAttention of {type(model).__name__}, "
                    f"which holds {shortened(known)}"
                )
        meant = {n: m for n, m in known.items() if any_means(only, n, everything)}
    names = {module: name for name, module in reversed(meant.items())}
    return {name: module for module, name in reversed(names.items())}


def _refuse_other_attention(model: nn.Module, only: Only | None) -> None:
    everything = dict(model.named_modules(remove_duplicate=False))
    others = {
        name: f"{name or 'the model'} ({type(everything[name]).__qualname__} {reason})"
        for name, reason in other_attention(model).items()
        if only is None or any_means(only, name, everything)
    }
    if others:
        raise NotImplementedError(
            f"{type(model).__name__} seems to hold attention that is no nn.MultiheadAttention and "
            f"would see each rank's own tokens alone: {shortened(others.values())}. Where that is "
            "meant, or this guess is wrong, say which modules to replace: "
            "only=nn.MultiheadAttention, names or patterns of names; elsewhere put "
            "usp.LongContextAttention in its place. Nothing has been replaced"
        )


def _of_layers(model: nn.Module, pair: Any) -> dict[nn.Module, Any]:
    """What is of source and of target, as the attention in torch's own layers takes it."""
    if not isinstance(pair, tuple | list):
        return {}
    source, target = pair
    own: dict[nn.Module, Any] = {}
    for layer in model.modules():
        if isinstance(layer, nn.TransformerEncoderLayer):
            own[layer.self_attn] = source
        elif isinstance(layer, nn.TransformerDecoderLayer):
            own[layer.self_attn] = target
            own[layer.multihead_attn] = (target, source)
    return own


def _refuse_nested_tensors(model: nn.Module) -> None:
    """Encoders, also those that copy a layer of the model later, pass padded tensors on."""
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False
        elif isinstance(module, nn.TransformerEncoderLayer) and isinstance(
            module.self_attn, MultiheadAttention
        ):
            # what an encoder asks before it makes NestedTensors: is the activation one of those
            # that the fused kernel knows
            module.activation_relu_or_gelu = 0
