"""``usp::pack``, ``usp::unpack``: strided tensors into one flat message and back, byte by byte."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from move_checks import assert_there_and_back, filled, message_of, random_bytes
from move_ops import SUBJECTS, implementation

from usp.ops import native as ops
from usp.ops.pack import pack, unpack

DTYPES = [torch.uint8, torch.bool, torch.bfloat16, torch.float16, torch.float32, torch.float64]
LARGEST_TASK = 1 << 18  # bytes that one task of a thread copies


@pytest.fixture(scope="module", params=SUBJECTS)
def kernels(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return implementation(request.param, tmp_path_factory.mktemp(request.param))


@given(st.data())
def test_any_tensors_of_four_dims(kernels: Any, data: st.DataObject) -> None:
    tensors = []
    for seed in range(data.draw(st.integers(1, 5), label="tensors")):
        dtype = data.draw(st.sampled_from(DTYPES), label="dtype")
        shape = data.draw(st.lists(st.integers(0, 5), min_size=0, max_size=4), label="shape")
        whole = filled([n + 2 for n in shape], dtype, seed)
        view = whole[tuple(slice(1, 1 + n) for n in shape)]
        order = data.draw(st.permutations(range(len(shape))), label="order")
        tensors.append(view.permute(order))
    assert_there_and_back(kernels, tensors)


@pytest.mark.parametrize("dtype", DTYPES)
def test_heads_of_each_rank(kernels: Any, dtype: torch.dtype) -> None:
    """What a head exchange sends: some heads of q, k and v for each of several ranks."""
    q, k = filled((2, 61, 12, 40), dtype, 1), filled((2, 61, 4, 40), dtype, 2)
    v = filled((2, 61, 4, 24), dtype, 3)
    tensors = [
        part
        for rank in range(4)
        for part in (q[:, :, 3 * rank : 3 * rank + 3], k[:, :, rank : rank + 1], v[:, :, rank:])
    ]
    assert_there_and_back(kernels, tensors)


def test_a_run_longer_than_a_task(kernels: Any) -> None:
    """Contiguous, in two runs, and cut in the middle of a run."""
    n = LARGEST_TASK + 37
    assert_there_and_back(kernels, [random_bytes(3 * n), random_bytes(3 * n).view(3, n)[:, 5:]])


@pytest.mark.parametrize("far", [0, 1, 2])
def test_bytes_past_2_to_the_31(kernels: Any, far: int) -> None:
    """Entries that lie 2^30 elements apart; only the pages that are used come into being."""
    gap, near = 2**30 + 16, filled((3, 3, 3, 5), torch.bfloat16, 4)
    strides = [15, 45, 5, 1]
    strides[far] = gap
    memories = [torch.empty(2 * gap + 256, dtype=near.dtype) for _ in range(2)]
    there, back = (memory.as_strided(near.shape, strides) for memory in memories)
    there.view(torch.int16).copy_(near.view(torch.int16))
    message = torch.empty(near.numel() * 2, dtype=torch.uint8)
    kernels.pack([there], message)
    assert torch.equal(message, message_of([near]))
    kernels.unpack(message, [back])
    assert torch.equal(back.view(torch.int16), near.view(torch.int16))


def test_a_message_that_starts_askew(kernels: Any) -> None:
    tensors = [filled((3, 5), torch.float64)]
    whole = torch.full((128,), 7, dtype=torch.uint8)
    kernels.pack(tensors, whole[3:123])
    assert torch.equal(whole[3:123], message_of(tensors))
    assert (whole[:3] == 7).all()
    assert (whole[123:] == 7).all()


def test_five_dims_that_can_be_joined_and_that_cannot(kernels: Any) -> None:
    whole = filled((2, 3, 4, 5, 6), torch.float32)
    assert_there_and_back(kernels, [whole, whole[:, :, :, :, :5], whole[:, 1:, :, 1:, :5]])
    with pytest.raises(RuntimeError, match=r"5 dims has 5 that cannot be joined.*contiguous"):
        kernels.pack(
            [whole.permute(4, 2, 0, 3, 1)], torch.empty(whole.numel() * 4, dtype=torch.uint8)
        )


def test_refusals(kernels: Any) -> None:
    x = torch.zeros(3, 4)
    with pytest.raises(RuntimeError, match="the message has 47 bytes, its tensors 48"):
        kernels.pack([x], torch.empty(47, dtype=torch.uint8))
    with pytest.raises(RuntimeError, match="the message has 48 bytes, its tensors 96"):
        kernels.unpack(torch.empty(48, dtype=torch.uint8), [x, x])
    for message in (torch.empty(48), torch.empty(96, dtype=torch.uint8)[::2]):
        with pytest.raises(RuntimeError, match="message is not a flat contiguous uint8 tensor"):
            kernels.pack([x], message)


def test_more_tensors_than_one_launch_takes(kernels: Any) -> None:
    assert_there_and_back(kernels, [filled((n, 3, 5), torch.bfloat16, n) for n in range(1, 70)])


@pytest.mark.parametrize("compiled", [True, False])
def test_parcels_are_packed_alike_with_and_without_it(
    compiled: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    implementation("cpu", tmp_path)
    tensors = [
        filled((2, 7, 6, 5), torch.bfloat16, 1)[:, :, 2:5],
        filled((3, 1), torch.uint8, 2),  # what follows lies askew
        filled((2, 7, 1, 4), torch.float32, 3).transpose(1, 2),
    ]
    assert ops.is_there("pack", "cpu")
    if not compiled:
        monkeypatch.setattr(ops, "is_there", lambda name, device_type: False)
    message = pack(tensors)
    assert torch.equal(message, message_of(tensors))
    outs = [torch.empty_like(t.transpose(0, -1)).transpose(0, -1) for t in tensors]
    unpack(message, outs)
    assert torch.equal(message_of(outs), message)


def test_a_tensor_of_five_dims_is_left_to_torch() -> None:
    five = filled((2, 3, 2, 3, 2), torch.float32).permute(4, 2, 0, 3, 1)
    assert torch.equal(pack([five]), message_of([five]))


def test_opcheck(tmp_path: Path) -> None:
    kernels = implementation("cpu", tmp_path)
    tensors = [filled((2, 3, 4), torch.bfloat16), torch.randn(5, 6)[:, 1:3]]
    message = message_of(tensors)
    torch.library.opcheck(kernels.pack.default, (tensors, message))
    torch.library.opcheck(kernels.unpack.default, (message, tensors))
