"""Tensors into one flat message and back, byte by byte, with no padding between them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from usp import kernels
from usp.machine.apart import begin
from usp.ops import native
from usp.ops.tried import may_run

Pieces = tuple[list[Tensor], list[Tensor]]


class Packer(NamedTuple):
    """One way to copy tensors there and back: whether it takes them, and the two calls."""

    takes: Callable[[Sequence[Tensor], Tensor], bool]
    pack: Callable[[Sequence[Tensor], Tensor], None]
    unpack: Callable[[Tensor, Sequence[Tensor]], None]


def pack(tensors: Sequence[Tensor], message: Tensor | None = None) -> Tensor:
    """Copy the tensors one behind the other into one message.

    Args:
        tensors: At least one, of any shapes, strides and dtypes, on one device.
        message: Flat uint8 of just their bytes, written over; by default a new one.

    Returns:
        The message.
    """
    if message is None:
        size = sum(tensor.nbytes for tensor in tensors)
        message = torch.empty(size, dtype=torch.uint8, device=tensors[0].device)
    _first(tensors, message).pack(tensors, message)
    return message


def unpack(message: Tensor, tensors: Sequence[Tensor]) -> None:
    """Copy a message to the tensors, the way back.

    Args:
        message: As ``pack`` makes it of tensors of these shapes and dtypes.
        tensors: Written over; of any strides, on the device of the message.
    """
    _first(tensors, message).unpack(message, tensors)


def read(part: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """The part of a message that is one tensor: a view, or where it lies askew a copy.

    Args:
        part: Flat uint8. Only at a multiple of its size can a dtype be viewed.
    """
    if part.storage_offset() % dtype.itemsize:
        part = part.clone()
    return part.view(dtype).view(tuple(shape))


def _first(tensors: Sequence[Tensor], message: Tensor) -> Packer:
    return next(
        packer
        for name, packer in PACKERS.items()
        if packer.takes(tensors, message)
        and (name == "torch" or may_run("packing", name, check, message.device))
    )


def _parts(message: Tensor, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return message.split([tensor.nbytes for tensor in tensors])


def _triton_takes(tensors: Sequence[Tensor], message: Tensor) -> bool:
    if not all(1 <= tensor.dim() <= 4 for tensor in tensors) or not kernels.can_take(*tensors):
        return False
    parts = zip(_parts(message, tensors), tensors, strict=True)
    return not any(part.storage_offset() % tensor.dtype.itemsize for part, tensor in parts)


def _launches(message: Tensor, tensors: Sequence[Tensor]) -> Iterator[Pieces]:
    """The tensors, with four dims each, and their places in the message: those of one launch.

    Pieces of one tensor are: they lie as far apart in every call, and a table of them is kept.
    """
    groups: dict[tuple[int, torch.dtype, int], Pieces] = {}
    for part, tensor in zip(_parts(message, tensors), tensors, strict=True):
        key = tensor.untyped_storage().data_ptr(), tensor.dtype, tensor.shape[-1]
        more_dims = (None,) * (4 - tensor.dim())
        pieces, places = groups.setdefault(key, ([], []))
        pieces.append(tensor[more_dims])
        places.append(read(part, tensor.shape, tensor.dtype)[more_dims])
    yield from groups.values()


def _triton_pack(tensors: Sequence[Tensor], message: Tensor) -> None:
    from usp.kernels.pack import copy_pieces

    with kernels.launch_guard(message):
        for pieces, places in _launches(message, tensors):
            copy_pieces(pieces, places)


def _triton_unpack(message: Tensor, tensors: Sequence[Tensor]) -> None:
    from usp.kernels.pack import copy_pieces

    with kernels.launch_guard(message):
        for pieces, places in _launches(message, tensors):
            copy_pieces(places, pieces)


def _native_takes(tensors: Sequence[Tensor], message: Tensor) -> bool:
    there = native.is_there("pack", message.device.type)
    return there and all(tensor.dim() <= 4 for tensor in tensors)


def _native_pack(tensors: Sequence[Tensor], message: Tensor) -> None:
    torch.ops.usp.pack(list(tensors), message)


def _native_unpack(message: Tensor, tensors: Sequence[Tensor]) -> None:
    torch.ops.usp.unpack(message, list(tensors))


def _torch_pack(tensors: Sequence[Tensor], message: Tensor) -> None:
    for part, tensor in zip(_parts(message, tensors), tensors, strict=True):
        if part.storage_offset() % tensor.dtype.itemsize:
            # contiguous() would leave the odd stride of a dim of size 1, which no view takes
            flat = tensor.flatten().clone(memory_format=torch.contiguous_format)
            part.copy_(flat.view(torch.uint8))
        else:
            part.view(tensor.dtype).view(tensor.shape).copy_(tensor)


def _torch_unpack(message: Tensor, tensors: Sequence[Tensor]) -> None:
    for part, tensor in zip(_parts(message, tensors), tensors, strict=True):
        tensor.copy_(read(part, tensor.shape, tensor.dtype))


def check(told: list[str]) -> str | None:
    """What is wrong with the packer of a name on a device, or None.

    Args:
        told: ``[name, device]``.
    """
    packer, device = PACKERS[told[0]], torch.device(told[1])
    begin(device)
    for dtype in (torch.bfloat16, torch.float32, torch.uint8):
        whole = torch.arange(2 * 37 * 6 * 40, device="cpu").view(2, 37, 6, 40).to(dtype)
        tensors = [whole[:, :, :2], whole[:, 3:30, 2:5], whole[:1, :, 5:]]
        wanted = torch.cat([x.contiguous().view(torch.uint8).flatten() for x in tensors])
        there = whole.to(device)
        given = [there[:, :, :2], there[:, 3:30, 2:5], there[:1, :, 5:]]
        message = torch.zeros_like(wanted, device=device)
        if not packer.takes(given, message):
            continue
        packer.pack(given, message)
        if not torch.equal(message.cpu(), wanted):
            return f"a message of {dtype} is wrong"
        back = [torch.zeros_like(x) for x in given]
        packer.unpack(wanted.to(device), back)
        if not all(map(torch.equal, (x.cpu() for x in back), tensors)):
            return f"what comes out of a message of {dtype} is wrong"
    return None


# The first that takes the tensors and is right copies them. The order is a guess, that of
# ``backends.TABLE``: no committed result compares them.
PACKERS = {
    "triton": Packer(_triton_takes, _triton_pack, _triton_unpack),
    "native": Packer(_native_takes, _native_pack, _native_unpack),
    "torch": Packer(lambda *_: True, _torch_pack, _torch_unpack),
}
