"""Logits and their cross-entropy in tiles of tokens: never more logits than those of a tile.

As in mini-sequence training (MsT, arXiv:2407.15892) and ALST (arXiv:2506.13996).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from usp.distributed.agreement import Facts
from usp.distributed.mesh import SequenceMesh
from usp.ops.derivatives import OnceDifferentiable, without_second_derivative
from usp.planning.kinds import device_type, integer, real, tensor
from usp.planning.shares import tile_bounds
from usp.sharding.loss import (
    check_target,
    mean_of_whole,
    refuse_in_transforms_together,
    with_others,
)

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def tiled_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    mesh: SequenceMesh | None = None,
    data_parallel_group: ProcessGroup | None = None,
    *,
    tiles: int | None = None,
    bias: Tensor | None = None,
    count: float | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
) -> Tensor:
    """``usp.cross_entropy`` of ``F.linear(hidden, weight, bias)``, whose logits are never there but
    for a tile of tokens.

    The forward keeps the log-sum-exp of each token, and the backward computes the logits of a tile
    again: one matrix product more than with gradients made in the forward, but what comes from
    above (a loss scale) is in each product, nothing as large as ``weight`` waits for the backward,
    and a loss without gradients costs none. Losses and their sums are in fp32 (fp64 for fp64); the
    gradients of ``weight`` and ``bias`` are summed over tiles in fp32 and rounded once. Under
    autocast products are in its dtype.

    Value, gradient, ranks and data ranks are those of ``usp.cross_entropy``: the mean over the
    valid tokens of all ranks, with the gradient of this rank's part.

    Args:
        hidden: (..., local tokens, channels).
        weight: (classes, channels); may be that of the embedding, too.
        labels: (..., local tokens) int64, shifted before the sequence was cut (``usp.cut_batch``).
        mesh, data_parallel_group, count, ignore_index, label_smoothing: As ``usp.cross_entropy``.
        tiles: How many, of as even lengths as they come, at most one a token; each rank may have
            its own number. None: a tile of logits has about as many elements as ``hidden``.
        bias: (classes,).
        z_loss: This times the square of a token's log-sum-exp is added to its loss.
        softcap: Logits are ``softcap * tanh(logits / softcap)``.

    Returns:
        () in fp32, fp64 for fp64, once differentiable. 0 where no label of all ranks is valid.

    Raises:
        TypeError: an argument is of another kind.
        ValueError: shapes or dtypes do not fit; says both.
        RuntimeError: a label is no class; says both, on a mesh of CPUs on every rank.
        NotImplementedError: it is called inside of a transform of torch.func.
    """
    options: dict[str, Any] = {
        "label_smoothing": label_smoothing,
        "z_loss": z_loss,
        "softcap": softcap,
    }

    refuse_in_transforms_together(mesh, "usp.tiled_cross_entropy")

    def compute() -> tuple[Facts, tuple[Tensor, Tensor]]:
        _check(hidden, weight, labels, bias)
        _check_options(**options)
        how = _How(
            _tiles(hidden, weight, tiles), _dtype(hidden), ignore_index, float(label_smoothing),
            float(z_loss), softcap,
        )  # fmt: skip
        apply = torch.compiler.disable(_apply) if torch.compiler.is_compiling() else _apply
        found = apply(how, hidden, weight, bias, labels), (labels != ignore_index).sum()
        same = {"count": count, "ignore_index": ignore_index, **options}
        same |= {"device type": device_type(hidden), "dtype of hidden": hidden.dtype}
        return {"classes": len(weight), **same}, found

    mine, valid = with_others(mesh, data_parallel_group, "usp.tiled_cross_entropy", compute)
    return mean_of_whole(mine, valid, mesh, data_parallel_group, count)


def _tiles(hidden: Tensor, weight: Tensor, tiles: int | None) -> tuple[tuple[int, int], ...]:
    """Start and length of each."""
    if tiles is None:
        tiles = -(-len(weight) // max(1, hidden.shape[-1]))
    return tile_bounds(hidden.shape[-2], integer("tiles", tiles, least=1))


def _dtype(hidden: Tensor) -> torch.dtype:
    """Of matrix products."""
    kind = hidden.device.type
    if torch.is_autocast_enabled(kind) and hidden.dtype != torch.float64:
        return torch.get_autocast_dtype(kind)
    return hidden.dtype


def _check(hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None) -> None:
    tensor("hidden", hidden)
    if hasattr(weight, "to_local"):
        raise ValueError(
            "weight is a DTensor, cut over ranks: compute the loss where it is gathered, in the "
            "forward of the module that fully_shard was called on and that holds it"
        )
    tensor("weight", weight)
    check_target("labels", labels)
    if hidden.dim() < 2 or labels.shape != hidden.shape[:-1]:
        raise ValueError(
            f"hidden is {tuple(hidden.shape)}, (..., tokens, channels), and labels "
            f"{tuple(labels.shape)}: there must be one for each token"
        )
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"weight is {tuple(weight.shape)}, (classes, channels), and hidden "
            f"{tuple(hidden.shape)} has {hidden.shape[-1]} channels"
        )
    if bias is not None and tensor("bias", bias).shape != weight.shape[:1]:
        raise ValueError(f"bias is {tuple(bias.shape)} for {len(weight)} classes")
    for name, x in (("weight", weight), ("bias", bias)):
        if x is None or torch.is_autocast_enabled(hidden.device.type):
            continue
        if x.dtype != hidden.dtype:
            raise ValueError(
                f"{name} is {x.dtype} and hidden {hidden.dtype}: convert one, or use autocast"
            )


def _check_options(label_smoothing: float, z_loss: float, softcap: float | None) -> None:
    if not 0 <= real("label_smoothing", label_smoothing) <= 1:
        raise ValueError(f"label_smoothing must be between 0 and 1, got {label_smoothing}")
    if real("z_loss", z_loss) < 0:
        raise ValueError(f"z_loss must be 0 or more, got {z_loss}")
    if softcap is not None and real("softcap", softcap) <= 0:
        raise ValueError(f"softcap must be more than 0, got {softcap}")


@dataclass(frozen=True)
class _How:
    """What the loss of a tile is made by.

    Attributes:
        tiles: Start and length of each.
        dtype: Of matrix products.
    """

    tiles: tuple[tuple[int, int], ...]
    dtype: torch.dtype
    ignore_index: int
    smoothing: float
    z_loss: float
    softcap: float | None

    @property
    def accurate(self) -> torch.dtype:
        return torch.promote_types(self.dtype, torch.float32)

    def head(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """As products take them."""
        return weight.to(self.dtype), None if bias is None else bias.to(self.dtype)

    def rows(self, hidden: Tensor, tile: tuple[int, int]) -> Tensor:
        """(..., tokens, channels) -> (n, channels) of a tile."""
        return hidden.narrow(-2, *tile).flatten(0, -2).to(self.dtype)

    def logits(self, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """(n, channels) -> (n, classes), to be written to."""
        z = F.linear(hidden, weight, bias).to(self.accurate)
        return z if self.softcap is None else z.div_(self.softcap).tanh_().mul_(self.softcap)

    def losses(self, z: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Loss and log-sum-exp of each row, (n,) both; ``z`` is written to."""
        valid = labels != self.ignore_index
        wanted = z.gather(1, labels.where(valid, 0)[:, None])[:, 0]
        if self.smoothing:
            wanted = (1 - self.smoothing) * wanted + self.smoothing * z.mean(1)
        largest = z.amax(1, keepdim=True)
        lse = z.sub_(largest).exp_().sum(1).log_().add_(largest[:, 0])
        each = lse - wanted + self.z_loss * lse.square()
        return each.where(valid, 0), lse

    def gradient(self, z: Tensor, lse: Tensor, labels: Tensor, grad: Tensor) -> Tensor:
        """Of the logits before they are capped: (n, classes) in the dtype of products; ``z`` is
        written to."""
        valid = labels != self.ignore_index
        capped = None if self.softcap is None else z / self.softcap
        z.sub_(lse[:, None]).exp_()
        if self.z_loss:
            z.mul_((1 + 2 * self.z_loss * lse)[:, None])
        if self.smoothing:
            z.sub_(self.smoothing / z.shape[1])
        wanted = labels.where(valid, 0)[:, None]
        z.scatter_add_(1, wanted, z.new_full((), self.smoothing - 1).expand(wanted.shape))
        z.mul_(grad.where(valid, 0)[:, None])
        if capped is not None:
            z.mul_(capped.square_().neg_().add_(1))
        return z.to(self.dtype)


