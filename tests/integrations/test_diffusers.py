"""The attention backend "usp" of diffusers, behind the library's own context parallelism."""

from __future__ import annotations

from typing import Any

import diffusers_models
import doors
import libraries
import pool as workers
import pytest
import torch
from integration_models import random
from torch.distributed.device_mesh import init_device_mesh

import usp
from usp.integrations import diffusers as door

pytestmark = pytest.mark.library
MESHES = [(2, 1), (1, 2), (2, 2)]
# sizes that both 2 and 4 divide, as their hooks want
EVEN: dict[str, dict[str, Any]] = {
    "Flux": {"image": (4, 6), "text": 8},
    "Wan": {"size": (2, 8, 8)},
    "LTX": {"size": (2, 3, 4), "text": 8},
    "Qwen": {"image": (4, 6), "text": 8},
}


def _compared(mesh: tuple[int, int], kind: str, sizes: Any, options: Any) -> dict[str, float]:
    model, inputs = diffusers_models.MODELS[kind](**sizes)
    placed = workers.mesh(*mesh)
    with diffusers_models.fp64():
        return doors.compared(
            model, inputs, placed, lambda m: diffusers_models.enable(m, mesh, **options)
        )


@pytest.mark.parametrize("mesh", MESHES, ids=str)
@pytest.mark.parametrize("kind", EVEN)
def test_their_configuration(pool, kind, mesh) -> None:
    libraries.library("diffusers")
    ranks = mesh[0] * mesh[1]
    for wrong in pool.run(_compared, mesh, kind, EVEN[kind], {}, ranks=ranks):
        assert wrong == {}


@pytest.mark.parametrize(("mesh", "option"), [((2, 1), "ulysses"), ((1, 2), "ring")])
def test_their_uneven_cuts(pool, mesh, option) -> None:
    """7 tokens of text on two ranks; what they join again is even, for gloo joins no other."""
    libraries.library("diffusers")
    sizes, options = EVEN["Flux"] | {"text": 7}, {f"{option}_anything": True}
    for wrong in pool.run(_compared, mesh, "Flux", sizes, options, ranks=2):
        assert wrong == {}


# queries and keys of the whole, heads of each, and what else is asked for
CALLS: dict[str, dict[str, Any]] = {
    "plain": {},
    "scaled": {"scale": 0.3},
    "fewer key heads": {"heads": (6, 2), "enable_gqa": True},
    "causal": {"is_causal": True, "heads": (6, 3), "enable_gqa": True},
    "padded, own keys": {"mask": "bool", "shape": (2, "own")},
    "padded, all keys": {"mask": "bool", "shape": (2, "keys")},
    "bias of all keys": {"mask": "float", "shape": (1, 3, "rows", "keys")},
    "text": {"keys": 8},
    "text, fewer heads": {"keys": 8, "heads": (4, 2), "enable_gqa": True},
    "text, padded": {"keys": 8, "mask": "bool", "shape": (2, "own")},
    "text, bias of own keys": {"keys": 8, "mask": "float", "shape": (2, 3, 1, "own")},
    "text, bias of all keys": {"keys": 8, "mask": "float", "shape": (2, 1, 1, "keys")},
}


def _call(axes: Any, mesh: Any, case: dict[str, Any], options: dict[str, Any]) -> dict[str, float]:
    """One attention by their dispatcher, of tokens cut as theirs are; what differs from torch."""
    from diffusers.models import attention_dispatch as theirs
    from diffusers.models._modeling_parallel import ContextParallelConfig, ParallelConfig

    degrees = {"ulysses_degree": mesh.ulysses_degree, "ring_degree": mesh.ring_degree}
    config = ParallelConfig(ContextParallelConfig(**degrees, **options))
    config.setup(mesh.rank, mesh.size, torch.device("cpu"), mesh=axes)
    (heads, key_heads), more = case.get("heads", (3, 3)), {"rows": 12, "keys": case.get("keys", 12)}
    q = random(2, 12, heads, 8, seed=1).requires_grad_()
    k, v = (random(2, more["keys"], key_heads, 8, seed=n).requires_grad_() for n in (2, 3))
    leaves, mask, given_mask = [q, k, v], None, None
    if "mask" in case:
        shape = [more["keys"] if n == "own" else more.get(n, n) for n in case["shape"]]
        mask = given_mask = random(*shape, seed=4)
        if case["mask"] == "bool":
            mask = given_mask = mask > -0.5
            mask = mask[:, None, None]
        else:
            leaves.append(mask.requires_grad_())
        if case["shape"][-1] == "own":
            given_mask = usp.shard_sequence(given_mask, mesh, -1)
        if case["shape"][-2] == "rows":
            given_mask = usp.shard_sequence(given_mask, mesh, -2)
    asked = {n: case[n] for n in ("scale", "is_causal", "enable_gqa") if n in case}
    whole = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (q, k, v)), mask, **asked
    ).transpose(1, 2)
    cotangent = random(*whole.shape, seed=5)
    wanted = [whole.detach(), *torch.autograd.grad(whole, leaves, cotangent)]
    out = theirs.dispatch_attention_fn(
        *(usp.shard_sequence(x, mesh, 1) for x in (q, k, v)), given_mask, **asked,
        backend="usp", parallel_config=config,
    )  # fmt: skip
    out = usp.unshard_sequence(out, mesh, 1)
    found = torch.autograd.grad(out, leaves, cotangent / mesh.size)
    for x in found:
        torch.distributed.all_reduce(x)
    names = ("out", "dq", "dk", "dv", "dmask")
    pairs = zip(wanted, (out.detach(), *found), strict=True)
    errors = {n: float((a - b).abs().max()) for n, (a, b) in zip(names, pairs, strict=False)}
    return {name: error for name, error in errors.items() if not error <= 1e-12}


def _calls(mesh: tuple[int, int], options: dict[str, Any]) -> dict[str, dict[str, float]]:
    door.register()
    axes = init_device_mesh("cpu", mesh[::-1], mesh_dim_names=("ring", "ulysses"))
    placed = workers.mesh(*mesh)
    found = {kind: _call(axes, placed, case, options) for kind, case in CALLS.items()}
    return {kind: wrong for kind, wrong in found.items() if wrong}


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_what_their_dispatcher_passes_on(pool, mesh) -> None:
    libraries.library("diffusers")
    ranks = mesh[0] * mesh[1]
    for wrong in pool.run(_calls, mesh, {}, ranks=ranks):
        assert wrong == {}


@pytest.mark.parametrize(("mesh", "option"), [((2, 1), "ulysses"), ((1, 2), "ring")])
def test_what_it_passes_on_of_uneven_cuts(pool, mesh, option) -> None:
    libraries.library("diffusers")
    for wrong in pool.run(_calls, mesh, {f"{option}_anything": True}, ranks=2):
        assert wrong == {}


def test_one_device() -> None:
    libraries.library("diffusers")
    door.register()
    door.register()
    model, inputs = diffusers_models.MODELS["Flux"]()
    wanted = doors.results(model, inputs)
    model.set_attention_backend("usp")
    assert doors.errors(wanted, doors.results(model, inputs)) == {}
    registry = libraries.library("diffusers.models.attention_dispatch")
    registry._AttentionBackendRegistry.set_active_backend(registry.AttentionBackendName.NATIVE)


def test_no_lse() -> None:
    with pytest.raises(NotImplementedError, match=r"no LSE: call usp\.long_context_attention"):
        door.attention(*(random(1, 3, 2, 4, seed=1),) * 3, return_lse=True)
