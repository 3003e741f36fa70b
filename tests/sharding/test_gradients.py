"""The gradient rule: sequence ranks add, data ranks average, whoever used a parameter."""

from __future__ import annotations

import pool as workers
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import usp
from usp.distributed.making import init_mesh
from usp.sharding import gradients
from usp.sharding.gradients import all_reduce_gradients

TOKENS, FEATURES = 23, 5


class Net(nn.Module):
    """Its `first_token` is used by the rank of token 0 alone, `idle` by nobody.

    With `touch_all` every rank uses `first_token`, though it matters to token 0 alone.
    """

    def __init__(self, touch_all=False) -> None:
        super().__init__()
        self.touch_all = touch_all
        self.layers = nn.Sequential(nn.Linear(FEATURES, 7), nn.GELU(), nn.Linear(7, FEATURES))
        self.first_token = nn.Parameter(torch.randn(FEATURES))
        self.idle = nn.Parameter(torch.randn(3))
        self.frozen = nn.Parameter(torch.randn(FEATURES), requires_grad=False)

    def forward(self, x, positions):
        if self.touch_all or (len(positions) and positions[0] == 0):
            x = x + (positions == 0)[:, None] * self.first_token
        return self.layers(x) * self.frozen


def net(dtype=torch.float64, touch_all=False):
    torch.manual_seed(1)
    return Net(touch_all).to(dtype)


def loss_of(model, sample, positions, dtype=torch.float64):
    """This rank's part of the mean over all tokens of one sample."""
    generator = torch.Generator().manual_seed(sample)
    x = torch.randn(TOKENS, FEATURES, generator=generator, dtype=torch.float64).to(dtype)
    target = torch.randn(TOKENS, FEATURES, generator=generator, dtype=torch.float64).to(dtype)
    error = model(x[positions], positions) - target[positions]
    return error.square().sum() / (TOKENS * FEATURES)


def gradients_of(model):
    return {name: p.grad for name, p in model.named_parameters()}


def whole(samples, dtype=torch.float64):
    """One process: the mean of the samples' losses."""
    model = net(dtype)
    for sample in samples:
        (loss_of(model, sample, torch.arange(TOKENS), dtype) / len(samples)).backward()
    return gradients_of(model)


def assert_same(actual, expected, tolerance=1e-9):
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        if gradient is None:
            assert actual[name] is None, name
        else:
            scale = gradient.abs().max()
            assert scale > 0
            assert actual[name].dtype == gradient.dtype
            assert (actual[name].double() - gradient).abs().max() <= tolerance * scale, name


def mine(rank, ranks):
    """Uneven pieces, the last of them empty when there are more than two ranks."""
    cuts = [0, 11, *([19] if ranks > 2 else []), *[TOKENS] * (ranks - 2)]
    return torch.arange(TOKENS)[cuts[rank] : cuts[rank + 1] if rank + 1 < ranks else TOKENS]


def _sequence(ulysses_degree, ring_degree, accumulate, as_parameters, bucket_elements):
    gradients._BUCKET_ELEMENTS = bucket_elements
    mesh = workers.mesh(ulysses_degree, ring_degree)
    model = net()
    for sample in range(accumulate):
        positions = mine(mesh.rank, mesh.size)
        if len(positions):
            (loss_of(model, sample, positions) / accumulate).backward()
    unused = model.first_token.grad is None
    parameters = [*model.parameters(), model.first_token] if as_parameters else model
    all_reduce_gradients(parameters, mesh)
    return gradients_of(model), unused


@pytest.mark.parametrize("shape", [(2, 2), (1, 3), (2, 1)])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_equals_one_process(pool, shape, accumulate):
    expected = whole(range(accumulate))
    ranks = shape[0] * shape[1]
    for options in ((False, 8 * 2**20), (True, 8 * 2**20), (False, 1)):
        answers = pool.run(_sequence, *shape, accumulate, *options, ranks=ranks)
        assert [unused for _, unused in answers] == [False] + [True] * (ranks - 1)
        for actual, _ in answers:
            assert_same(actual, expected)