def _apply(how: _How, *tensors: Tensor | None) -> Tensor:
    return cast(Tensor, _InTiles.apply(how, *tensors))


class _InTiles(OnceDifferentiable):
    """The sum of the losses of this rank's tokens."""

    of = "usp.tiled_cross_entropy"

    @staticmethod
    def forward(
        ctx: Any, how: _How, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor
    ) -> Tensor:
        total = torch.zeros((), dtype=torch.float64, device=hidden.device)
        lse = torch.empty(labels.shape, dtype=how.accurate, device=hidden.device)
        with torch.autocast(hidden.device.type, enabled=False):
            head = how.head(weight, bias)
            for tile in how.tiles:
                x, wanted = how.rows(hidden, tile), _of(labels, tile).flatten()
                each, of_row = how.losses(how.logits(x, *head), wanted)
                total += each.sum(dtype=total.dtype)
                _of(lse, tile).copy_(of_row.view(_of(lse, tile).shape))
        ctx.how = how
        ctx.save_for_backward(hidden, weight, bias, labels, lse)
        return total.to(how.accurate)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        tensors = ctx.saved_tensors
        with torch.no_grad():
            found = _gradients(ctx.how, tensors, ctx.needs_input_grad[1:4], grad)
        return None, *without_second_derivative(found, (grad, *tensors[:3]), _InTiles.of), None


