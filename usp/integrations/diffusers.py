"""The door of Hugging Face diffusers: an attention backend called "usp".

Its models ask one table for a backend by name, in every attention that is not of the oldest kind.
Where their own ``ContextParallelConfig`` has cut the tokens, the call says so; where
``usp.parallelize`` has, the region does.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from usp.attention.functional import long_context_attention
from usp.distributed.mesh import SequenceMesh
from usp.integrations._answer import Tokens, answer, refuse
from usp.integrations._region import current_region
from usp.nn.spread import Spread
from usp.sharding.whole import held

NAME = "usp"


def register() -> None:
    """Make the attention backend "usp" known to diffusers; a second time changes nothing.

    ``model.set_attention_backend("usp")`` then means: on one device what "native" computes; in a
    trunk of ``usp.parallelize``, or in ``usp.spread_attention``, the attention of the whole
    sequence; and behind ``model.enable_parallelism(config=ContextParallelConfig(...))``, which cuts
    and joins, attention over both axes of its mesh, with gradients, fewer key heads, causal.

    Raises:
        ModuleNotFoundError: diffusers is not there; says which command installs it.

    Example:
        >>> from usp.integrations import diffusers as door
        >>> door.register()
        >>> model.set_attention_backend("usp")
        >>> model.enable_parallelism(config=ContextParallelConfig(ring_degree=2, ulysses_degree=2))
    """
    try:
        import diffusers.models.attention_dispatch as theirs
    except ModuleNotFoundError as missing:
        if (missing.name or "").partition(".")[0] != "diffusers":
            raise
        raise ModuleNotFoundError(
            "diffusers 0.42 or newer is not installed: pip install 'usp[diffusers]'",
            name="diffusers",
        ) from None
    names: Any = theirs.AttentionBackendName
    if NAME not in names._value2member_map_:
        # the table's keys are the members of a closed Enum: it gets one more
        member = str.__new__(names, NAME)
        member._name_, member._value_ = NAME.upper(), NAME
        names._member_map_[member._name_] = names._value2member_map_[NAME] = member
        names._member_names_.append(member._name_)
        type.__setattr__(names, member._name_, member)
    registry = theirs._AttentionBackendRegistry
    registry.register(names(NAME), supports_context_parallel=True)(attention)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    return_lse: bool = False,
    _parallel_config: Any = None,
) -> Tensor:
    """The function of diffusers' table of backends; its arguments as there.

    Args:
        query: (B, local queries, H, D). key, value: (B, local keys, G, D or Dv).
        attn_mask: bool (True is seen) or float; (B, keys), or what torch takes.
        _parallel_config: Their configuration, where its hooks have cut these tokens.

    Returns:
        (B, local queries, H, Dv).

    Raises:
        NotImplementedError: ``return_lse``; or what the configuration has cut lies in a region.
        ValueError: a mask or lengths that do not fit; on every rank that meets.
    """
    if return_lse:
        raise NotImplementedError("the backend returns no LSE: call usp.long_context_attention")
    region = current_region()
    config = getattr(_parallel_config, "context_parallel_config", None)
    options: dict[str, Any] = {"dropout_p": dropout_p, "is_causal": is_causal, "scale": scale}
    options["enable_gqa"] = enable_gqa
    if config is not None:
        if region is not None:
            raise NotImplementedError(
                "enable_parallelism() has cut the tokens of a model that usp.parallelize or "
                "usp.spread_attention cuts, too: take one of them"
            )
        return _of_config(config, query, key, value, attn_mask, options)
    keys = {key.shape[1]} | ({region.tokens.spread.seq_len} if region else set())
    if attn_mask is not None and attn_mask.dim() == 2 and attn_mask.shape[0] == len(query):
        attn_mask = attn_mask[:, None, None] if attn_mask.shape[1] in keys else attn_mask
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    return F.scaled_dot_product_attention(q, k, v, attn_mask, **options).transpose(1, 2)


def _of_config(
    config: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    options: dict[str, Any],
) -> Tensor:
    """What a rank of their mesh holds of queries and keys, in the order of ranks."""
    mesh = _mesh_of(config)
    spreads = [_spread(config, mesh, x.shape[1]) for x in (query, key)]
    if mask is not None and mask.dim() == 2 and mask.shape[0] == len(query):
        mask = mask[:, None, None] if mask.shape[1] in _lengths(spreads[1]) else mask
    if spreads[0] == spreads[1]:
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        return answer(Tokens.of(spreads[0], ()), q, k, v, mask, **options).transpose(1, 2)
    return _across(spreads, query, key, value, mask, options)


def _mesh_of(config: Any) -> SequenceMesh:
    """Theirs as ours, made once; its ranks lie as ours do, ring by ring."""
    known = getattr(config, "_usp_mesh", None)
    if known is None or known.device_mesh is not config._mesh:
        known = config._usp_mesh = SequenceMesh.from_device_mesh(config._mesh)
    return cast(SequenceMesh, known)


def _spread(config: Any, mesh: SequenceMesh, length: int) -> Spread:
    """Their hooks cut evenly, or ("anything") as they can, text and image each by itself."""
    if config.ulysses_anything or config.ring_anything:
        return Spread(mesh, held(length, mesh))
    return Spread(mesh, seq_len=length * mesh.size)


def _lengths(spread: Spread) -> tuple[int, int]:
    return spread.local_seq_len, spread.seq_len


def _across(
    spreads: list[Spread],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    options: dict[str, Any],
) -> Tensor:
    """Queries that look at another sequence, a text that is cut, too."""
    queries, keys = spreads
    given: dict[str, Any] = {"dropout_p": options["dropout_p"], "softmax_scale": options["scale"]}
    if options["is_causal"]:
        fault = f"causal attention of {queries.seq_len} queries to {keys.seq_len} keys of another"
        refuse(queries, ValueError(f"{fault} sequence: which is before which is not known"))
    if mask is not None:
        given |= _row(keys, mask, len(query), queries)
    out = long_context_attention(
        query,
        key,
        value,
        queries.mesh,
        layout=(queries.layout, keys.layout),
        seq_len=(queries.seq_len, keys.seq_len),
        **given,
    )
    return cast(Tensor, out)


def _row(keys: Spread, mask: Tensor, batch: int, queries: Spread) -> dict[str, Tensor]:
    """A mask of the keys of another sequence, this rank's or all, the same for all queries."""
    mask = mask[(None,) * max(0, 4 - mask.dim())]
    if mask.shape[-2] != 1 or mask.shape[-1] not in _lengths(keys):
        fault = f"attn_mask is {tuple(mask.shape)} for {_lengths(keys)[0]} of {keys.seq_len} keys"
        refuse(queries, ValueError(f"{fault} of another sequence: it must be one row of these"))
    if mask.dtype == torch.bool and mask.shape[1] == 1:
        mask = mask if mask.shape[-1] == keys.local_seq_len else keys.shard(mask, -1)
        return {"key_padding_mask": ~mask[:, 0, 0].expand(batch, -1)}
    mask = mask if mask.shape[-1] == keys.seq_len else keys.unshard(mask, -1)
    return {"attn_mask" if mask.dtype == torch.bool else "attn_bias": mask}