def _sequence_and_data():
    """Ranks 0 1 hold sample 0, ranks 2 3 sample 1; 0 2 and 1 3 the same tokens."""
    sample, part = divmod(dist.get_rank(), 2)
    sequence, data = (
        dist.new_group(ranks, use_local_synchronization=True)
        for ranks in ([2 * sample, 2 * sample + 1], [part, part + 2])
    )
    mesh = init_mesh(1, 2, device_type="cpu", group=sequence)
    model = net()
    loss_of(model, sample, mine(mesh.rank, 2)).backward()
    all_reduce_gradients(model, mesh, data)
    return gradients_of(model)


def test_data_ranks_average(pool):
    expected = whole(range(2))
    for actual in pool.run(_sequence_and_data, ranks=4):
        assert_same(actual, expected)


def _ddp(ulysses_degree, ring_degree):
    mesh = workers.mesh(ulysses_degree, ring_degree)
    model = net()
    wrapped = DistributedDataParallel(model, find_unused_parameters=True)
    loss = loss_of(wrapped, 0, mine(mesh.rank, mesh.size))
    # DDP averages over all ranks, the rule wants the sum
    (loss * mesh.size).backward()
    return gradients_of(model)


def test_ddp_with_the_documented_factor(pool):
    expected = whole([0])
    for actual in pool.run(_ddp, 2, 2, ranks=4):
        # under find_unused_parameters DDP leaves what nobody used without a gradient, as we do
        assert_same(actual, expected)


def _fsdp(ulysses_degree, ring_degree):
    mesh = workers.mesh(ulysses_degree, ring_degree)
    # FSDP hangs over a parameter that some ranks use and others do not
    model = net(touch_all=True)
    fully_shard(model, mesh=DeviceMesh.from_group(dist.group.WORLD, "cpu"))
    loss = loss_of(model, 0, mine(mesh.rank, mesh.size))
    # as DDP, FSDP averages over all ranks
    (loss * mesh.size).backward()
    return {name: None if g is None else g.full_tensor() for name, g in gradients_of(model).items()}


def test_fsdp_with_the_documented_factor(pool):
    expected = whole([0])
    for actual in pool.run(_fsdp, 2, 2, ranks=4):
        assert_same(actual, expected)


def _fsdp_over_data_ranks():
    """FSDP shards and averages over data ranks 0 2 and 1 3; the helper adds 0 1 and 2 3."""
    sample, part = divmod(dist.get_rank(), 2)
    sequence, data = (
        dist.new_group(ranks, use_local_synchronization=True)
        for ranks in ([2 * sample, 2 * sample + 1], [part, part + 2])
    )
    mesh = init_mesh(1, 2, device_type="cpu", group=sequence)
    model = net(touch_all=True)
    fully_shard(model, mesh=DeviceMesh.from_group(data, "cpu"))
    loss_of(model, sample, mine(mesh.rank, 2)).backward()
    all_reduce_gradients(model, mesh)
    return {name: None if g is None else g.full_tensor() for name, g in gradients_of(model).items()}


def test_fsdp_over_data_ranks_alone(pool):
    expected = whole(range(2))
    for actual in pool.run(_fsdp_over_data_ranks, ranks=4):
        assert_same(actual, expected)


class Positions(nn.Module):
    """A table of positions, attention that gathers all keys, and a head: as in LSS."""

    def __init__(self, mesh, layout):
        super().__init__()
        torch.manual_seed(2)
        self.layout, self.mesh = layout, mesh
        self.table = nn.Parameter(torch.randn(TOKENS, FEATURES, dtype=torch.float64))
        self.qkv = nn.Linear(FEATURES, 3 * FEATURES, dtype=torch.float64)
        self.head = nn.Linear(FEATURES, FEATURES, dtype=torch.float64)
        if mesh is not None:
            rows = usp.shard_sequence(self.table.detach(), mesh, 0, layout)
            self.table = nn.Parameter(rows.clone())

    def forward(self, x):
        """(local tokens, features) of one sample."""
        q, k, v = self.qkv(x + self.table)[None, :, None].chunk(3, -1)
        options = {"layout": self.layout, "transport": "allgather", "seq_len": TOKENS}
        if self.mesh is None:
            options = {}
        out = usp.long_context_attention(q, k, v, self.mesh, causal=True, **options)
        return self.head(x + out[0, :, 0])


