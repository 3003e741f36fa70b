"""docs/migration.md: each name is there and here, layouts agree, and what runs on CPUs agrees."""

from __future__ import annotations

import importlib
import inspect
import os
import re
import sys
from collections.abc import Iterator
from functools import reduce
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pool as workers
import pytest
import real_libraries as real
import torch
import torch.nn.functional as F
from places import ROOT
from pool import Pool
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.experimental import context_parallel
from torch.distributed.tensor.experimental._attention import context_parallel_unshard

import usp
from usp.planning.layout import rows

TEXT = (ROOT / "docs" / "migration.md").read_text()
LIBRARIES = ["yunchang", "ring_flash_attn", "deepspeed", "ringX_attn"]
F64 = torch.float64


def tables() -> Iterator[tuple[str, list[tuple[str, str]]]]:
    """The head of the first column and the rows of each table about another library."""
    for table in re.findall(r"(?:^\|.*\n)+", TEXT, re.MULTILINE):
        lines = [re.split(r"(?<!\\)\|", line)[1:-1] for line in table.splitlines()]
        if lines[0][0].strip():
            yield lines[0][0].strip(), [(line[0], line[1]) for line in lines[2:]]


def spans(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def names_of(library: str) -> tuple[list[str], dict[str, list[str]]]:
    """Dotted names, and arguments by the name of whose they are."""
    names, arguments = [], {}
    for head, lines in tables():
        found = [span for there, _ in lines for span in spans(there)]
        if head == "name":
            names += [name for name in found if name.split(".")[0] == library]
        else:
            (whose,) = spans(head)
            if whose.split(".")[0] == library:
                arguments[whose] = found
    return names, arguments


def look_up(name: str) -> Any:
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        try:
            module = importlib.import_module(".".join(parts[:end]))
        except ModuleNotFoundError as missing:
            if end == 1 or not name.startswith(str(missing.name)):
                raise
            continue
        return reduce(getattr, parts[end:], module)


def not_found(library: str) -> list[str]:
    """What the page names and the library has not; ImportError where there is no library."""
    importlib.import_module(library)
    names, arguments = names_of(library)
    assert names and arguments
    wrong = []
    for name in (*names, *arguments):
        try:
            look_up(name)
        except (AttributeError, ModuleNotFoundError):
            wrong.append(name)
    for whose, wanted in arguments.items():
        there = inspect.signature(look_up(whose)).parameters
        wrong += [f"{whose}({name}=)" for name in wanted if name not in there]
    return wrong


def test_names_of_torch_exist() -> None:
    assert not_found("torch") == []


def test_a_name_that_is_not_there_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["torch.nope", "torch.nn.functional.nope"], {"torch.nn.functional.softmax": ["nope"]}
    monkeypatch.setitem(not_found.__globals__, "names_of", lambda library: names)
    assert not_found("torch") == [*names[0], "torch.nn.functional.softmax(nope=)"]


def test_names_of_ours_exist() -> None:
    found = re.findall(r"usp\.(\w+)", TEXT)
    assert len(found) > 30 and all(hasattr(usp, name) for name in found)
    ours = inspect.signature(usp.long_context_attention).parameters
    more = {"dim", "ulysses_degree", "ring_degree", "attn_implementation"}
    for head, lines in tables():
        here = [span for _, cell in lines for span in spans(cell)]
        for name in re.findall(r"^([a-z]\w+)(?:=.*)?$", "\n".join(here), re.MULTILINE):
            assert name in ours or name in more, f"{head}: {name}"


def start_others() -> None:
    """In a fresh worker: these libraries, and flash-attn over a stand-in for its extension."""
    real.start_over_stand_in()
    for name in ("transformers", "transformers.modeling_flash_attention_utils"):
        sys.modules[name] = mock.MagicMock()  # ring-flash-attn wants names that 5.24 has no more
    os.environ["DS_ACCELERATOR"] = "cpu"
    sys.modules["aiter"] = None  # type: ignore[assignment]  # looks for ROCm where it is imported


@pytest.fixture(scope="module")
def others() -> Iterator[Pool]:
    real.folder()
    pool = Pool(size=2, setup=start_others)
    yield pool
    pool.close()


def asked(pool: Pool, library: str) -> list[str]:
    """``not_found`` in a worker, or the test is skipped."""
    found, absent = pool.run(not_found_or_absent, library, ranks=1)[0]
    if absent:
        pytest.skip(f"{absent} is not installed, which {library} is or imports")
    return found


def not_found_or_absent(library: str) -> tuple[list[str], str]:
    try:
        return not_found(library), ""
    except ModuleNotFoundError as missing:
        return [], str(missing.name)


@pytest.mark.library
@pytest.mark.parametrize("library", LIBRARIES)
def test_names_of_other_libraries_exist(others: Pool, library: str) -> None:
    assert asked(others, library) == []


# ---- torch


def inputs(tokens: int) -> list[Tensor]:
    """q, k and v of all tokens, (batch, heads, tokens, head dim)."""
    return list(
        torch.randn(3, 1, 3, tokens, 8, generator=torch.Generator().manual_seed(3), dtype=F64)
    )


def by_torch(tokens: int) -> tuple[Tensor, Tensor]:
    """This rank's tokens of q, and the whole output, of the page's first program."""
    q, k, v = inputs(tokens)
    device_mesh = init_device_mesh("cpu", (2,))
    with context_parallel(device_mesh, buffers=[q, k, v], buffer_seq_dims=[2, 2, 2]):
        out = F.scaled_dot_product_attention(q, k, v)
        (whole,) = context_parallel_unshard(device_mesh, [out], [2])
        return q.clone(), whole


def by_us(tokens: int) -> tuple[Tensor, Tensor, list[Tensor]]:
    """The same of the page's second program, and the gradients of q, k and v."""
    whole_inputs = [x.requires_grad_() for x in inputs(tokens)]
    q, k, v = whole_inputs
    spread = usp.Spread(workers.mesh(1, 2), layout="zigzag", seq_len=q.shape[2])
    q, k, v = (spread.shard(x, dim=2) for x in (q, k, v))
    with usp.spread_attention(spread):
        out = F.scaled_dot_product_attention(q, k, v)
    whole = spread.unshard(out, dim=2)
    (whole.sin().sum() / 2).backward()
    return q.detach(), whole.detach(), [x.grad for x in whole_inputs]


@pytest.mark.long  # DTensor tries placements of each op of attention, most of a minute
def test_context_parallel_beside_ours(pool: Pool) -> None:
    tokens = 16
    theirs, ours = (pool.run(run, tokens, ranks=2) for run in (by_torch, by_us))
    wanted = [x.requires_grad_() for x in inputs(tokens)]
    out = F.scaled_dot_product_attention(*wanted)
    out.sin().sum().backward()
    for (their_q, their_out), (q, whole, _) in zip(theirs, ours, strict=True):
        torch.testing.assert_close(q, their_q, rtol=0, atol=0)
        torch.testing.assert_close(their_out, out.detach(), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(whole, out.detach(), rtol=1e-12, atol=1e-12)
    for x, *parts in zip(wanted, *(grads for *_, grads in ours), strict=True):
        torch.testing.assert_close(sum(parts), x.grad, rtol=1e-12, atol=1e-12)


# ---- yunchang


def extracted_by_yunchang() -> list[str]:
    """Where its ranks hold other tokens than ours; its groups are replaced by their numbers."""
    from yunchang import EXTRACT_FUNC_DICT
    from yunchang.comm import extract_local

    wrong, tokens = [], torch.arange(48).view(1, 48, 1)
    for ulysses, ring in ((2, 2), (1, 3), (4, 1), (2, 4)):
        for theirs, ours in {"basic": "contiguous", "zigzag": "zigzag", "strip": "striped"}.items():
            table = rows(ours, 48, ring)
            for rank in range(ulysses * ring):
                row, place = divmod(rank, ulysses)
                pairs = SimpleNamespace(RING_PG=(row, ring), ULYSSES_PG=(place, ulysses))
                extract_local.PROCESS_GROUP = pairs
                extract_local.dist = SimpleNamespace(
                    get_rank=lambda group: group[0], get_world_size=lambda group: group[1]
                )
                cut = EXTRACT_FUNC_DICT[theirs](tokens, rank, ulysses * ring, rd=ring, ud=ulysses)
                if cut.flatten().tolist() != table[row].tensor.chunk(ulysses)[place].tolist():
                    wrong.append(f"{theirs}, ulysses {ulysses}, ring {ring}, rank {rank}")
    return wrong


@pytest.mark.library
def test_ranks_of_yunchang_hold_the_same_tokens(others: Pool) -> None:
    asked(others, "yunchang")
    assert others.run(extracted_by_yunchang, ranks=1) == [[]]


# ---- DeepSpeed


def beside_deepspeed() -> float:
    """The largest difference of outputs and gradients on this rank."""
    import deepspeed
    from deepspeed.sequence.layer import DistributedAttention

    # it would compile one for minutes; and deepspeed.comm.torch is torch
    importlib.import_module("deepspeed.comm.torch").build_shm_op = lambda: None
    os.environ.setdefault("LOCAL_RANK", str(torch.distributed.get_rank()))
    deepspeed.init_distributed("gloo", verbose=False, auto_mpi_discovery=False)
    mesh = workers.mesh(2, 1)
    local = [usp.shard_sequence(x.transpose(1, 2), mesh, 1).contiguous() for x in inputs(16)]
    local = [torch.cat([x, x[:, :, :1]], 2) for x in local]  # 4 heads, for 2 ranks
    found = []
    for attention in (
        lambda *qkv: DistributedAttention(dense, torch.distributed.group.WORLD, 2, 1)(*qkv, 0),
        usp.LongContextAttention(mesh, causal=True),
    ):
        leaves = [x.clone().requires_grad_() for x in local]
        out = attention(*leaves)
        out.sin().sum().backward()
        found.append([out.detach(), *(x.grad for x in leaves)])
    return max(float((a - b).abs().max()) for a, b in zip(*found, strict=True))


def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


@pytest.mark.library
def test_distributed_attention_beside_ours(others: Pool) -> None:
    asked(others, "deepspeed")
    assert max(others.run(beside_deepspeed, ranks=2)) <= 1e-12
