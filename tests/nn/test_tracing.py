"""What torch.fx sees of our modules."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import usp

F64 = torch.float64


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.MultiheadAttention(8, 2, batch_first=True, dtype=F64)
        self.second = nn.MultiheadAttention(8, 4, batch_first=True, dtype=F64)
        self.core = usp.LongContextAttention(causal=True)

    def forward(self, x: Tensor, ignored: Tensor | None = None) -> Tensor:
        x, weights = self.first(x, x, x, key_padding_mask=ignored)
        x = weights @ self.second(x, x, value=x, need_weights=False)[0]
        q = x.unflatten(-1, (2, 4))
        return self.core(q, q, v=q).flatten(2)


def test_a_traced_model_is_the_model() -> None:
    torch.manual_seed(0)
    model = usp.replace_attention(Model())
    traced = torch.fx.symbolic_trace(model)
    nodes = [node.target for node in traced.graph.nodes if node.op == "call_module"]
    assert nodes == ["first", "second", "core"]
    x, cotangent = torch.randn(2, 2, 7, 8, dtype=F64)
    ignored = torch.arange(7).expand(2, 7) >= torch.tensor([[5], [7]])
    again = torch.fx.symbolic_trace(traced)
    for other in (traced, again, copy.deepcopy(traced)):
        results = []
        for module in (model, other):
            out = module(x, ignored)
            results.append((out, *torch.autograd.grad(out, list(module.parameters()), cotangent)))
        assert len(results[0]) == len(results[1]) == 1 + len(list(model.parameters()))
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_traced_encoder_keeps_its_layers() -> None:
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2)
    model = usp.replace_attention(nn.Sequential(encoder, nn.Linear(8, 3))).eval()
    traced = torch.fx.symbolic_trace(model)
    x = torch.randn(2, 5, 8)
    assert torch.equal(traced(x), model(x))


def test_a_node_is_not_a_graph() -> None:
    with pytest.raises(torch.fx.proxy.TraceError, match="MultiheadAttention is one node"):
        torch.fx.symbolic_trace(usp.MultiheadAttention(8, 2))
