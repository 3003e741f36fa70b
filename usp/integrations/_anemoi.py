"""The attention of anemoi's models, by either of its implementations that know windows."""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor, nn

from usp.integrations._answer import among
from usp.integrations._region import current_region

_BY_TORCH, _BY_FLASH = "scaled_dot_product_attention", "flash_attention"


def of_grid(attention: Any) -> dict[str, Any]:
    """What stands in the place of its ``attention``: by torch it would make a square of this rank's
    points for a window, and flash-attn's kernel sees no others.

    Raises:
        NotImplementedError: its implementation is another, or one that turns what it is given.
    """
    how = attention.attention_implementation
    if how == _BY_FLASH:
        if attention.attention.use_rotary_embeddings:
            raise NotImplementedError(
                f"anemoi's {type(attention).__name__} has use_rotary_embeddings, which count from "
                "0 on every rank"
            )
        return {"attention": OfAll()}
    if attention.window_size is None:
        return {}
    if how != _BY_TORCH:
        raise NotImplementedError(
            f"anemoi's {type(attention).__name__} has window_size={attention.window_size} by "
            f"{how!r}, among this rank's own tokens: {_BY_TORCH!r} and {_BY_FLASH!r} are known"
        )
    return {"attention": OfAll()}


class OfAll(nn.Module):
    """Among the points of all ranks; no mask in memory."""

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        batch_size: int,
        causal: bool = False,
        window_size: int | tuple[int, int] | None = None,
        dropout_p: float = 0.0,
        softcap: float | None = None,
        alibi_slopes: Tensor | None = None,
    ) -> Tensor:
        """(batch, heads, points, head dim), as theirs."""
        region = current_region()
        assert region is not None  # the attribute is there while one is entered
        region.count()
        options: dict[str, Any] = {"dropout_p": dropout_p, "causal": causal, **region.pieces}
        options["softcap"] = softcap or None
        if window_size is not None:
            sides = (window_size, window_size) if isinstance(window_size, int) else window_size
            options["window_size"] = tuple(None if n == -1 else n for n in sides)
        if alibi_slopes is not None:
            options["alibi_slopes"] = alibi_slopes.to(query)
        out = among(region.tokens, query, key, value, False, **options)
        return cast(Tensor, out).transpose(1, 2)
