"""The mean over all valid tokens of all ranks, whoever holds how many."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Any

import pool as workers
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from pool import RemoteError
from torch import Tensor

import usp

CLASSES = 7
F64 = torch.float64


def _case(held: tuple[int, ...], valid: tuple[int, ...], dtype=F64) -> tuple[Tensor, Tensor]:
    """Logits and labels, of which each rank's first ``valid`` count."""
    generator = torch.Generator().manual_seed(2)
    logits = 3 * torch.randn(sum(held), CLASSES, generator=generator, dtype=F64)
    labels = torch.randint(0, CLASSES, (sum(held),), generator=generator)
    for part, count in zip(labels.split(held), valid, strict=True):
        part[count:] = -100
    return logits.to(dtype), labels


def _of_ranks(
    held: tuple[int, ...], valid: tuple[int, ...], options: dict[str, float]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    mesh = workers.mesh(1, len(held))
    logits, labels = _case(held, valid)
    whole = logits.clone().requires_grad_()
    wanted = F.cross_entropy(whole, labels, **options)
    wanted.backward()
    mine = logits.split(held)[mesh.rank].clone().requires_grad_()
    loss = usp.cross_entropy(mine, labels.split(held)[mesh.rank], mesh, **options)
    loss.backward()
    return wanted.detach(), loss.detach(), whole.grad.split(held)[mesh.rank], mine.grad


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1}], ids=str)
@pytest.mark.parametrize(
    ("held", "valid"),
    [((5, 4, 9), (5, 0, 9)), ((3, 8), (0, 1)), ((6, 0), (2, 0)), ((3, 3), (3, 3))],
    ids=str,
)
def test_the_mean_of_the_whole_and_this_ranks_gradient(pool, held, valid, options) -> None:
    for wanted, loss, part, grad in pool.run(_of_ranks, held, valid, options, ranks=len(held)):
        torch.testing.assert_close(loss, wanted, rtol=1e-13, atol=0)
        torch.testing.assert_close(grad, part, rtol=1e-12, atol=1e-16)


def _nothing() -> tuple[float, float]:
    mesh = workers.mesh(1, 2)
    logits, labels = _case((3, 4), (0, 0), torch.float32)
    mine = logits.split((3, 4))[mesh.rank].clone().requires_grad_()
    loss = usp.cross_entropy(mine, labels.split((3, 4))[mesh.rank], mesh)
    loss.backward()
    return loss.item(), mine.grad.abs().sum().item()


def test_no_valid_label_anywhere_is_zero_and_no_nan(pool) -> None:
    assert pool.run(_nothing, ranks=2) == [(0.0, 0.0)] * 2


