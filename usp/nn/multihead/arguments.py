"""What a call of ``nn.MultiheadAttention`` may bring along, checked once.

Shape letters: N batch, L local queries, S local keys, H heads, E embedding.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from usp.attention import levels
from usp.distributed.agreement import Facts
from usp.planning.kinds import device_type, tensor
from usp.planning.problem import state_dtype


class ArgumentError(ValueError, AssertionError):
    """A ``ValueError``, as everywhere here, and what torch's module raises in its place."""


@dataclass
class Arguments:
    """The arguments of ``MultiheadAttention.forward``; see there.

    Attributes:
        batch_first: Order of the dims of batched inputs.
        sizes: Embedding sizes that query, key and value must have.
        num_heads: H.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    key_padding_mask: Tensor | None
    attn_mask: Tensor | None
    need_weights: bool
    is_causal: bool
    batch_first: bool
    sizes: tuple[int, int, int]
    num_heads: int

    @property
    def is_one(self) -> bool:
        """Whether query, key and value are one tensor, and may be."""
        queries, keys, values = self.sizes
        return self.key is self.query and self.value is self.query and queries == keys == values

    @property
    def named_inputs(self) -> tuple[tuple[str, Tensor], ...]:
        """Each tensor once."""
        if self.is_one:
            return (("query", self.query),)
        return ("query", self.query), ("key", self.key), ("value", self.value)

    @property
    def is_batched(self) -> bool:
        return self.query.dim() == 3

    @property
    def trusts_hint(self) -> bool:
        """Whether ``is_causal`` decides and not ``attn_mask``, which is when it does in torch."""
        return self.is_causal and self.key_padding_mask is None and not self.need_weights

    @property
    def needs_lengths(self) -> bool:
        """Whether more than attention itself depends on the length of the whole."""
        padding = self.key_padding_mask
        return self.need_weights or (padding is not None and padding.dtype != torch.bool)

    @property
    def token_dim(self) -> int:
        """Of the inputs."""
        return 1 if self.is_batched and self.batch_first else 0

    @property
    def tokens(self) -> tuple[int, int]:
        """Local queries and keys."""
        return self.query.shape[self.token_dim], self.key.shape[self.token_dim]

    def check(self, key_len: int | None) -> None:
        """Everything that one rank can check by itself.

        Args:
            key_len: Keys of the whole sequence; None where they are not known yet.

        Raises:
            ArgumentError: shapes or dtypes do not fit; names both sides.
            RuntimeError: ``is_causal`` without ``attn_mask``, as torch.
            NotImplementedError: a NestedTensor.
        """
        self.check_inputs()
        self.check_masks(key_len)

    def check_masks(self, key_len: int | None) -> None:
        """All but query, key and value; see ``check``."""
        if self.is_causal and self.attn_mask is None:
            raise RuntimeError(
                "is_causal is a hint about attn_mask and needs one. For sequences too long for a "
                "mask build the module with causal=True, which takes no memory"
            )
        if self.key_padding_mask is not None:
            self._check_mask("key_padding_mask", self.key_padding_mask, self._padding_shapes())
        if self.attn_mask is not None:
            keys = tensor("attn_mask", self.attn_mask).shape[-1] if key_len is None else key_len
            self._check_mask("attn_mask", self.attn_mask, self._mask_shapes(keys))

    def check_inputs(self) -> None:
        """Query, key and value alone; see ``check``."""
        inputs = self.named_inputs
        for name, x in inputs:
            if isinstance(x, Tensor) and x.is_nested:
                raise NotImplementedError(
                    f"{name} is a NestedTensor; pass a padded one with key_padding_mask (an "
                    "nn.TransformerEncoder makes them in evaluation: build it with "
                    "enable_nested_tensor=False, or set use_nested_tensor to False, which "
                    "usp.replace_attention does)"
                )
            tensor(name, x)
        for (name, x), size in zip(inputs, self.sizes, strict=False):
            if x.dim() not in (2, 3) or x.dim() != self.query.dim():
                raise self._wrong_dims(name, x)
            if x.shape[-1] != size:
                raise ArgumentError(f"{name} must have {size} features, got {x.shape[-1]}")
            if _batch(x, self.batch_first) != _batch(self.query, self.batch_first):
                raise ArgumentError(
                    f"batch sizes differ: query has {_batch(self.query, self.batch_first)}, "
                    f"{name} has {_batch(x, self.batch_first)}"
                )
        if self.key is not self.value and self.key.shape[:-1] != self.value.shape[:-1]:
            raise ArgumentError(
                f"key and value must have the same tokens: key is {tuple(self.key.shape)}, "
                f"value {tuple(self.value.shape)}"
            )

    def _wrong_dims(self, name: str, x: Tensor) -> ArgumentError:
        order = "(N, L, E)" if self.batch_first else "(L, N, E)"
        dims, key, value = self.query.dim(), self.key.dim(), self.value.dim()
        return ArgumentError(
            f"query, key and value must all be {order}, or all (L, E): query has {dims} dims, "
            f"{name} has {x.dim()} (expected `key` and `value` to be {dims}-D but found {key}-D "
            f"and {value}-D tensors respectively)"
        )

    def _padding_shapes(self) -> list[tuple[int, ...]]:
        batch, keys = _batch(self.key, self.batch_first), self.tokens[1]
        return [(batch, keys)] if self.is_batched else [(keys,)]

    def _mask_shapes(self, key_len: int) -> list[tuple[int, ...]]:
        shape = self.tokens[0], key_len
        return [shape, (_batch(self.query, self.batch_first) * self.num_heads, *shape)]

    def _check_mask(self, name: str, mask: Tensor, shapes: list[tuple[int, ...]]) -> None:
        tensor(name, mask)
        if mask.dtype != torch.bool and not mask.is_floating_point():
            raise ArgumentError(
                f"{name} must be bool (True = do not attend) or float: {mask.dtype}"
            )
        if mask.device != self.query.device:
            raise ArgumentError(f"{name} is on {mask.device}, query on {self.query.device}")
        if not any(mask.shape == shape for shape in shapes):
            wanted = " or ".join(map(str, shapes))
            raise ArgumentError(
                f"{name} must be {wanted}, got {tuple(mask.shape)} "
                f"({_as_torch_says(name, mask.dim(), shapes)}; on a mesh: this rank's queries "
                "against the keys of all ranks, this rank's keys for padding)"
            )

    def facts(self, lengths: tuple[int, int] | None) -> Facts:
        """What all ranks of a mesh must agree on, beyond what attention compares.

        Args:
            lengths: Queries and keys of the whole sequence where they were named.
        """
        told: Facts = {"need_weights": self.need_weights, "seq_len": "not given"}
        told["device type"] = device_type(self.query)
        if lengths is not None:
            told["seq_len"], told["keys of seq_len"] = lengths
        for name, mask in (
            ("key_padding_mask", self.key_padding_mask),
            ("attn_mask", self.attn_mask),
        ):
            told[name] = "None" if mask is None else f"{mask.dtype}, {mask.dim()} dims"
            if mask is not None and name == "attn_mask":
                told["keys of attn_mask"] = mask.shape[-1]
            told[f"gradient of {name}"] = mask is not None and mask.requires_grad
        return told

    def bias(self, dtype: torch.dtype) -> Tensor | None:
        """``attn_mask`` as (N|1, H|1, L, all keys), added to the scores."""
        mask = self.attn_mask
        if mask is None:
            return None
        mask = additive(mask, dtype)
        if mask.dim() == 2:
            return mask[None, None]
        return mask.unflatten(0, (len(mask) // self.num_heads, self.num_heads))

    def padding(self) -> Tensor | None:
        """``key_padding_mask`` as (N, S)."""
        mask = self.key_padding_mask
        return mask[None] if mask is not None and not self.is_batched else mask


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask that is added to scores: -inf where a bool one says True, or a float one hides."""
    if mask.dtype != torch.bool:
        return levels.hidden(mask).to(state_dtype(dtype))
    return torch.zeros_like(mask, dtype=state_dtype(dtype)).masked_fill_(mask, -torch.inf)


def _batch(x: Tensor, batch_first: bool) -> int:
    if x.dim() == 2:
        return 1
    return x.shape[0 if batch_first else 1]


def _as_torch_says(name: str, dims: int, shapes: list[tuple[int, ...]]) -> str:
    """The same in the words of torch, for who goes by them."""
    for shape in shapes:
        if len(shape) == dims:
            return f"Expected `{name}` shape to be {shape}"
    *first, last = ["`None`", *(f"{len(shape)}-D" for shape in shapes)]
    wanted = f"{', '.join(first)} or {last}"
    return f"expected `{name}` to be {wanted} but found {dims}-D tensor instead"
