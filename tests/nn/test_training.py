"""Models around our attention under DDP, FSDP2 and checkpointing: the gradients of one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel
from training_case import (
    Model,
    Place,
    assert_same,
    expected,
    gradients_of,
    local_loss,
    loss_of,
    make_model,
    sample_of,
    spread,
)

import usp


def check(pool: Any, function: Any, place: Place, *args: Any) -> None:
    wanted = expected(place)
    for actual in pool.run(function, place, *args, ranks=place.ranks):
        assert_same(actual, wanted)


PLACES = [
    Place(1, 2, 2),
    Place(1, 1, 4, seq_len=3),  # ranks without heads, ranks without tokens
    Place(1, 4, 1, "striped", seq_len=3),
    Place(2, 2, 1),
    Place(2, 1, 2, "contiguous"),
]


def ddp_over_all(place: Place) -> dict[str, Tensor]:
    model = DistributedDataParallel(place.model())
    (local_loss(model, place) * place.mesh.size).backward()
    return gradients_of(model)


@pytest.mark.parametrize("place", PLACES, ids=str)
def test_ddp_over_data_and_sequence(pool, place: Place) -> None:
    check(pool, ddp_over_all, place)


def ddp_with_all_tokens_alike(place: Place) -> dict[str, Tensor]:
    model = DistributedDataParallel(place.model())
    x, targets = sample_of(place.sample, place.seq_len)
    lost = loss_of(model, place.shard(x), place.shard(targets), "sum")
    (lost / tokens_of_all(place) * place.ranks).backward()
    return gradients_of(model)


def tokens_of_all(place: Place) -> int:
    samples = [sample_of(index, place.seq_len) for index in range(place.data)]
    return sum(int((targets != -100).sum()) for _, targets in samples)


def test_ddp_where_samples_count_by_their_tokens(pool) -> None:
    place, model = Place(2, 2, 1), make_model()
    for index in range(place.data):
        lost = loss_of(model, *sample_of(index, place.seq_len), "sum")
        (lost / tokens_of_all(place)).backward()
    for actual in pool.run(ddp_with_all_tokens_alike, place, ranks=place.ranks):
        assert_same(actual, gradients_of(model))


def ddp_with_local_means(place: Place) -> dict[str, Tensor]:
    model = DistributedDataParallel(place.model())
    x, targets = sample_of(place.sample, place.seq_len)
    loss_of(model, place.shard(x), place.shard(targets), "mean").backward()
    return gradients_of(model)


def test_local_means_are_wrong(pool) -> None:
    """The trap: ranks hold different numbers of counted tokens, so a mean of means is another."""
    place = Place(1, 2, 2)
    wanted = expected(place)
    for actual in pool.run(ddp_with_local_means, place, ranks=place.ranks):
        error = (actual["head.bias"] - wanted["head.bias"]).abs().max()
        assert error > 0.01 * wanted["head.bias"].abs().max()


def ddp_over_data(place: Place) -> dict[str, Tensor]:
    group = place.device_mesh.get_group("data")
    model = DistributedDataParallel(place.model(), process_group=group)
    local_loss(model, place).backward()
    usp.all_reduce_gradients(model, place.mesh)
    return gradients_of(model)


def test_ddp_over_data_alone(pool) -> None:
    check(pool, ddp_over_data, Place(2, 1, 2))


def shard_parameters(model: Model, ranks: DeviceMesh) -> None:
    for block in model.blocks:
        fully_shard(block.attention, mesh=ranks)
        fully_shard(block, mesh=ranks)
    fully_shard(model, mesh=ranks)


def fsdp_over_all(place: Place, factor: str) -> dict[str, Tensor]:
    model = place.model()
    shard_parameters(model, place.device_mesh._flatten())
    if factor == "loss":
        (local_loss(model, place) * place.mesh.size).backward()
    else:
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.set_gradient_divide_factor(place.data)
        local_loss(model, place).backward()
    return gradients_of(model)


@pytest.mark.long
@pytest.mark.parametrize("factor", ["loss", "divide"])
@pytest.mark.parametrize("place", PLACES, ids=str)
def test_fsdp_over_data_and_sequence(pool, place: Place, factor: str) -> None:
    check(pool, fsdp_over_all, place, factor)


def fsdp_on_gloo(sums: bool) -> tuple[float, str]:
    """In fp32, the gradient of a weight that each of two ranks multiplies with 3."""
    model = fully_shard(nn.Linear(1, 2), mesh=init_device_mesh("cpu", (2,)))
    model.set_gradient_divide_factor(1)
    if sums:
        model.set_force_sum_reduction_for_comms(True)
    try:
        model(torch.full((1, 1), 3.0)).sum().backward()
    except RuntimeError as refusal:
        return 0.0, str(refusal)
    return float(model.weight.grad.full_tensor()[0, 0]), ""


def test_a_divisor_of_fsdp_on_gloo(pool) -> None:
    """What docs/training.md says of it."""
    assert pool.run(fsdp_on_gloo, True, ranks=2) == [(6.0, "")] * 2
    for _, refusal in pool.run(fsdp_on_gloo, False, ranks=2):
        assert "PREMUL_SUM with Gloo" in refusal


def fsdp_over_data(place: Place) -> dict[str, Tensor]:
    model = place.model()
    shard_parameters(model, place.device_mesh["data"])
    local_loss(model, place).backward()
    usp.all_reduce_gradients(model, place.mesh)
    return gradients_of(model)


def test_fsdp_over_data_alone(pool) -> None:
    check(pool, fsdp_over_data, Place(2, 2, 1))


def fsdp_replicated(place: Place) -> dict[str, Tensor]:
    """Parameters sharded over the sequence, each data rank with a copy."""
    model = place.model()
    shard_parameters(model, place.device_mesh["data", "ring"])
    (local_loss(model, place) * place.mesh.size).backward()
    return gradients_of(model)


def test_fsdp_with_replicas(pool) -> None:
    check(pool, fsdp_replicated, Place(2, 2, 1))


DROPOUT = 0.4


def checkpointed(place: Place, reentrant: bool, wrapper: str, validate: str) -> dict[str, Tensor]:
    model = place.model(DROPOUT, validate=validate)
    model.reentrant = reentrant
    wrapped: nn.Module = model
    if wrapper == "ddp":
        wrapped = DistributedDataParallel(model)
    elif wrapper == "fsdp":
        shard_parameters(model, place.device_mesh._flatten())
    torch.manual_seed(7)
    loss = local_loss(wrapped, place) * (place.mesh.size if wrapper else 1)
    loss.backward()
    if not wrapper:
        usp.all_reduce_gradients(model, place.mesh)
    return gradients_of(wrapped)


@pytest.mark.parametrize("validate", ["first", "always"])
@pytest.mark.parametrize("wrapper", ["", "ddp", "fsdp"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_draws_the_same_dropout_again(pool, reentrant, wrapper, validate) -> None:
    """Against one process without checkpoints: what is dropped does not depend on the mesh."""
    place = Place(1, 2, 2)
    wanted = expected(place, spread(make_model(DROPOUT), None, seq_len=place.seq_len))
    for actual in pool.run(checkpointed, place, reentrant, wrapper, validate, ranks=4):
        assert_same(actual, wanted)
