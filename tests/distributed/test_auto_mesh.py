"""``init_mesh("auto", ...)``: the planner's degrees, and what it asks for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pool import Pool

import usp
from usp.planning.choose import auto, here


def made(options: dict[str, Any]) -> tuple[int, int]:
    """On a rank: Ulysses and ring degree."""
    mesh = usp.init_mesh("auto", device_type="cpu", **options)
    return mesh.ulysses_degree, mesh.ring_degree


def refused(arguments: tuple[Any, ...], options: dict[str, Any]) -> str:
    """On a rank: what it says."""
    try:
        usp.init_mesh(*arguments, device_type="cpu", **options)
    except (TypeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return "made"


def test_auto_makes_a_mesh(pool: Pool) -> None:
    options = {"seq_len": 4096, "heads": 2, "cluster": "h100"}
    found = pool.run(made, options, ranks=4)
    assert found == [found[0]] * 4 and found[0][0] * found[0][1] == 4 and found[0][0] <= 2


@pytest.mark.parametrize(
    ("arguments", "options", "said"),
    [
        (("auto",), {}, 'ValueError: init_mesh("auto", ...) needs seq_len and heads'),
        (("auto",), {"seq_len": 8}, 'ValueError: init_mesh("auto", ...) needs heads'),
        (("auto",), {"seq_len": 0, "heads": 2}, "ValueError: seq_len must be 1 or more, got 0"),
        (
            ("auto",),
            {"seq_len": 8, "heads": 3, "kv_heads": 2},
            "ValueError: heads 3 is not a multiple of kv_heads 2",
        ),
        (
            ("auto",),
            {"seq_len": 8, "heads": 2, "hedas": 2},
            'TypeError: init_mesh("auto", ...) takes seq_len, heads, kv_heads, head_dim, causal, '
            "cluster, not 'hedas'",
        ),
        (
            ("auto",),
            {"seq_len": 8, "heads": 2, "cluster": "moon"},
            "ValueError: unknown cluster 'moon'",
        ),
        (
            ("auto", 2),
            {"seq_len": 8, "heads": 2},
            'TypeError: init_mesh("auto") chooses ring_degree too, got 2',
        ),
        ((2,), {}, "TypeError: ring_degree must be an integer, got None"),
        ((2, 1), {"heads": 2}, 'TypeError: heads: for init_mesh("auto", ...) alone'),
    ],
)
def test_every_rank_refuses(
    pool: Pool, arguments: tuple[Any, ...], options: dict[str, Any], said: str
) -> None:
    found = pool.run(refused, arguments, options, ranks=2)
    assert all(one.startswith(said) for one in found), found


def test_ranks_that_ask_for_different_meshes_are_told(pool: Pool) -> None:
    found = pool.run(_different, ranks=2)
    assert all("ranks of the group disagree" in one for one in found), found


def _different() -> str:
    import torch.distributed as dist

    heads = 2 if dist.get_rank() else 1  # with one head there is no other way than a ring
    return refused(("auto",), {"seq_len": 64, "heads": heads, "cluster": "h100"})


def test_degrees_follow_the_cluster() -> None:
    of = {"seq_len": 131072, "heads": 32, "kv_heads": 8, "causal": True}
    assert auto.choose_degrees(8, of, "NVIDIA L20")[0] <= 2  # PCIe: the ring
    assert auto.choose_degrees(8, of, "NVIDIA A100-SXM4-80GB")[0] == 8  # NVLink: Ulysses
    ulysses, ring = auto.choose_degrees(64, of, "NVIDIA H100 80GB HBM3")
    assert ulysses <= 8 and ring >= 8
    assert auto.named_like("cpu").name == "laptop"
    with pytest.raises(ValueError, match="knows no cluster of 'Tesla T4': pass cluster="):
        auto.named_like("Tesla T4")


def test_here_must_have_been_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    of = {"seq_len": 64, "heads": 2, "cluster": here.NAME}
    with pytest.raises(ValueError, match="'here' was not measured yet: usp plan --calibrate"):
        auto.choose_degrees(2, of, "cpu")
