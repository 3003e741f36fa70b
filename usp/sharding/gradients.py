"""The gradient rule of sequence parallelism, in one helper.

The loss of the whole is the SUM over sequence ranks of each rank's loss. So each rank's parameter
gradients are partial sums: sequence ranks add, data ranks average. Rows that each rank holds for
itself (of a table of positions, cut like the sequence) have whole gradients: data ranks average.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from usp.distributed import comm
from usp.distributed.agreement import Facts, check_on_all_ranks, digest
from usp.distributed.comm import Axis
from usp.distributed.mesh import SequenceMesh, check_mesh

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["all_reduce_gradients"]

# Elements of one flat message: long enough to fill a link, short beside the model's own memory.
_BUCKET_ELEMENTS = 8 * 2**20


def all_reduce_gradients(
    module_or_parameters: nn.Module | Iterable[nn.Parameter],
    mesh: SequenceMesh | None,
    data_parallel_group: ProcessGroup | None = None,
    *,
    accumulate_in_fp32: bool = True,
    by_position: nn.Module | Iterable[nn.Parameter] = (),
) -> None:
    """Make ``.grad`` of every parameter the gradient of the whole loss, on every rank.

    Adds gradients over the sequence ranks of ``mesh`` and averages over ``data_parallel_group``.
    Call it once per optimizer step, after the last backward of gradient accumulation and before
    gradients are clipped: it is linear, and a second call would add twice. Not beside DDP or
    FSDP over the same ranks, which reduce gradients themselves: see ``docs/training.md``.

    A parameter that some ranks did not use counts as zeros there and gets its gradient
    everywhere; one that no rank used keeps ``grad=None``.

    With a ``GradScaler`` call it before ``scaler.unscale_(optimizer)``, or before ``scaler.step``
    where nothing unscales: a scaler looks for inf and nan in its own rank's gradients, and only
    once they are summed do all ranks see the same, and skip the same steps.

    The ranks of the mesh meet first (48 bytes along each axis): where they are at different
    places of the program or hold different parameters, each of them raises.

    Args:
        module_or_parameters: What to reduce: the same parameters in the same order on every rank.
            Those without ``requires_grad`` are left out. ``DTensor`` gradients are reduced by
            their local shards, which must be cut alike on all ranks that take part here.
        mesh: The sequence ranks; None is one device.
        data_parallel_group: Ranks that hold the same part of other samples.
        accumulate_in_fp32: Add fp16 and bf16 gradients in fp32 and round once at the end, for
            twice the bytes; otherwise in their own dtype.
        by_position: Those of them that are indexed by position and of which each rank of the mesh
            holds the rows of its own tokens (``usp.shard_sequence(table, mesh, 0)``): they are
            averaged over ``data_parallel_group`` alone, whose ranks hold the same rows. This is
            the double gradient averaging of the LSS Transformer (arXiv:2311.02382). Where one rank
            has found inf or nan in its rows, the rows of all ranks become nan, so that a
            ``GradScaler`` skips the step on all.

    Raises:
        ValueError: parameters differ between the ranks of the mesh, or a rank is still in a
            backward; says both. Or one of ``by_position`` is none of those to reduce.
    """

    def check() -> tuple[list[nn.Parameter], list[nn.Parameter], list[Axis]]:
        parameters, own = _parameters(module_or_parameters), _parameters(by_position)
        if strange := [tuple(p.shape) for p in own if not any(p is q for q in parameters)]:
            raise ValueError(
                f"by_position holds parameters {strange} that are not among the {len(parameters)} "
                "to reduce"
            )
        rest = [p for p in parameters if not any(p is q for q in own)]
        return rest, own, _axes(None, data_parallel_group)

    def facts(found: tuple[list[nn.Parameter], list[nn.Parameter], list[Axis]]) -> Facts:
        return _facts(*found) | {"accumulate_in_fp32": accumulate_in_fp32}

    check_mesh(mesh)
    if mesh is not None and mesh.size > 1:
        (rest, own, data), _ = check_on_all_ranks(mesh, "all_reduce_gradients", check, facts)
    else:
        rest, own, data = check()
    axes = _axes(mesh, None) + data
    if not axes:
        return
    replicas = data[0].size if data else 1
    with torch.no_grad():
        for bucket in _buckets(rest):
            _reduce(bucket, axes, replicas, accumulate_in_fp32)
        for bucket in _buckets(own) if data else ():
            _reduce(bucket, data, replicas, accumulate_in_fp32)
        if own:
            _spoil_alike(own, _axes(mesh, None))


def _axes(mesh: SequenceMesh | None, data_parallel_group: ProcessGroup | None) -> list[Axis]:
    axes = [] if mesh is None else [mesh.ulysses, mesh.ring]
    if data_parallel_group is not None:
        ranks = comm.group_ranks(data_parallel_group)
        axes.append(Axis(len(ranks), ranks.index(comm.global_rank()), data_parallel_group))
    return [axis for axis in axes if axis.size > 1]


def _parameters(module_or_parameters: nn.Module | Iterable[nn.Parameter]) -> list[nn.Parameter]:
    """Trained parameters, each once."""
    if isinstance(module_or_parameters, nn.Module):
        module_or_parameters = module_or_parameters.parameters()
    return [p for p in dict.fromkeys(module_or_parameters) if p.requires_grad]


def _facts(parameters: list[nn.Parameter], own: list[nn.Parameter], data: list[Axis]) -> Facts:
    shapes = [(tuple(_local(p).shape), p.dtype) for p in parameters]
    return {
        "number of parameters": len(parameters),
        "number of their elements": sum(_local(p).numel() for p in parameters),
        "shapes and dtypes of the parameters (a digest)": digest(repr(shapes)),
        "device types of the parameters": {p.device.type for p in parameters},
        "number of parameters by position": len(own),
        "ranks of data_parallel_group": [axis.size for axis in data],
    }


def _buckets(parameters: list[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Runs of parameters of one dtype and device, cut by size; the same cuts on every rank."""
    kinds: dict[tuple[torch.dtype, torch.device], list[nn.Parameter]] = {}
    for parameter in parameters:
        kinds.setdefault((parameter.dtype, parameter.device), []).append(parameter)
    for same_kind in kinds.values():
        bucket: list[nn.Parameter] = []
        elements = 0
        for parameter in same_kind:
            size = _local(parameter).numel()
            if bucket and elements + size > _BUCKET_ELEMENTS:
                yield bucket
                bucket, elements = [], 0
            bucket.append(parameter)
            elements += size
        yield bucket


