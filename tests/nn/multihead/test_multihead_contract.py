"""What code written for torch.nn.MultiheadAttention relies on beside its results."""

from __future__ import annotations

import pool as workers
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import usp

F64 = torch.float64
Q3, Q2 = torch.zeros(4, 4, 4), torch.zeros(4, 4)
HIDDEN = torch.tensor([False, False, True, True])
SIZES = "expected `key` and `value` to be {}-D but found {}-D and {}-D tensors respectively"
PADDING = "expected `key_padding_mask` to be `None` or {}-D but found {}-D tensor instead"
MASK = "expected `attn_mask` to be `None`, 2-D or 3-D but found 1-D tensor instead"
WRONG = [
    ((Q3, Q2, Q3), {}, SIZES.format(3, 2, 3)),
    ((Q3, Q3, Q2), {}, SIZES.format(3, 3, 2)),
    ((Q2, Q3, Q2), {}, SIZES.format(2, 3, 2)),
    ((Q2, Q2, Q3), {}, SIZES.format(2, 2, 3)),
    ((Q3, Q3, Q3), {"key_padding_mask": HIDDEN}, PADDING.format(2, 1)),
    ((Q2, Q2, Q2), {"key_padding_mask": HIDDEN.expand(1, 4)}, PADDING.format(1, 2)),
    ((Q3, Q3, Q3), {"attn_mask": HIDDEN}, MASK),
    ((Q2, Q2, Q2), {"attn_mask": HIDDEN}, MASK),
    (
        (Q2, Q2, Q2),
        {"attn_mask": torch.ones(5, 4, 4).bool()},
        "Expected `attn_mask` shape to be (4, 4, 4)",
    ),
    ((Q3[..., :3], Q3[..., :3], Q3[..., :3]), {}, ""),
    ((Q3, Q3, Q3[:2]), {}, ""),
]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("inputs", "options", "words"), WRONG)
def test_what_torch_refuses_is_refused_by_a_class_of_both(inputs, options, words, training) -> None:
    """Where torch counts dims, so do we, in its words."""
    module = nn.MultiheadAttention(4, 4).train(training)
    for ours in (module, usp.MultiheadAttention.from_torch(module)):
        with pytest.raises(AssertionError) as refusal:
            ours(*inputs, **options)
        assert words in str(refusal.value).replace("\n", " ")
    assert isinstance(refusal.value, ValueError)


@pytest.mark.parametrize("separate", [False, True])
def test_the_parameters_are_those_of_the_functional_form(separate) -> None:
    """As in torch's own tests: the flag says which of the weights there are."""
    torch.manual_seed(0)
    size = 5 if separate else 8
    module = usp.MultiheadAttention(8, 2, kdim=size, vdim=size, dtype=F64)
    query, key = torch.randn(3, 2, 8, dtype=F64), torch.randn(4, 2, size, dtype=F64)
    assert module._qkv_same_embed_dim is not separate
    out, weights = F.multi_head_attention_forward(
        query,
        key,
        key,
        8,
        2,
        module.in_proj_weight if module._qkv_same_embed_dim else None,
        module.in_proj_bias,
        module.bias_k,
        module.bias_v,
        module.add_zero_attn,
        module.dropout,
        module.out_proj.weight,
        module.out_proj.bias,
        use_separate_proj_weight=not module._qkv_same_embed_dim,
        q_proj_weight=module.q_proj_weight,
        k_proj_weight=module.k_proj_weight,
        v_proj_weight=module.v_proj_weight,
    )
    for ours, theirs in zip(module(query, key, key), (out, weights), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def test_no_bias_is_none_in_both_projections() -> None:
    module = usp.MultiheadAttention(8, 4, bias=False)
    assert module.in_proj_bias is None and module.out_proj.bias is None


def test_an_encoder_with_padding_compiles_whole_in_evaluation() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dtype=F64)
    encoder = usp.replace_attention(nn.TransformerEncoder(layer, 1)).eval()
    x, ignored = torch.randn(1, 7, 8, dtype=F64), torch.arange(7)[None] > 4
    compiled = torch.compile(encoder, backend="eager", fullgraph=True)
    out = compiled(x, src_key_padding_mask=ignored)
    torch.testing.assert_close(out, encoder(x, src_key_padding_mask=ignored), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (Q2.int(), "query must be floating point, got dtype torch.int32"),
        (Q2.double(), "query has dtype torch.float64, the parameters have torch.float32"),
        (Q2.bfloat16(), "cast one of them"),
    ],
)
def test_inputs_that_parameters_cannot_take(inputs, message) -> None:
    module = usp.MultiheadAttention(4, 2)
    with pytest.raises(ValueError, match=message):
        module(inputs, inputs, inputs)
    if inputs.is_floating_point() and inputs.dtype != torch.float64:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            module(inputs, inputs, inputs)


NESTED = [torch.zeros(2, 4), torch.zeros(3, 4)]
KINDS = {
    "list": (lambda: [[0.0] * 4] * 3, "key must be a tensor"),
    "nested": (lambda: torch.nested.nested_tensor(NESTED), "enable_nested_tensor=False"),
    "jagged": (lambda: torch.nested.nested_tensor(NESTED, layout=torch.jagged), "key is a Nested"),
    "sparse": (lambda: Q2.to_sparse(), r"x\.to_dense\(\)"),
    "dims": (lambda: Q2[0], "query has 2 dims, key has 1"),
}


def _of_another_kind(kind: str) -> None:
    mesh = workers.mesh(1, 2)
    module = usp.MultiheadAttention(4, 2, mesh=mesh)
    for key in (Q2, Q2 if mesh.rank == 0 else KINDS[kind][0]()):
        module(Q2, key, Q2 if isinstance(key, torch.Tensor) else 3)


@pytest.mark.parametrize("kind", KINDS)
def test_another_kind_at_the_second_call_of_one_rank(pool, kind) -> None:
    for outcome in pool.outcomes(_of_another_kind, kind, ranks=2):
        with pytest.raises(workers.RemoteError, match=KINDS[kind][1]):
            raise outcome


def _with_a_distributed_parameter() -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = workers.mesh(1, 2)
    module = usp.MultiheadAttention(4, 2, mesh=mesh)
    if mesh.rank == 1:
        weight = distribute_tensor(
            module.in_proj_weight.detach(),
            init_device_mesh("cpu", (2,)),
            [Shard(0)],
            src_data_rank=None,
        )
        module.in_proj_weight = nn.Parameter(weight)
    else:
        init_device_mesh("cpu", (2,))
    x = torch.zeros(3, 1, 4)
    module(x, x, x)


def test_a_distributed_parameter_is_refused_on_all_ranks(pool) -> None:
    for outcome in pool.outcomes(_with_a_distributed_parameter, ranks=2):
        with pytest.raises(workers.RemoteError, match="in_proj_weight is a DTensor"):
            raise outcome
