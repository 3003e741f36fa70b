"""Which modules replace_attention takes, and attention that it does not know."""

from __future__ import annotations

import pool as workers
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention as sdpa

import usp
from usp.integrations._other_attention import other_attention


class Fused(nn.Module):
    """As in timm: the function of torch, or by hand."""

    def __init__(self, fused: bool = True) -> None:
        super().__init__()
        self.qkv, self.fused = nn.Linear(8, 24), fused

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        if self.fused:
            return F.scaled_dot_product_attention(q, k, v)
        return (q @ k.transpose(-2, -1)).softmax(-1) @ v


class Mixer(nn.Module):
    """As in vit-pytorch: a softmax that is a module, products by einsum."""

    def __init__(self) -> None:
        super().__init__()
        self.attend = nn.Softmax(-1)

    def forward(self, x: Tensor) -> Tensor:
        weights = self.attend(torch.einsum("bid,bjd->bij", x, x))
        return torch.einsum("bij,bjd->bid", weights, x)


def _helper(q: Tensor) -> Tensor:
    return sdpa(q, q, q)


class Indirect(nn.Module):
    """By a method, a function of the file, and another name of torch's."""

    def forward(self, x: Tensor) -> Tensor:
        return self.step(x)

    @torch.no_grad()
    def step(self, x: Tensor) -> Tensor:
        return _helper(x)


class SlidingAttention(nn.Module):
    """Nothing to see but the name."""

    def __init__(self, kernel) -> None:
        super().__init__()
        self.kernel = kernel

    def forward(self, x: Tensor) -> Tensor:
        return self.kernel(x)


class AttentionBlock(nn.Module):
    """Named like attention, but it is what it holds that is attention."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.norm = inner, nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(self.norm(x))


class Router(nn.Module):
    """One softmax, one product: no attention."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.head = nn.Linear(8, 3), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.gate(x).softmax(-1) @ x[..., :3, :]


class OursByHand(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return usp.long_context_attention(x, x, x)


class SelfAttention(OursByHand):
    pass


MODELS = {
    "fused": (Fused(), {"": "calls scaled_dot_product_attention"}),
    "module": (Mixer(), {"": "has a softmax and products of matrices"}),
    "indirect": (Indirect(), {"": "calls scaled_dot_product_attention"}),
    "name": (SlidingAttention(nn.Identity()), {"": "is named like it"}),
    "block": (AttentionBlock(Fused()), {"inner": "calls scaled_dot_product_attention"}),
    "block of a name": (
        AttentionBlock(SlidingAttention(nn.Linear(8, 8))),
        {"inner": "is named like it"},
    ),
    "torch's": (AttentionBlock(nn.MultiheadAttention(8, 2)), {}),
    "transformer": (nn.Transformer(8, 2, 1, 1, 16, batch_first=True), {}),
    "ours": (
        nn.ModuleList([usp.LongContextAttention(), usp.MultiheadAttention(8, 2), SelfAttention()]),
        {},
    ),
    "none": (nn.Sequential(Router(), nn.Linear(8, 8), nn.Softmax(-1)), {}),
}


@pytest.mark.parametrize("name", MODELS)
def test_what_seems_to_be_attention(name) -> None:
    model, wanted = MODELS[name]
    assert other_attention(model) == wanted


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.spatial = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.temporal = nn.MultiheadAttention(8, 2, batch_first=True)
        self.blocks = nn.ModuleList([Fused(), AttentionBlock(Fused())])
        self.again = self.temporal


SPATIAL, TEMPORAL = "spatial.self_attn", "temporal"


@pytest.mark.parametrize(
    ("only", "replaced"),
    [
        (None, [SPATIAL, TEMPORAL]),
        ("spatial", [SPATIAL]),
        ("spatial.self_attn", [SPATIAL]),
        ("*.self_attn", [SPATIAL]),
        ("again", [TEMPORAL]),
        (["spatial", "temporal"], [SPATIAL, TEMPORAL]),
        (nn.MultiheadAttention, [SPATIAL, TEMPORAL]),
        (nn.TransformerEncoderLayer, [SPATIAL]),
        (lambda name, module: "temp" in name and module.num_heads == 2, [TEMPORAL]),
        ((nn.TransformerEncoderLayer, "temp*"), [SPATIAL, TEMPORAL]),
    ],
)
def test_only_says_which(only, replaced) -> None:
    model = Mixed()
    assert usp.replace_attention(model, only=only) is model
    found = [n for n, m in model.named_modules() if isinstance(m, usp.MultiheadAttention)]
    assert found == replaced


@pytest.mark.parametrize(
    ("only", "message"),
    [
        ("temporel", r"only='temporel' means no nn\.MultiheadAttention of Mixed.*temporal, again"),
        (["spatial", "blocks"], "only='blocks' means no"),
        (nn.Linear, "means no"),
        (lambda name, module: False, "means no"),
    ],
)
def test_a_choice_that_means_nothing_is_refused(only, message) -> None:
    model = Mixed()
    with pytest.raises(ValueError, match=message):
        usp.replace_attention(model, only=only)
    with pytest.raises(TypeError, match=r"only= takes names .*, got 3"):
        usp.replace_attention(model, only=3)
    assert type(model.temporal) is nn.MultiheadAttention


def test_a_class_of_its_own_may_be_left_out() -> None:
    class Own(nn.MultiheadAttention):
        pass

    model = nn.ModuleDict({"own": Own(8, 2), "plain": nn.MultiheadAttention(8, 2)})
    usp.replace_attention(model, only="plain")
    assert type(model["own"]) is Own and type(model["plain"]) is usp.MultiheadAttention


def _on_a_mesh() -> list[str]:
    mesh, told = workers.mesh(2, 1), []
    for only in (None, ["spatial", "*"]):
        model = Mixed()
        try:
            usp.replace_attention(model, mesh, only=only)
        except NotImplementedError as refusal:
            told.append(str(refusal))
        assert not any(isinstance(m, usp.MultiheadAttention) for m in model.modules())
    usp.replace_attention(model, workers.mesh(2, 1), only=nn.MultiheadAttention)
    assert model.temporal.placement.mesh.size == 2
    usp.replace_attention(Mixed())
    return told


def test_other_attention_is_refused_on_a_mesh(pool) -> None:
    for told in pool.run(_on_a_mesh, ranks=2):
        assert len(told) == 2
        for message in told:
            assert message.startswith("Mixed seems to hold attention")
            assert "blocks.0 (Fused calls scaled_dot_product_attention)" in message
            assert "blocks.1.inner (Fused" in message and "only=nn.MultiheadAttention" in message