def _reduce(bucket: list[nn.Parameter], axes: list[Axis], replicas: int, fp32: bool) -> None:
    """One flat message: how many ranks have a gradient, parameter by parameter, then gradients."""
    dtype = bucket[0].dtype
    if fp32:
        dtype = torch.promote_types(dtype, torch.float32)
    sizes = [_local(parameter).numel() for parameter in bucket]
    message = torch.zeros(len(bucket) + sum(sizes), dtype=dtype, device=bucket[0].device)
    users, flat = message.split((len(bucket), sum(sizes)))
    parts = flat.split(sizes)
    used_here = [parameter.grad is not None for parameter in bucket]
    users.copy_(torch.tensor(used_here, device="cpu"))
    for part, parameter in zip(parts, bucket, strict=True):
        if parameter.grad is not None:
            part.copy_(_local(parameter.grad).flatten())
    for axis in axes:
        axis.all_reduce(message)
    flat.div_(replicas)
    for part, parameter, used in zip(parts, bucket, users.tolist(), strict=True):
        if used:
            _write(parameter, part)


def _spoil_alike(own: list[nn.Parameter], axes: list[Axis]) -> None:
    """Let inf and nan in the rows of one rank be seen on all, as they are in sums."""
    grads = [_local(p.grad) for p in own if p.grad is not None]
    spoiled = torch.zeros((), device=own[0].device)
    for grad in grads:
        spoiled += (grad * 0).sum()  # 0, and nan where one is not finite
    for axis in axes:
        axis.all_reduce(spoiled)
    for grad in grads:
        grad += spoiled.to(grad.dtype)


def _write(parameter: nn.Parameter, total: Tensor) -> None:
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    elif parameter.grad.is_sparse:
        parameter.grad = parameter.grad.to_dense()
    local = _local(parameter.grad)
    local.copy_(total.view_as(local))


def _local(tensor: Tensor) -> Tensor:
    """This rank's part of a ``DTensor``; any other tensor itself, dense."""
    to_local = getattr(tensor, "to_local", None)
    if to_local is not None:
        return to_local()
    return tensor.to_dense() if tensor.is_sparse else tensor
