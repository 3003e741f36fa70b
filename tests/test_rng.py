"""Random streams: equal on all ranks or different on each, repeatable, and gone afterwards."""

from __future__ import annotations

import pool as workers
import pytest
import torch
from torch.utils.checkpoint import checkpoint

from usp import rng

STREAMS = (rng.replicated, rng.sharded)


def _draw(stream, seed: int, ulysses_degree: int, ring_degree: int):
    """Two draws inside the stream and one after it, on a rank whose generator has `seed`."""
    mesh = workers.mesh(ulysses_degree, ring_degree)
    torch.manual_seed(seed)
    with getattr(rng, stream)(mesh):
        inside = torch.rand(5).tolist(), torch.rand(3).tolist()
    return inside, torch.rand(5).tolist()


def _draw_with_seed_of_rank(stream, ulysses_degree: int, ring_degree: int):
    rank = torch.distributed.get_rank()
    return _draw(stream, 100 + rank, ulysses_degree, ring_degree)


@pytest.mark.parametrize("shape", [(2, 2), (1, 3), (3, 2)])
def test_streams_on_a_mesh(pool, shape):
    ranks = shape[0] * shape[1]
    # equal generators
    replicated = pool.run(_draw, "replicated", 7, *shape, ranks=ranks)
    sharded = pool.run(_draw, "sharded", 7, *shape, ranks=ranks)
    assert all(answer == replicated[0] for answer in replicated)
    assert len({str(inside) for inside, _ in sharded}) == ranks
    assert all(after == replicated[0][1] for _, after in sharded + replicated)
    # generators that differ
    replicated = pool.run(_draw_with_seed_of_rank, "replicated", *shape, ranks=ranks)
    sharded = pool.run(_draw_with_seed_of_rank, "sharded", *shape, ranks=ranks)
    assert len({str(inside) for inside, _ in replicated}) == 1
    assert len({str(inside) for inside, _ in sharded}) == ranks
    assert len({str(after) for _, after in replicated}) == ranks


@pytest.mark.parametrize("stream", STREAMS)
def test_leaves_the_generator_one_number_on(stream):
    torch.manual_seed(3)
    torch.randint(2**63 - 1, (), dtype=torch.int64)
    expected = torch.rand(4)
    torch.manual_seed(3)
    with stream():
        torch.rand(1000)
    assert torch.equal(torch.rand(4), expected)


@pytest.mark.parametrize("stream", STREAMS)
def test_leaves_the_generator_one_number_on_after_an_error(stream):
    torch.manual_seed(3)
    torch.randint(2**63 - 1, (), dtype=torch.int64)
    expected = torch.rand(4)
    torch.manual_seed(3)
    with pytest.raises(KeyError), stream():
        torch.rand(1000)
        raise KeyError
    assert torch.equal(torch.rand(4), expected)


@pytest.mark.parametrize("stream", STREAMS)
def test_follows_manual_seed_and_moves_on(stream):
    def draw():
        with stream():
            return torch.rand(6)

    torch.manual_seed(11)
    first, second = draw(), draw()
    torch.manual_seed(11)
    assert torch.equal(draw(), first)
    assert torch.equal(draw(), second)
    assert not torch.equal(first, second)


def test_the_two_streams_differ():
    numbers = []
    for stream in STREAMS:
        torch.manual_seed(5)
        with stream():
            numbers.append(torch.rand(4))
    assert not torch.equal(*numbers)


def test_streams_nest():
    def draw(with_inner):
        torch.manual_seed(2)
        with rng.replicated():
            torch.rand(3)
            if with_inner:
                with rng.sharded():
                    inner = torch.rand(4)
            else:
                torch.randint(2**63 - 1, (), dtype=torch.int64)
                inner = None
            return inner, torch.rand(4)

    (inner, after), (_, plain) = draw(True), draw(False)
    assert torch.equal(after, plain)
    assert not torch.equal(inner, after)


def _noisy(x, mesh):
    with rng.sharded(mesh):
        x = torch.nn.functional.dropout(x, 0.5)
    with rng.replicated(mesh):
        return (x * torch.rand(())).sin() * x


def _checkpointed_gradients(ulysses_degree: int, ring_degree: int):
    mesh = workers.mesh(ulysses_degree, ring_degree) if ring_degree * ulysses_degree > 1 else None
    gradients = []
    for keep in (True, False):
        torch.manual_seed(torch.distributed.get_rank() if mesh else 0)
        x = torch.linspace(-1, 2, 50, dtype=torch.float64, requires_grad=True)
        y = _noisy(x, mesh) if keep else checkpoint(_noisy, x, mesh, use_reentrant=False)
        y = _noisy(y, mesh)
        y.backward(torch.linspace(1, 3, 50, dtype=torch.float64))
        gradients.append(x.grad)
    return torch.equal(*gradients), float(gradients[0].abs().sum())


def test_checkpoint_replays_the_same_numbers(pool):
    same, size = _checkpointed_gradients(1, 1)
    assert same and size > 0
    for same, size in pool.run(_checkpointed_gradients, 2, 2, ranks=4):
        assert same and size > 0


@pytest.mark.skipif(not torch.accelerator.is_available(), reason="needs an accelerator")
@pytest.mark.parametrize("stream", STREAMS)
def test_the_accelerator_has_the_stream_too(stream):
    device = torch.accelerator.current_accelerator()
    torch.zeros(1, device=device)
    torch.manual_seed(9)
    expected = torch.rand(4, device=device)

    def draw():
        torch.manual_seed(9)
        with stream():
            inside = torch.rand(4, device=device)
        return inside, torch.rand(4, device=device)

    (first, after), (second, _) = draw(), draw()
    assert torch.equal(first, second)
    assert not torch.equal(first, expected)
    assert torch.equal(after, expected)