def _gradients(
    how: _How, saved: Sequence[Any], needed: Sequence[bool], grad: Tensor
) -> list[Tensor | None]:
    """Of hidden, weight and bias."""
    hidden, weight, bias, labels, lse = saved
    of_hidden = torch.empty_like(hidden) if needed[0] else None
    of_weight, of_bias = (
        torch.zeros(x.shape, dtype=how.accurate, device=x.device) if need else None
        for x, need in zip((weight, bias), needed[1:], strict=True)
    )
    with torch.autocast(hidden.device.type, enabled=False):
        head = how.head(weight, bias)
        for tile in how.tiles:
            x, wanted = how.rows(hidden, tile), _of(labels, tile).flatten()
            part = how.gradient(how.logits(x, *head), _of(lse, tile).flatten(), wanted, grad)
            if of_hidden is not None:
                where = of_hidden.narrow(-2, *tile)
                where.copy_((part @ head[0]).view(where.shape))
            if of_weight is not None:
                _add_product(of_weight, part, x)
            if of_bias is not None:
                of_bias += part.sum(0, dtype=how.accurate)
            del part  # or two tiles would be there at a time
    of_head = zip((of_weight, of_bias), (weight, bias), strict=True)
    return [of_hidden, *(None if total is None else total.to(x.dtype) for total, x in of_head)]


def _of(x: Tensor, tile: tuple[int, int]) -> Tensor:
    return x.narrow(-1, *tile)


def _add_product(total: Tensor, part: Tensor, x: Tensor) -> None:
    """``total += part.T @ x``, without another of its size where dtypes allow."""
    if total.dtype == part.dtype:
        total.addmm_(part.T, x)
    else:
        total += part.T @ x
