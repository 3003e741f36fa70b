"""Many steps of one module on a mesh: lengths, dropout seeds and modes that change on the way."""

from __future__ import annotations

import copy
from typing import Any

import pool as workers
import pytest
import torch
from torch import Tensor, nn

import usp

F64 = torch.float64


class Watched:
    """The attention of a layer, replayed on one device from what the ranks gave it."""

    def __init__(self, module: usp.MultiheadAttention, mesh: usp.SequenceMesh) -> None:
        self.alone = usp.replace_attention(copy.deepcopy(module))
        self.mesh = mesh
        module.register_forward_pre_hook(self._before)
        module.register_forward_hook(self._after)
        self.errors: list[float] = []

    def _before(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self.state = torch.get_rng_state()

    def _after(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Any) -> None:
        x = usp.unshard_sequence(inputs[0].detach(), self.mesh, 1)
        mine = torch.get_rng_state()
        torch.set_rng_state(self.mesh.gather_objects(self.state)[0])
        whole = self.alone.train(module.training)(x, x, x, need_weights=False)[0]
        torch.set_rng_state(mine)
        error = output[0] - usp.shard_sequence(whole, self.mesh, 1)
        self.errors.append(error.abs().max().item() if error.numel() else 0.0)


def _train(mesh: tuple[int, int], lengths: list[int]) -> list[float]:
    """The largest error of attention in each of many steps, evaluation among them."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, 0.3, batch_first=True, dtype=F64)
    usp.replace_attention(layer, workers.mesh(*mesh))
    watched = Watched(layer.self_attn, workers.mesh(*mesh))
    for step, length in enumerate(lengths):
        x = usp.shard_sequence(torch.randn(2, length, 8, dtype=F64), workers.mesh(*mesh), 1)
        layer.train(step % 4 != 3)
        out = layer(x)
        if layer.training:
            out.square().sum().backward()
    return watched.errors


@pytest.mark.parametrize("mesh", [(1, 2), (2, 1)], ids=str)
def test_dropout_of_uneven_shards_stays_right(pool, mesh) -> None:
    """Dropout of features draws more numbers where a rank holds more."""
    for errors in pool.run(_train, mesh, [12, 13, 13, 11, 7, 13, 1, 13], ranks=2):
        assert len(errors) == 8 and max(errors) < 1e-9, errors


def _evaluated_first(kind: str) -> list[list[Any]]:
    """Calls that not all ranks make of the same module, or not in the same mode."""
    mesh, odd = workers.mesh(1, 2), workers.mesh(1, 2).rank == 1
    torch.manual_seed(0)
    module = usp.MultiheadAttention(8, 2, 0.3, batch_first=True, mesh=mesh, dtype=F64)
    other = copy.deepcopy(module)
    told = []
    for length in (8, 5, 13):
        whole = torch.randn(1, length, 8, dtype=F64)
        x = usp.shard_sequence(whole, mesh, 1)
        used = other if kind == "copy" and odd else module
        used.train(kind != "mode" or length != 8)
        state = torch.get_rng_state()
        out = used(x, x, x, need_weights=False)[0]
        after = torch.get_rng_state()
        torch.set_rng_state(state)
        alone = usp.replace_attention(copy.deepcopy(used))
        wanted = usp.shard_sequence(alone(whole, whole, whole, need_weights=False)[0], mesh, 1)
        torch.set_rng_state(after)
        told.append((out - wanted).abs().max().item())
    return told


@pytest.mark.parametrize("kind", ["copy", "mode"])
def test_a_copy_on_one_rank_and_a_first_call_in_evaluation(pool, kind) -> None:
    for errors in pool.run(_evaluated_first, kind, ranks=2):
        assert len(errors) == 3 and max(errors) < 1e-9, errors


def _in_different_modes() -> None:
    mesh = workers.mesh(1, 2)
    module = usp.MultiheadAttention(8, 2, 0.3, mesh=mesh)
    x = torch.randn(3, 1, 8)
    module(x, x, x, need_weights=False)
    module.train(mesh.rank == 0)
    module(x, x, x, need_weights=False)


def test_one_rank_in_evaluation_is_refused(pool) -> None:
    for outcome in pool.outcomes(_in_different_modes, ranks=2):
        with pytest.raises(workers.RemoteError, match=r"disagree on .*dropout"):
            raise outcome


def _uncut(options: dict[str, Any], made: str) -> None:
    mesh = workers.mesh(1, 2)
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    usp.replace_attention(model, mesh, **options)
    torch.manual_seed(mesh.rank if made == "other tokens" else 0)
    x = torch.ones(2, 6, 8) if made == "constant" else torch.randn(2, 6, 8)
    model(x[:, :1] if made == "one token" else x)


UNCUT = r"all 2 ranks of the mesh hold the same 6 tokens.* usp\.shard_sequence"


@pytest.mark.parametrize(
    ("options", "made", "message"),
    [
        ({"causal": True}, "same tokens", UNCUT),
        ({"window_size": (3, 0), "validate": "always"}, "same tokens", UNCUT),
        ({"causal": True, "seq_len": 6}, "same tokens", "6 .*local tokens.* 3 of 6 tokens"),
        ({"causal": True}, "other tokens", None),
        ({"causal": True}, "constant", None),
        ({"causal": True}, "one token", None),
        ({"causal": True, "seq_len": 12}, "same tokens", None),
        ({"causal": True, "validate": "never"}, "same tokens", None),
        ({}, "same tokens", None),
    ],
)
def test_a_sequence_that_nobody_cut(pool, options, made, message) -> None:
    """Its causal mask would be right on the first rank alone."""
    outcomes = pool.outcomes(_uncut, options, made, ranks=2)
    if message is None:
        assert outcomes == [None, None]
        return
    for outcome in outcomes:
        with pytest.raises(workers.RemoteError, match=message):
            raise outcome
