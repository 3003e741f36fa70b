"""Whoever can pack: the same bytes there and back, from and to any strides."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from move_ops import names
from pool import Pool
from torch import Tensor

from usp.ops import native
from usp.ops.pack import PACKERS, pack, unpack


def pieces() -> list[Tensor]:
    """Heads of q, k for two ranks, as a head exchange sends them, and a block with its mask."""
    generator = torch.Generator().manual_seed(2)
    q = torch.randn(2, 7, 6, 5, generator=generator).bfloat16()
    k = torch.randn(2, 4, 7, 5, generator=generator).transpose(1, 2)
    mask = torch.rand(2, 8, generator=generator) < 0.5
    heads = [part for r in (0, 1) for part in (q[:, :, 3 * r : 3 * r + 3], k[:, :, 2 * r :])]
    return [*heads, k[:, :0], torch.randn(3, 2, 4, generator=generator), mask]


def bytes_of(tensors: Sequence[Tensor]) -> Tensor:
    flat = [t.clone(memory_format=torch.contiguous_format).flatten() for t in tensors]
    return torch.cat([x.view(torch.uint8) for x in flat])


def there_and_back(name: str, tensors: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Here, or on a worker: the message, and longer tensors of which every second row is ours."""
    message = torch.empty(sum(t.nbytes for t in tensors), dtype=torch.uint8)
    assert PACKERS[name].takes(tensors, message)
    PACKERS[name].pack(tensors, message)
    wholes = [torch.zeros(t.shape[0], 2 * t.shape[1], *t.shape[2:], dtype=t.dtype) for t in tensors]
    if wholes[-1].dim() == 2:  # its last dim stays contiguous
        wholes[-1] = torch.zeros(2 * tensors[-1].shape[0], tensors[-1].shape[1]).bool()
    ours = [w[:, ::2] if w.dim() > 2 else w[::2] for w in wholes]
    PACKERS[name].unpack(message, ours)
    return message, wholes


@pytest.mark.parametrize("name", names(PACKERS))
def test_each_copies_the_same_bytes(name: str, request: pytest.FixtureRequest) -> None:
    tensors = pieces()
    if name == "triton":
        pool: Pool = request.getfixturevalue("interpreter")
        ((message, wholes),) = pool.run(there_and_back, name, tensors, ranks=1)
    elif name == "native" and native.load_error() is not None:
        pytest.skip(f"compiled ops: {native.load_error()}")
    else:
        message, wholes = there_and_back(name, tensors)
    assert torch.equal(message, bytes_of(tensors))
    for tensor, whole in zip(tensors, wholes, strict=True):
        ours, others = (
            (whole[:, start::2] if whole.dim() > 2 else whole[start::2]) for start in (0, 1)
        )
        assert torch.equal(ours, tensor)
        assert not others.any()


def declined() -> list[str]:
    """On a worker: what Triton does not take, among tensors that others do."""
    tensors = {
        "askew": [torch.zeros(3, dtype=torch.bool), torch.zeros(2, 3)],
        "not contiguous": [torch.zeros(2, 3).T],
        "five dims": [torch.zeros(1, 1, 1, 1, 2)],
        "no dim": [torch.tensor(1.0)],
        "taken": [torch.zeros(2, 3)],
    }
    found = []
    for name, items in tensors.items():
        message = torch.empty(sum(t.nbytes for t in items), dtype=torch.uint8)
        if not PACKERS["triton"].takes(items, message):
            found.append(name)
        outs = [torch.full_like(t, True) for t in items]
        unpack(pack(items), outs)
        assert all(torch.equal(out, t) for out, t in zip(outs, items, strict=True))
    return found


def test_what_triton_does_not_take_others_do(interpreter: Pool) -> None:
    (found,) = interpreter.run(declined, ranks=1)
    assert found == ["askew", "not contiguous", "five dims", "no dim"]
