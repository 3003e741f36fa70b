"""The mean over tokens whose labels are spread over ranks: the other half of the gradient rule."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from usp.distributed import comm
from usp.distributed.agreement import Facts, check_on_all_ranks, meets, refuse_together
from usp.distributed.comm import Axis, untraced
from usp.distributed.mesh import SequenceMesh, check_mesh
from usp.ops.derivatives import refuse_in_transforms
from usp.planning.kinds import device_type, tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Found = TypeVar("Found")


def cross_entropy(
    input: Tensor,
    target: Tensor,
    mesh: SequenceMesh | None,
    data_parallel_group: ProcessGroup | None = None,
    *,
    count: float | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
) -> Tensor:
    """``F.cross_entropy`` of the whole, for the tokens of this rank: the mean over all valid
    tokens of all ranks.

    Its value is the mean of the whole, the same on every rank of the mesh. Its gradient is that of
    this rank's tokens alone, so the rule holds as it stands: after ``backward`` sequence ranks add
    and data ranks average (``usp.all_reduce_gradients``), or a wrapper averages the gradients of
    ``loss * mesh.size``. A rank without a valid label has a gradient of zeros, and still runs its
    backward with the others.

    Every rank calls it. It sends one sum of losses and one count along each axis of the mesh.

    Args:
        input: (local tokens, classes) or (B, classes, local tokens, ...), as in torch: logits.
        target: (local tokens,) or (B, local tokens, ...) int64, shifted before the sequence was
            cut (``usp.cut_batch``).
        mesh: The ranks that share the sequence; None is one device.
        data_parallel_group: Ranks with other samples, over which gradients are averaged. With it
            every valid token of all samples counts the same; without it, each rank's samples have
            their own mean.
        count: By what the sum is divided in place of the valid labels: for batches that are
            accumulated, all of theirs. The same on every rank of the mesh.
        ignore_index, label_smoothing: As in torch.

    Returns:
        () in fp32, fp64 for fp64. 0 where no label of all ranks is valid, and torch has NaN.

    Raises:
        TypeError: ``input`` or ``target`` is no plain tensor.
        ValueError: ``target`` holds no class indices.
        IndexError, RuntimeError: what torch refuses, on a mesh of CPUs on every rank.
        NotImplementedError: it is called inside of a transform of torch.func, over several ranks.
    """

    def compute() -> tuple[Facts, tuple[Tensor, Tensor]]:
        tensor("input", input)
        check_target("target", target)
        dtype = torch.promote_types(input.dtype, torch.float32)
        smoothing, ignored = label_smoothing, ignore_index
        # not reduction="sum", which adds fp16 losses in fp16
        each = F.cross_entropy(
            input, target, ignore_index=ignored, label_smoothing=smoothing, reduction="none"
        )
        same = {"count": count, "ignore_index": ignored, "label_smoothing": smoothing}
        found = each.sum(dtype=dtype), (target != ignored).sum()
        return {"device type": device_type(input), "dtype of input": input.dtype, **same}, found

    if mesh is not None or data_parallel_group is not None:
        refuse_in_transforms_together(mesh, "usp.cross_entropy", " over several ranks")
    mine, valid = with_others(mesh, data_parallel_group, "usp.cross_entropy", compute)
    return mean_of_whole(mine, valid, mesh, data_parallel_group, count)


def check_target(name: str, target: Tensor) -> None:
    """Raises:
    TypeError: it is no plain tensor.
    ValueError: it holds no class indices.
    """
    tensor(name, target)
    if target.is_floating_point():
        raise ValueError(
            f"{name} is {target.dtype}, probabilities of classes: which of them count is not "
            "told by ignore_index; pass class indices (int64)"
        )


def with_others(
    mesh: SequenceMesh | None,
    group: ProcessGroup | None,
    name: str,
    compute: Callable[[], tuple[Facts, Found]],
) -> Found:
    """What this rank computes by itself; where the ranks meet they compare what it was given, and
    hear of what torch refuses (a label that is no class), too.

    Args:
        mesh, group: As ``cross_entropy`` has them.
        name: Of PLACES of ``usp.distributed.agreement``.
        compute: Returns what must be the same on all ranks, and what it found.
    """
    check_mesh(mesh)
    if mesh is None or not meets(mesh, None, False):
        return compute()[1]

    def facts(both: tuple[Facts, Found]) -> Facts:
        size = None if group is None else len(comm.group_ranks(group))
        return {"ranks of data_parallel_group": size} | both[0]

    (_, found), _ = check_on_all_ranks(mesh, name, compute, facts)
    return found


def refuse_in_transforms_together(mesh: SequenceMesh | None, name: str, where: str = "") -> None:
    """Refuse, on all ranks of the mesh, what runs outside of transforms of torch.func alone.

    Args:
        name: Of PLACES of ``usp.distributed.agreement``.
        where: In words, if it does so there alone.
    """
    if torch.compiler.is_compiling():
        return
    try:
        refuse_in_transforms(name + where)
    except NotImplementedError as refusal:
        refuse_together(mesh, name, None, refusal)
        raise


def mean_of_whole(
    mine: Tensor,
    valid: Tensor,
    mesh: SequenceMesh | None,
    group: ProcessGroup | None,
    count: float | None,
) -> Tensor:
    """The sum of all ranks' losses by the number of their labels, with this rank's gradient.

    Args:
        mine: (), the sum over this rank's tokens.
        valid: (), labels that count.
        mesh, group, count: As ``cross_entropy`` has them.
    """
    if mesh is None and group is None:
        divisor = (
            valid.to(mine.dtype) if count is None else valid.new_tensor(count, dtype=mine.dtype)
        )
        return mine / divisor.clamp(min=torch.finfo(mine.dtype).tiny)
    axes = [] if mesh is None else [mesh.ulysses, mesh.ring]
    total, divisor = untraced(_totals)(mine.detach(), valid, axes, group)
    if count is not None:
        divisor = divisor.new_tensor(count)
    divisor = divisor.clamp(min=torch.finfo(mine.dtype).tiny)
    return cast(Tensor, _Told.apply(mine / divisor, total / divisor))


def mean_count(valid: Tensor, group: ProcessGroup | None) -> Tensor:
    """Valid labels of a data rank, () of a floating dtype: the mean over ``group``."""
    if group is None:
        return valid
    ranks = comm.group_ranks(group)
    axis = Axis(len(ranks), ranks.index(comm.global_rank()), group)
    return axis.all_reduce(valid) / len(ranks)


def _totals(
    mine: Tensor, valid: Tensor, axes: list[Axis], group: ProcessGroup | None
) -> tuple[Tensor, Tensor]:
    """The sum of the losses of all sequence ranks, and by what it is divided."""
    # counts beyond 2^24 are no fp32 numbers
    message = torch.stack((mine.double(), valid.double()))
    for axis in axes:
        axis.all_reduce(message)
    total, count = message
    return total.to(mine.dtype), mean_count(count.clone(), group).to(mine.dtype)


class _Told(torch.autograd.Function):
    """What all ranks have together, with the gradient of this rank's part of it."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, whole: Tensor) -> Tensor:
        return whole.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None
