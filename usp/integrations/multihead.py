"""``nn.MultiheadAttention`` in a model that exists, swapped in place."""

from __future__ import annotations

from typing import Any, TypeVar

from torch import nn

from usp.distributed.mesh import SequenceMesh
from usp.nn.multihead.module import MultiheadAttention, check_class
from usp.nn.multihead.placement import Placement

Model = TypeVar("Model", bound=nn.Module)


def replace_attention(model: Model, mesh: SequenceMesh | None = None, **options: Any) -> Model:
    """Turn every ``nn.MultiheadAttention`` in a model into ``usp.MultiheadAttention``, in place.

    The modules stay the objects they were, with their parameters, hooks and training flag, so
    optimizers and shared modules keep holding them; one that is ours already moves to ``mesh``.
    The rest of the model runs as before, on what it is given: give each rank its own tokens
    (``usp.shard_sequence``). Where modules need options of their own, replace them one by one.

    Args:
        model: A module that holds attention modules, or is one.
        mesh, options: The keyword arguments of ``usp.MultiheadAttention`` from ``mesh`` on.

    Returns:
        ``model``.

    Raises:
        NotImplementedError: a module derives from ``nn.MultiheadAttention``, and what it changes
            would be lost; names it. Nothing has been replaced.
        ValueError: there is no ``nn.MultiheadAttention``, or an option is unknown.
    """
    placement = Placement(mesh, **options)
    found = {n: m for n, m in model.named_modules() if isinstance(m, nn.MultiheadAttention)}
    if not found:
        raise ValueError(
            f"{type(model).__name__} holds no nn.MultiheadAttention, so there is nothing to replace"
        )
    for name, module in found.items():
        try:
            check_class(module)
        except NotImplementedError as refusal:
            raise NotImplementedError(f"cannot replace {name or 'the model'}: {refusal}") from None
    for module in found.values():
        MultiheadAttention.adopt(module, placement)
    _refuse_nested_tensors(model)
    return model


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