def sample_and_target(sample):
    generator = torch.Generator().manual_seed(sample)
    return torch.randn(2, TOKENS, FEATURES, generator=generator, dtype=torch.float64)


def norm_of(model, mesh):
    """Of all gradients, those of each rank's own rows among them: docs/training.md has it."""
    own = model.table.grad.square().sum()
    if mesh is not None:
        for axis in (mesh.ulysses, mesh.ring):
            axis.all_reduce(own)
    rest = sum(p.grad.square().sum() for p in model.parameters() if p is not model.table)
    return (own + rest).sqrt()


def steps(model, mesh, samples, data=None):
    """Three clipped ones; the parameters they end at."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for step in range(3):
        for sample in samples:
            x, target = sample_and_target(10 * step + sample)
            if mesh is not None:
                pair = usp.shard_sequence(torch.stack((x, target)), mesh, 1, model.layout)
                x, target = pair
            error = (model(x) - target).square().sum() / (TOKENS * FEATURES)
            (error / len(samples)).backward()
        usp.all_reduce_gradients(model, mesh, data, by_position=[model.table])
        total = norm_of(model, mesh)
        nn.utils.clip_grads_with_norm_(model.parameters(), 0.3, total)
        optimizer.step()
        optimizer.zero_grad()
    return {name: p.detach() for name, p in model.named_parameters()}


def _by_position(sequence_ranks, layout):
    """Ranks 0, 1, ... share a sequence, then the next ones another; their tables are cut."""
    world, rank = dist.get_world_size(), dist.get_rank()
    sample, part = divmod(rank, sequence_ranks)
    samples = world // sequence_ranks
    sequence, data = (
        dist.new_group(ranks, use_local_synchronization=True)
        for ranks in (
            [sample * sequence_ranks + n for n in range(sequence_ranks)],
            [n * sequence_ranks + part for n in range(samples)],
        )
    )
    mesh = init_mesh(1, sequence_ranks, device_type="cpu", group=sequence)
    found = steps(Positions(mesh, layout), mesh, [sample], data)
    found["table"] = usp.unshard_sequence(found["table"], mesh, 0, layout)
    return found


@pytest.mark.parametrize(
    ("ranks", "sequence_ranks", "layout"),
    [
        (2, 2, "zigzag"),
        pytest.param(2, 1, "contiguous", marks=pytest.mark.long),
        pytest.param(4, 2, "contiguous", marks=pytest.mark.long),
        pytest.param(4, 4, "striped", marks=pytest.mark.long),
    ],
)
def test_a_table_of_positions_is_averaged_over_data_ranks_alone(
    pool, ranks, sequence_ranks, layout
):
    expected = steps(Positions(None, layout), None, range(ranks // sequence_ranks))
    start = Positions(None, layout).table
    assert (expected["table"] - start).abs().max() > 1e-3
    for found in pool.run(_by_position, sequence_ranks, layout, ranks=ranks):
        assert_same(found, expected)


def _overflow():
    mesh = workers.mesh(1, 2)
    rows, shared = (nn.Parameter(torch.zeros(n, 2)) for n in (3 - mesh.rank, 1))
    rows.grad, shared.grad = torch.ones_like(rows), torch.ones_like(shared)
    all_reduce_gradients([rows, shared], mesh, by_position=[rows])
    kept = rows.grad.clone(), shared.grad.clone()
    rows.grad[0] = float("inf") if mesh.rank else 1.0
    all_reduce_gradients([rows, shared], mesh, by_position=[rows])
    with pytest.raises(ValueError, match=r"\[\(1, 2\)\] that are not among the 1 to reduce"):
        all_reduce_gradients([rows], mesh, by_position=[[shared], [rows]][mesh.rank])
    return *kept, rows.grad


def test_an_overflow_in_rows_of_one_rank_is_seen_on_all(pool):
    for rank, (rows, shared, spoiled) in enumerate(pool.run(_overflow, ranks=2)):
        assert rows.tolist() == [[1, 1]] * (3 - rank) and shared.tolist() == [[2, 2]]
        assert spoiled.isnan().all()


def _half(accumulate_in_fp32):
    mesh = workers.mesh(1, 6)
    weight = nn.Parameter(torch.zeros(2, dtype=torch.bfloat16))
    # 1 + five times 2^-8 is lost addend by addend in bf16, not in fp32
    weight.grad = torch.tensor([1.0 if mesh.rank == 0 else 2.0**-8, 1.0]).bfloat16()
    all_reduce_gradients([weight], mesh, accumulate_in_fp32=accumulate_in_fp32)
    return weight.grad.dtype, weight.grad.tolist()


def test_bf16_gradients_are_added_in_fp32(pool):
    expected = torch.tensor(1 + 5 * 2.0**-8).bfloat16().item()
    for dtype, (first, second) in pool.run(_half, True, ranks=6):
        assert (dtype, first, second) == (torch.bfloat16, expected, 6.0)
    # in their own dtype small addends may be lost
    for dtype, (first, second) in pool.run(_half, False, ranks=6):
        assert (dtype, second) == (torch.bfloat16, 6.0)
        assert 1 <= first <= expected


def _sparse_and_mixed():
    mesh = workers.mesh(2, 2)
    table = nn.Embedding(5, 2, sparse=True, dtype=torch.float64)
    scale = nn.Parameter(torch.ones(1, dtype=torch.float32))
    nn.init.constant_(table.weight, 1)
    if mesh.rank != 3:
        (table(torch.tensor([mesh.rank, 4])).sum() * scale.double()).sum().backward()
    all_reduce_gradients([table.weight, scale], mesh)
    return table.weight.grad, scale.grad


def test_sparse_gradients_and_mixed_dtypes(pool):
    for table, scale in pool.run(_sparse_and_mixed, ranks=4):
        assert table[:, 0].tolist() == [1, 1, 1, 0, 3]
        assert scale.dtype == torch.float32 and scale.tolist() == [12]


def test_one_device_is_left_alone():
    model = net()
    loss_of(model, 0, torch.arange(TOKENS)).backward()
    before = {name: g if g is None else g.clone() for name, g in gradients_of(model).items()}
    all_reduce_gradients(model, None)
    assert_same(gradients_of(model), before, 0)


def complex_gradients() -> list[complex]:
    mesh = init_mesh(1, 2, device_type="cpu")
    parameter = torch.nn.Parameter(torch.zeros(2, dtype=torch.complex64))
    parameter.grad = torch.tensor([1 + 2j, 3j]) * (1 + mesh.rank)
    all_reduce_gradients([parameter], mesh)
    return parameter.grad.tolist()


def test_complex_parameters(pool) -> None:
    assert pool.run(complex_gradients, ranks=2) == [[3 + 6j, 9j]] * 2


def scaled_step() -> tuple[list[float], float]:
    """One step in which the second rank overflows, then one in which none does."""
    mesh = init_mesh(1, 2, device_type="cpu")
    torch.manual_seed(0)
    layer = nn.Linear(4, 4)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    before, weights = layer.weight.detach().clone(), []
    for overflows in (True, False):
        x = torch.full((2, 4), float("inf") if overflows and mesh.rank else 1.0)
        scaler.scale(layer(x).sum()).backward()
        all_reduce_gradients(layer, mesh)
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(layer.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        weights.append((layer.weight - before).abs().max().item())
    return weights, scaler.get_scale()


def test_a_grad_scaler_after_the_sum_skips_on_every_rank(pool) -> None:
    """Whichever rank overflowed; docs/training.md says which order that takes."""
    first, second = pool.run(scaled_step, ranks=2)
    assert first == second
    (skipped, taken), scale = first
    assert skipped == 0 < taken < 1 and scale == 4.0