def _data_and_sequence() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Two data ranks with 8 and 2 valid labels, each on two sequence ranks."""
    world = dist.group.WORLD
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    across = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    rank = dist.get_rank(world)
    mesh = usp.init_mesh(1, 2, group=pairs[rank // 2], device_type="cpu")
    held, valid = ((5, 4), (5, 3)) if rank < 2 else ((5, 4), (0, 2))
    weight = torch.nn.Linear(CLASSES, CLASSES, bias=False, dtype=F64)
    with torch.no_grad():
        weight.weight.copy_(torch.eye(CLASSES) + 0.1)
    twin = torch.nn.Linear(CLASSES, CLASSES, bias=False, dtype=F64)
    twin.load_state_dict(weight.state_dict())
    both = [_case((5, 4), (5, 3)), _case((5, 4), (0, 2))]
    wanted = F.cross_entropy(
        twin(torch.cat([x for x, _ in both])), torch.cat([labels for _, labels in both])
    )
    wanted.backward()
    logits, labels = _case(held, valid)
    group = across[rank % 2]
    x, own = logits.split(held)[mesh.rank], labels.split(held)[mesh.rank]
    loss = usp.cross_entropy(weight(x), own, mesh, group)
    loss.backward()
    usp.all_reduce_gradients(weight, mesh, group)
    mean = loss.detach().clone()
    dist.all_reduce(mean, group=group)
    return wanted.detach(), mean / 2, twin.weight.grad, weight.weight.grad


def test_data_ranks_count_every_token_alike(pool) -> None:
    for wanted, loss, whole, grad in pool.run(_data_and_sequence, ranks=4):
        torch.testing.assert_close(loss, wanted, rtol=1e-13, atol=0)
        torch.testing.assert_close(grad, whole, rtol=1e-12, atol=1e-16)


def test_on_one_device_it_is_torchs_and_count_divides() -> None:
    logits, labels = _case((5, 4), (5, 2))
    torch.testing.assert_close(
        usp.cross_entropy(logits, labels, None), F.cross_entropy(logits, labels)
    )
    total = F.cross_entropy(logits, labels, reduction="sum")
    torch.testing.assert_close(usp.cross_entropy(logits, labels, None, count=21), total / 21)
    images = logits[None].mT  # classes behind the batch, as torch has them
    torch.testing.assert_close(
        usp.cross_entropy(images, labels[None], None), F.cross_entropy(logits, labels)
    )


TRANSFORMS: dict[str, Callable[[Callable[[Tensor], Tensor], Tensor], Any]] = {
    "grad": lambda loss, x: torch.func.grad(loss)(x),
    "vjp": lambda loss, x: torch.func.vjp(loss, x)[1](torch.tensor(0.7, dtype=F64)),
    "jvp": lambda loss, x: torch.func.jvp(loss, (x,), (x.sin(),)),
    "hessian": lambda loss, x: torch.func.hessian(loss)(x),
    "vmap": lambda loss, x: torch.func.vmap(loss)(torch.stack((x, x.sin()))),
    "grads of samples": lambda loss, x: torch.func.vmap(torch.func.grad(loss))(
        torch.stack((x, -x))
    ),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_on_one_device_torch_func_takes_it(name: str) -> None:
    """The tiled one refuses all of them, by its name."""
    logits, labels = _case((5, 4), (5, 2))
    found = TRANSFORMS[name](lambda x: usp.cross_entropy(x, labels, None), logits)
    right = TRANSFORMS[name](lambda x: F.cross_entropy(x, labels), logits)
    torch.testing.assert_close(found, right)
    with pytest.raises(
        NotImplementedError, match=r"usp.tiled_cross_entropy does not run inside of"
    ):
        TRANSFORMS[name](lambda x: usp.tiled_cross_entropy(x, x, labels), logits)


def test_on_one_device_it_is_one_graph() -> None:
    logits, labels = _case((5, 4), (5, 2))
    loss = torch.compile(usp.cross_entropy, fullgraph=True, backend="eager")
    torch.testing.assert_close(loss(logits, labels, None), F.cross_entropy(logits, labels))


def test_losses_in_fp16_are_added_in_fp32() -> None:
    logits = torch.zeros(9000, 4096, dtype=torch.float16)  # their sum is 74858, beyond fp16
    loss = usp.cross_entropy(logits, torch.zeros(9000, dtype=torch.int64), None)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.item(), 8.3178, rtol=1e-3, atol=0)


# what one rank of two may give, and what all must hear
REFUSED = {
    "probabilities": ({"target": torch.zeros(3)}, "class indices"),
    "no class": ({"target": torch.tensor([0, 4, 1])}, "Target 4 is out of bounds"),
    "length": ({"target": torch.zeros(2, dtype=torch.int64)}, r"\(3\) .* \(2\)"),
    "smoothing": ({"label_smoothing": 1.5}, "1.5"),
    "another smoothing": ({"label_smoothing": 0.5}, "label_smoothing: rank 0 has 0.5"),
}


def _refused(name: str) -> None:
    mesh = workers.mesh(1, 2)
    given = {"target": torch.zeros(3, dtype=torch.int64)}
    given |= {} if mesh.rank else REFUSED[name][0]
    usp.cross_entropy(torch.zeros(3, 4), mesh=mesh, **given)


def _inside() -> None:
    """One rank, in a transform, where another is in none."""
    mesh, logits = workers.mesh(1, 2), torch.zeros(3, 4)
    loss = functools.partial(usp.cross_entropy, target=torch.zeros(3, dtype=torch.int64), mesh=mesh)
    torch.func.grad(loss)(logits) if mesh.rank else loss(logits)


def _elsewhere() -> None:
    mesh = workers.mesh(1, 2)
    x = torch.zeros(1, 3, 4)
    if mesh.rank:
        usp.unshard_sequence(x, mesh, 1)
    else:
        usp.cross_entropy(x[0], torch.zeros(3, dtype=torch.int64), mesh)


def test_what_does_not_fit_and_ranks_elsewhere_are_refused_on_every_rank(pool) -> None:
    for name, (_, said) in REFUSED.items():
        for outcome in pool.outcomes(_refused, name, ranks=2):
            assert isinstance(outcome, RemoteError) and re.search(said, outcome.message), outcome
    for outcome in pool.outcomes(_inside, ranks=2):
        assert isinstance(outcome, RemoteError)
        assert (
            "usp.cross_entropy over several ranks does not run inside of torch.func"
            in outcome.message
        )
    for outcome in pool.outcomes(_elsewhere, ranks=2):
        assert isinstance(outcome, RemoteError)
        assert "rank 0 calls usp.cross_entropy, rank 1 calls unshard_sequence" in outcome.message
