"""Trunks that torch.compile makes graphs of, where modules are given more than their tokens."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import compiling
import doors
import libraries
import pool as workers
import pytest
import torch
import torch.nn.functional as F
from integration_models import random
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers_models import inputs_of, model_of
from vision_models import of_timm

import usp

pytestmark = pytest.mark.library


# A prefix whose tokens have no entries ------------------------------------------------------------


def _prefixed(kind: str) -> dict[str, float]:
    """One graph, which is all there is: fullgraph=True raises where it ends."""
    mesh, of_library = workers.mesh(1, 2), kind == "DINOv3"
    model = model_of(kind) if of_library else of_timm(kind)
    inputs = inputs_of(kind, None) if of_library else {"x": random(2, 3, 40, 40, seed=1)}
    graphs = compiling.Counting("aot_eager")

    def change(ours: nn.Module) -> Any:
        with torch.no_grad():
            ours(**inputs)  # the first forward of a length makes its tables
        return torch.compile(ours, backend=graphs, fullgraph=True)

    with compiling.afresh():
        wrong = doors.compared(
            model, inputs, mesh, lambda m: usp.parallelize(m, mesh, layout="zigzag"), change
        )
    assert graphs.graphs == 1
    # tables of rotations are made in fp32
    return {name: error for name, error in wrong.items() if not ("freqs" in name and error < 1e-7)}


@pytest.mark.parametrize("kind", ["rotations and registers", "DINOv3"])
def test_tables_behind_a_prefix_are_in_one_graph(pool, kind) -> None:
    libraries.library("transformers" if kind == "DINOv3" else "timm")
    for wrong in pool.run(_prefixed, kind, ranks=2):
        assert wrong == {}


# Documents that modules are told ------------------------------------------------------------------


class Layer(nn.Module):
    """Attention inside of documents, as the vision towers of Qwen have it."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.qkv = nn.Linear(12, 36)
        self.attn = nn.MultiheadAttention(12, 3) if kind == "module" else nn.Module()

    def forward(self, x: Tensor, cu_seqlens: Tensor) -> Tensor:
        lengths, outs = cu_seqlens.diff().tolist(), []
        for part in self.qkv(x).split(lengths, 0):
            q, k, v = part.chunk(3, -1)
            if isinstance(self.attn, nn.MultiheadAttention):
                outs.append(self.attn(q, k, v, need_weights=False)[0])
            else:
                q, k, v = (y.unflatten(-1, (3, 4)).transpose(0, 1) for y in (q, k, v))
                outs.append(F.scaled_dot_product_attention(q, k, v).transpose(0, 1).flatten(1))
        return x + torch.cat(outs)


class Packed(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(kind) for _ in range(2))

    def forward(self, x: Tensor, cu_seqlens: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x, cu_seqlens)
        return x


DOCUMENTS = [(0, 4, 13), (0, 6, 7, 13), (0, 1, 5, 9, 13), (0, 13), (0, 2, 13)]


def _of_documents(kind: str, how: str) -> dict[str, float]:
    mesh, whole, wrong = workers.mesh(1, 2), doors.randomize(Packed(kind)), {}
    trunk = usp.Boundary("layers", dim=0, documents="cu_seqlens")
    ours = usp.parallelize(copy.deepcopy(whole), mesh, trunk, layout="zigzag")
    graphs, counts, x = compiling.Counting("aot_eager"), [], random(13, 12, seed=1)
    with torch.no_grad():
        ours(x, torch.tensor(DOCUMENTS[0]))
    with compiling.afresh():
        called = torch.compile(ours, backend=graphs, fullgraph=True) if how == "model" else ours
        for layer in ours.layers if how == "blocks" else ():
            layer.compile(backend=graphs, fullgraph=True)
        for layer in ours.layers if how == "again" else ():
            layer.compile(backend=graphs)
            layer._compiled_call_impl = partial(
                checkpoint, layer._compiled_call_impl, use_reentrant=True
            )
        for bounds in DOCUMENTS:
            inputs = {"x": x, "cu_seqlens": torch.tensor(bounds)}
            wanted = doors.results(whole, inputs)
            found = doors.results(called, inputs, lambda m: usp.all_reduce_gradients(m, mesh))
            found = {name.replace("_orig_mod.", ""): y for name, y in found.items()}
            wrong |= {f"{bounds}: {n}": e for n, e in doors.errors(wanted, found).items()}
            counts.append(graphs.graphs)
    # once for so many boundaries, and once for any number of them
    assert how not in ("model", "blocks") or counts[0] < counts[1] == counts[-1], counts
    return wrong


@pytest.mark.parametrize(
    ("kind", "how"),
    [("function", "model"), ("function", "blocks"), ("function", "again"), ("module", "eager")],
)
def test_new_documents_need_no_new_graph(pool, kind, how) -> None:
    for wrong in pool.run(_of_documents, kind, how, ranks=2):
        assert wrong == {}
