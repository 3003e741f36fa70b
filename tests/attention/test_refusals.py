"""What cannot be computed is refused with both values, on every rank, at once: never a hang."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import numpy as np
import pool as worker
import pytest
import torch
import torch.distributed as dist
from cases import Case
from judge import judge
from pool import RemoteError
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.tensor import Shard, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode

import usp
from usp.testing import dense_attention, dropout_multiplier


def call(mesh: usp.SequenceMesh | None = None, attention: Any = None, **changed: Any) -> Any:
    """A call that would succeed on (2, 6, 4, 8) tensors but for what is changed."""
    tensors = {
        "q": torch.randn(2, 6, 4, 8),
        "k": torch.randn(2, 6, 2, 8),
        "v": torch.randn(2, 6, 2, 5),
    }
    tensors = {name: changed.pop(name, x) for name, x in tensors.items()}
    if attention is not None:
        return attention(*tensors.values(), **changed)
    return usp.long_context_attention(*tensors.values(), mesh, **changed)


def test_the_unchanged_call_succeeds() -> None:
    assert call().shape == (2, 6, 4, 5)


def zeros(*shape: int, dtype: torch.dtype | None = None, device: str | None = None) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype, device=device)


# what is changed, and what the message must say: the value, and what it should be
WRONG = {
    "q of three dims": ({"q": zeros(2, 6, 8)}, ["q", "(2, 6, 8)", "heads"]),
    "dtype that is none": ({"q": zeros(2, 6, 4, 8, dtype=torch.int64)}, ["int64", "fp32"]),
    "dtypes that differ": ({"k": zeros(2, 6, 2, 8).double()}, ["float32", "float64"]),
    "devices that differ": ({"v": zeros(2, 6, 2, 5, device="meta")}, ["cpu", "meta"]),
    "batch sizes": ({"k": zeros(3, 6, 2, 8), "v": zeros(3, 6, 2, 5)}, ["2", "3"]),
    "key tokens": ({"v": zeros(2, 7, 2, 5)}, ["6", "7"]),
    "key heads": ({"v": zeros(2, 6, 4, 5)}, ["k has", "2", "4"]),
    "head dims": ({"k": zeros(2, 6, 2, 9)}, ["8", "9"]),
    "head dim 0": ({"q": zeros(2, 6, 4, 0), "k": zeros(2, 6, 2, 0)}, ["head_dim", "0"]),
    "heads that do not divide": ({"q": zeros(2, 6, 3, 8)}, ["multiple", "3", "2"]),
    "no key heads": ({"k": zeros(2, 6, 0, 8), "v": zeros(2, 6, 0, 5)}, ["heads", "4", "0"]),
    "seq_len": ({"seq_len": 7}, ["6", "7", "seq_len"]),
    "seq_len of keys": ({"seq_len": (6, 9)}, ["6", "9"]),
    "seq_len of three": ({"seq_len": (6, 6, 6)}, ["(6, 6, 6)"]),
    "seq_len below 0": ({"seq_len": -6}, ["-6"]),
    "layout": ({"layout": "diagonal"}, ["diagonal", "zigzag"]),
    "layout of another length": ({"layout": usp.DocumentZigzag((0, 9))}, ["6", "9"]),
    "transport": ({"transport": "pigeon"}, ["pigeon", "allgather"]),
    "placement": ({"keys": "everywhere"}, ["keys", "everywhere", "replicated"]),
    "both sides everywhere": ({"queries": "replicated", "keys": "replicated"}, ["mesh=None"]),
    "seq_len of keys everywhere": ({"keys": "replicated", "seq_len": (6, 9)}, ["6", "9"]),
    "backend": ({"backend": "abacus"}, ["abacus", "reference"]),
    "window below 0": ({"window_size": (-1, 0)}, ["-1", "None"]),
    "window of three": ({"window_size": (1, 2, 3)}, ["(1, 2, 3)"]),
    "documents too long": ({"cu_seqlens": (0, 3, 8)}, ["8", "6"]),
    "documents backwards": ({"cu_seqlens": (0, 4, 3, 6)}, ["4", "3"]),
    "documents from 1": ({"cu_seqlens": (1, 6)}, ["0", "1"]),
    "prefix below 0": ({"prefix_len": -2, "causal": True}, ["-2"]),
    "prefix of what is open": ({"prefix_len": 2}, ["2", "causal"]),
    "dropout of everything": ({"dropout_p": 1.0}, ["1.0", "[0, 1)"]),
    "dropout below 0": ({"dropout_p": -0.1}, ["-0.1"]),
    "softcap below 0": ({"softcap": -3.0}, ["-3.0"]),
    "scale that is none": ({"softmax_scale": float("nan")}, ["nan"]),
    "mask of floats": ({"key_padding_mask": zeros(2, 6)}, ["bool", "float32"]),
    "mask of a wrong shape": (
        {"key_padding_mask": zeros(2, 7, dtype=torch.bool)},
        ["(2, 6)", "(2, 7)"],
    ),
    "bias of bools": ({"attn_bias": zeros(1, 1, 6, 6, dtype=torch.bool)}, ["bool", "-inf"]),
    "bias of a wrong shape": ({"attn_bias": zeros(2, 3, 6, 6)}, ["(2, 3, 6, 6)", "(2|1, 4|1"]),
    "bias of local keys": ({"attn_bias": zeros(1, 1, 6, 5)}, ["5", "6"]),
    "bias of two dims": ({"attn_bias": zeros(6, 6)}, ["(6, 6)"]),
    "slopes": ({"alibi_slopes": zeros(3)}, ["(3,)", "(4,)"]),
}


class Hidden(torch.Tensor):
    """Its data lie elsewhere, as those of quantisation libraries do."""

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError("used before it was refused")


def q_like(kind: str) -> Any:
    """Something in the place of q whose elements are not where a tensor's are."""
    q = torch.zeros(2, 6, 4, 8)
    ragged = [torch.zeros(n, 4, 8) for n in (6, 3)]
    made = {
        "jagged": lambda: torch.nested.nested_tensor(ragged, layout=torch.jagged),
        "nested": lambda: torch.nested.nested_tensor(ragged, layout=torch.strided),
        "sparse": lambda: q.to_sparse(),
        "quantized": lambda: torch.quantize_per_tensor(q, 0.1, 0, torch.quint8),
        "hidden": lambda: torch.Tensor._make_wrapper_subclass(Hidden, q.shape, dtype=q.dtype),
        "complex": lambda: q.to(torch.complex64),
        "numpy": lambda: q.numpy(),
        "list": lambda: q.tolist(),
        "none": lambda: None,
    }
    return made[kind]()


def extra_like(kind: str) -> Any:
    mask = torch.zeros(1, 1, 6, 6)
    made = {
        "list": lambda: mask.tolist(),
        "numpy": lambda: mask.numpy(),
        "sparse": lambda: mask.to_sparse(),
        "nested": lambda: torch.nested.nested_tensor([mask, mask]),
        "number": lambda: 0.5,
    }
    return made[kind]()


# what is there in place of q, and what the message must say
KINDS = {
    "jagged": ["NestedTensor", "jagged", "cu_seqlens"],
    "nested": ["NestedTensor", "strided", "key_padding_mask"],
    "sparse": ["sparse", "to_dense"],
    "quantized": ["quantized", "dequantize"],
    "hidden": ["Hidden", "__torch_dispatch__"],
    "complex": ["complex64", "fp32"],
    "numpy": ["ndarray", "tensor"],
    "list": ["list", "tensor"],
    "none": ["NoneType", "tensor"],
}
EXTRAS = {
    "list": "list",
    "numpy": "ndarray",
    "sparse": "to_dense",
    "nested": "Nested",
    "number": "0.5",
}
REFUSED = (ValueError, TypeError, NotImplementedError)


def of_another_kind(place: str, kind: str, deviant: int | None) -> Any:
    """On a mesh one rank has it, or all."""
    mesh = worker.mesh(1, 2) if dist.is_initialized() else None
    given = {}
    if mesh is None or deviant in (None, mesh.rank):
        given = {place: q_like(kind) if place == "q" else extra_like(kind)}
    return call(mesh, **given)


ELSEWHERE = [("q", kind) for kind in KINDS]
ELSEWHERE += [
    (place, kind) for place in ("key_padding_mask", "attn_bias", "alibi_slopes") for kind in EXTRAS
]


@pytest.mark.parametrize(("place", "kind"), ELSEWHERE)
def test_tensors_of_other_kinds(pool, place: str, kind: str) -> None:
    words = [place, *(KINDS[kind] if place == "q" else [EXTRAS[kind]])]
    with pytest.raises(REFUSED) as caught:
        of_another_kind(place, kind, None)
    assert all(word in str(caught.value) for word in words), str(caught.value)
    for deviant in (None, 1):
        for message in assert_refused(pool, of_another_kind, place, kind, deviant, ranks=2):
            assert all(word in message for word in words), message


def multihead_of(place: str, kind: str, deviant: int | None) -> Any:
    mesh = worker.mesh(1, 2) if dist.is_initialized() else None
    attention = usp.MultiheadAttention(8, 2, mesh=mesh, batch_first=True)
    given = dict.fromkeys(("query", "key", "value"), torch.zeros(2, 6, 8))
    if mesh is None or deviant in (None, mesh.rank):
        given[place] = q_like(kind) if place in given else extra_like(kind)
    return attention(**given)


MULTIHEAD = [("query", kind) for kind in ("jagged", "nested", "sparse", "hidden", "list", "none")]
MULTIHEAD += [("value", "numpy"), ("key", "quantized")]
MULTIHEAD += [("attn_mask", kind) for kind in EXTRAS]
MULTIHEAD += [("key_padding_mask", kind) for kind in EXTRAS]


@pytest.mark.parametrize(("place", "kind"), MULTIHEAD)
def test_multihead_attention_of_other_kinds(pool, place: str, kind: str) -> None:
    with pytest.raises(REFUSED, match=place):
        multihead_of(place, kind, None)
    for deviant in (None, 1):
        assert_refused(pool, multihead_of, place, kind, deviant, ranks=2)


def a_dtensor(place: str) -> Any:
    mesh = worker.mesh(1, 2)
    x = torch.zeros(2, 12, 4, 8)
    spread = distribute_tensor(x, mesh.device_mesh["ring"], [Shard(1)])
    if place == "q":
        return usp.long_context_attention(spread, spread, spread, mesh)
    return usp.unshard_sequence(spread, mesh, 1)


@pytest.mark.parametrize("place", ["q", "unshard"])
def test_a_dtensor(pool, place: str) -> None:
    for message in assert_refused(pool, a_dtensor, place, ranks=2):
        assert "DTensor" in message and "to_local()" in message


# option: values that are no such thing
NO_SUCH = {
    "seq_len": [
        6.0,
        4.7,
        True,
        "6",
        (6, 6.0),
        (6, True),
        (6, -1),
        {6},
        float("nan"),
        torch.ones(2),
    ],
    "cu_seqlens": [
        (0, 2.5, 6),
        (0, True, 6),
        (0, "6"),
        "06",
        6,
        torch.tensor([0.0, 6.0]),
        torch.tensor([False, True]),
        torch.tensor([[0, 6]]),
        torch.tensor([0, 6], device="meta"),
    ],
    "window_size": [(2.0, None), (True, 1), ("1", 1), "11", 3, {1, 2}, (None, float("inf"))],
    "prefix_len": [True, 2.0, "2", (2,)],
    "causal": [1, 0, None, "yes", 1.0, torch.tensor([True, False])],
    "return_lse": [1, None, "no"],
    "validate": [1, "first", 0.0],
    "dropout_p": [float("nan"), float("inf"), True, "0.1", None, 1, torch.ones(2)],
    "dropout_seed": [-1, 2**64, 0.5, True, "7", float("nan"), torch.ones(2)],
    "chunks": [0, 1.5, "2", True, torch.ones(2)],
    "head_chunks": [-1, None],
    "softcap": [float("nan"), -1.0, True, "2", (2.0,), torch.ones((), requires_grad=True)],
    "softmax_scale": [float("inf"), True, "1", (1.0,), torch.ones(2), zeros(device="meta")],
    "transport": [None, 1, ["ring"], True, ("ring", "allgather")],
    "layout": [None, 1, ["zigzag"], (0, 6), True],
    "backend": [None, 1, ["reference"], {"auto"}],
    "mesh": ["cpu", 2, (1, 1)],
}


def option_of_another_kind(option: str, index: int, deviant: int | None) -> Any:
    mesh = worker.mesh(1, 2) if dist.is_initialized() else None
    options = {"causal": True} if option == "prefix_len" else {}
    options |= {"dropout_p": 0.5} if option == "dropout_seed" else {}
    if mesh is None or deviant in (None, mesh.rank):
        options[option] = NO_SUCH[option][index]
    return call(**{"mesh": mesh, **options})


@pytest.mark.parametrize("option", NO_SUCH)
def test_options_of_other_kinds(pool, option: str) -> None:
    for index in range(len(NO_SUCH[option])):
        with pytest.raises(REFUSED, match="(?i)" + option.split("_")[0]):
            option_of_another_kind(option, index, None)
        for deviant in (None, 0):
            if option != "mesh" or deviant is None:
                assert_refused(pool, option_of_another_kind, option, index, deviant, ranks=2)


@pytest.mark.parametrize(
    "options",
    [
        {"seq_len": np.int64(6), "causal": np.bool_(True), "prefix_len": np.int32(2)},
        {"window_size": [np.int64(2), None], "cu_seqlens": np.array([0, 2, 6])},
        {"cu_seqlens": torch.tensor([0, 2, 6], dtype=torch.int32)},
        {"softcap": np.float32(2.5), "softmax_scale": np.float64(0.25), "seq_len": [6, 6]},
        {"softcap": 2, "softmax_scale": 1, "dropout_p": 0},
        {"seq_len": torch.tensor(6)},
    ],
    ids=str,
)
def test_numbers_of_numpy_and_torch_are_numbers(options: dict) -> None:
    plain = {
        name: value.tolist() if isinstance(value, (np.ndarray, np.generic, torch.Tensor)) else value
        for name, value in options.items()
    }
    torch.manual_seed(0)
    found = call(**options)
    torch.manual_seed(0)
    assert torch.equal(found, call(**plain))


class Watching(TorchDispatchMode):
    """Attention is one op, and its seed a tensor, for whoever looks."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("seed", [0, 1, 2**31, 2**63 - 1, 2**63, 2**64 - 1, np.uint64(2**63 + 5)])
@pytest.mark.parametrize("how", ["auto", "reference", "watched"])
def test_seeds_of_64_bits(seed: Any, how: str) -> None:
    q, k, v = (torch.randn(1, 9, 2, 4, dtype=torch.float64) for _ in range(3))
    options = {"backend": "reference"} if how == "reference" else {}
    with Watching() if how == "watched" else nullcontext():
        found = usp.long_context_attention(q, k, v, dropout_p=0.4, dropout_seed=seed, **options)
    keep = dropout_multiplier(0.4, int(seed), 1, 2, 9, 9)
    torch.testing.assert_close(found, dense_attention(q, k, v, dropout_keep=keep)[0])


def sharding_of(what: str, value: Any) -> Any:
    mesh = worker.mesh(1, 2) if dist.is_initialized() else None
    given = {"x": torch.zeros(2, 6, 3), "dim": 1, "layout": "zigzag", "seq_len": 12} | {what: value}
    if what == "x":
        given["x"] = q_like(value)
    if mesh is not None:
        usp.unshard_sequence(mesh=mesh, **given)
    usp.positions(given["seq_len"], mesh, given["layout"])
    del given["seq_len"]
    return usp.shard_sequence(mesh=mesh, **given)


SHARDING = [("x", kind) for kind in KINDS if kind != "complex"]
SHARDING += [("dim", 1.0), ("dim", True), ("dim", "1"), ("dim", 3), ("dim", -4)]
SHARDING += [("layout", None), ("layout", ["zigzag"]), ("layout", "diagonal")]
SHARDING += [("seq_len", 12.0), ("seq_len", True), ("seq_len", -1), ("seq_len", "12")]


@pytest.mark.parametrize(("what", "value"), SHARDING, ids=str)
def test_sharding_of_other_kinds(pool, what: str, value: Any) -> None:
    with pytest.raises(REFUSED):
        sharding_of(what, value)
    assert_refused(pool, sharding_of, what, value, ranks=2)


@pytest.mark.parametrize("name", WRONG)
def test_on_one_device(name: str) -> None:
    changed, fragments = WRONG[name]
    with pytest.raises(ValueError) as caught:
        call(**changed)
    assert all(fragment in str(caught.value) for fragment in fragments), str(caught.value)


def test_what_no_backend_does_is_not_implemented() -> None:
    with pytest.raises(NotImplementedError, match="alibi_slopes"):
        call(alibi_slopes=torch.ones(4, requires_grad=True))
    with pytest.raises(NotImplementedError, match=r"sdpa.*softcap"):
        call(backend="sdpa", softcap=2.0, v=zeros(2, 6, 2, 8))
    with pytest.raises(NotImplementedError, match=r"sdpa.*8.*5"):
        call(backend="sdpa")


def everywhere(name: str) -> None:
    call(worker.mesh(2, 2), **WRONG[name][0])


@pytest.mark.parametrize("name", WRONG)
def test_on_every_rank(pool, name: str) -> None:
    """The same mistake on all ranks, and nobody compares: each finds it by itself."""
    assert_refused(pool, everywhere, name, ranks=4)


def started() -> None:
    """Nothing to do."""


def assert_refused(pool, function: Callable, *args: Any, ranks: int) -> list[str]:
    """Every rank raises, within seconds; the ranks can go on afterwards."""
    pool.run(started, ranks=ranks)  # starting workers takes time, refusing none
    began = time.monotonic()
    outcomes = pool.outcomes(function, *args, ranks=ranks)
    assert time.monotonic() - began < 10
    for outcome in outcomes:
        assert isinstance(outcome, RemoteError), "a rank saw nothing wrong"
        assert outcome.kind in ("ValueError", "TypeError", "NotImplementedError"), str(outcome)
    return [outcome.message for outcome in outcomes]


# one rank of four deviates: what it changes, and both values, which every rank must hear
DEVIATIONS = {
    "causal": ({"causal": True}, {}, ["causal()"]),
    "window": ({"window_size": (3, None)}, {"window_size": (4, None)}, ["3", "4"]),
    "documents": ({"cu_seqlens": (0, 9, 24)}, {"cu_seqlens": (0, 8, 24)}, ["9", "8"]),
    "prefix": ({"causal": True, "prefix_len": 3}, {"causal": True}, ["3", "0"]),
    "scale": ({"softmax_scale": 0.25}, {"softmax_scale": 0.5}, ["0.25", "0.5"]),
    "softcap": ({"softcap": 2.5}, {}, ["2.5", "0.0"]),
    "layout": ({"layout": "zigzag"}, {"layout": "striped"}, ["zigzag", "striped"]),
    "transport": ({"transport": "allgather"}, {}, ["allgather", "auto"]),
    "return_lse": ({"return_lse": True}, {}, ["True", "False"]),
    "backend": ({"backend": "reference"}, {"backend": "sdpa", "same_dims": True}, ["reference"]),
    "seq_len": ({"seq_len": (24, 25)}, {"seq_len": (24, 24)}, ["25"]),
    "dtype": ({"dtype": torch.bfloat16}, {}, ["bfloat16", "float32"]),
    "batch": ({"batch": 3}, {}, ["2", "3"]),
    "local tokens": ({"tokens": 8}, {}, ["8", "26 in all"]),
    "query heads": ({"heads": 6}, {}, ["4", "6"]),
    "key heads": ({"kv_heads": 1}, {}, ["1", "2"]),
    "head_dim": ({"head_dim": 9}, {}, ["8", "9"]),
    "rank of q": ({"flat": True}, {}, ["(2, 6, 32)"]),
    "mask": ({"key_padding_mask": torch.zeros(2, 6, dtype=torch.bool)}, {}, ["True", "False"]),
    "mask shape": ({"key_padding_mask": torch.zeros(2, 5, dtype=torch.bool)}, {}, ["(2, 5)"]),
    "bias": ({"attn_bias": torch.zeros(1, 1, 6, 24)}, {}, ["24", "None"]),
    "bias rows": (
        {"attn_bias": torch.zeros(1, 1, 6, 24)},
        {"attn_bias": torch.zeros(1, 1, 1, 24)},
        ["one each", "one for all"],
    ),
    "slopes": ({"alibi_slopes": torch.ones(4)}, {}, ["None", "1.0"]),
    "slope values": (
        {"alibi_slopes": torch.ones(4)},
        {"alibi_slopes": torch.full((4,), 0.5)},
        ["0.5", "1.0"],
    ),
    "dropout": ({"dropout_p": 0.25}, {"dropout_p": 0.5}, ["0.25", "0.5"]),
    "dropout or not": ({"dropout_p": 0.25}, {}, ["0.25", "0.0"]),
    "gradients": ({"requires_grad": True}, {}, ["True", "False"]),
    "unknown layout": ({"layout": "diagonal"}, {}, ["diagonal", "zigzag"]),
    "unknown backend": ({"backend": "abacus"}, {}, ["abacus", "reference"]),
    "offload": ({"offload": "cpu"}, {}, ["offload", "cpu", "None"]),
    "no tensor": ({"no_tensor": True}, {}, ["q"]),
    "no pair": ({"window_size": 3}, {}, ["3", "pair"]),
    "no values": ({"device": "meta"}, {}, ["long_context_attention", "no values"]),
    "fake tensors": ({"fake": True}, {}, ["long_context_attention", "no values"]),
}


def shaped(
    *,
    batch: int = 2,
    tokens: int = 6,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 8,
    dtype: torch.dtype = torch.float32,
    same_dims: bool = True,
    flat: bool = False,
    no_tensor: bool = False,
    requires_grad: bool = False,
    device: str = "cpu",
    fake: bool = False,
    **options: Any,
) -> tuple[dict[str, Any], dict[str, Any]]:
    with FakeTensorMode() if fake else torch.device(device):
        q = torch.randn(batch, tokens, heads, head_dim, dtype=dtype, requires_grad=requires_grad)
        k = torch.randn(batch, tokens, kv_heads, head_dim, dtype=dtype)
    if flat:
        q = q.flatten(2)
    return {"q": None if no_tensor else q, "k": k, "v": k.clone()}, options


def deviates(name: str, deviant: int) -> None:
    """A module's first call, in which one rank is told something else."""
    changed = DEVIATIONS[name][0 if dist.get_rank() == deviant else 1]
    tensors, options = shaped(**changed)
    passed = ("key_padding_mask", "attn_bias", "cu_seqlens", "seq_len", "alibi_slopes")
    at_call = {key: options.pop(key) for key in passed if key in options}
    attention = usp.LongContextAttention(worker.mesh(2, 2), **options)
    call(attention=attention, **tensors, **at_call)


@pytest.mark.parametrize("deviant", [0, 3])
@pytest.mark.parametrize("name", DEVIATIONS)
def test_one_rank_differs_and_all_hear_of_it(pool, name: str, deviant: int) -> None:
    for message in assert_refused(pool, deviates, name, deviant, ranks=4):
        assert all(value in message for value in DEVIATIONS[name][2]), message


def seeds_differ() -> None:
    call(worker.mesh(2, 2), dropout_p=0.5, dropout_seed=dist.get_rank() // 3)


def test_ranks_that_are_given_different_dropout_seeds(pool) -> None:
    """Those that they draw may differ: the first rank's counts."""
    for message in assert_refused(pool, seeds_differ, ranks=4):
        assert "dropout_seed: rank 0 has 0, rank 3 has 1" in message


# what one rank of four has in place of a (2, 3, 4) shard of 12 tokens, and what all must hear
UNSHARDS = {
    "length": ({"x": zeros(2, 2, 4), "seq_len": 12}, {"seq_len": 12}, ["holds 2", "3 of 12"]),
    "length of all": ({"seq_len": 13}, {"seq_len": 12}, ["13", "12|holds 3"]),
    "no seq_len": ({"x": zeros(2, 1, 4)}, {}, ["1", "10 in all"]),
    "no values": (
        {"x": zeros(2, 3, 4, device="meta"), "seq_len": 12},
        {"seq_len": 12},
        ["no values"],
    ),
    "seq_len or not": ({"seq_len": 12}, {}, ["12", "not given"]),
    "dims": ({"x": zeros(2, 3, 5)}, {}, ["(2, 'tokens', 4)", "(2, 'tokens', 5)"]),
    "which dim": ({"x": zeros(3, 3, 4), "dim": 0}, {"x": zeros(3, 3, 4)}, ["'tokens', 3, 4)"]),
    "no such dim": ({"dim": 3}, {}, ["no dim 3", "(2, 3, 4)"]),
    "dtype": ({"x": zeros(2, 3, 4).double()}, {}, ["float64", "float32"]),
    "layout": ({"layout": "zigzag"}, {"layout": "striped"}, ["zigzag", "striped"]),
    "unknown layout": ({"layout": "diagonal"}, {}, ["diagonal", "zigzag"]),
    "gradient": ({"x": zeros(2, 3, 4).requires_grad_()}, {}, ["True", "False"]),
}


def unshards(name: str, deviant: int) -> None:
    options = {"x": zeros(2, 3, 4), "dim": 1}
    options |= UNSHARDS[name][0 if dist.get_rank() == deviant else 1]
    usp.unshard_sequence(mesh=worker.mesh(2, 2), **options)


@pytest.mark.parametrize("deviant", [0, 3])
@pytest.mark.parametrize("name", UNSHARDS)
def test_one_rank_joins_something_else_and_all_hear_of_it(pool, name: str, deviant: int) -> None:
    for message in assert_refused(pool, unshards, name, deviant, ranks=4):
        for values in UNSHARDS[name][2]:
            assert any(value in message for value in values.split("|")), message


def decoded(mesh: usp.SequenceMesh, layout: Any) -> None:
    cache = usp.ShardedCache(mesh)
    cache.append(zeros(1, 3, 1, 1), zeros(1, 3, 1, 1))
    usp.decode_attention(zeros(1, 1, 1, 1), cache, mesh, layout=layout)


# functions of a whole, and what one rank alone says wrong of it
ASKS: dict[str, Callable[[usp.SequenceMesh, bool], Any]] = {
    "linear's layout": lambda mesh, wrong: usp.linear_attention(
        *[zeros(1, 2, 1, 1)] * 3, mesh=mesh, layout="zigzag" if wrong else "contiguous"
    ),
    "linear's unknown layout": lambda mesh, wrong: usp.linear_attention(
        *[zeros(1, 2, 1, 1)] * 3, mesh=mesh, layout=None if wrong else "contiguous"
    ),
    "linear's length": lambda mesh, wrong: usp.linear_attention(
        *[zeros(1, 2, 1, 1)] * 3, mesh=mesh, seq_len=4.0 if wrong else 4
    ),
    "seed of chunks": lambda mesh, wrong: call(
        mesh, chunks=2, dropout_p=0.5, dropout_seed="7" if wrong else 7
    ),
    "chunks without values": lambda mesh, wrong: usp.long_context_attention(
        *[zeros(1, 2, 1, 1, device="meta" if wrong else "cpu")] * 3, mesh, chunks=2
    ),
    "q beside a mask": lambda mesh, wrong: call(
        mesh, attn_mask=zeros(6, 12, dtype=torch.bool), **({"q": None} if wrong else {})
    ),
    "bias beside a mask": lambda mesh, wrong: call(
        mesh,
        attn_mask=zeros(6, 12, dtype=torch.bool),
        attn_bias=zeros(*(1,) * (3 if wrong else 4)),
    ),
    "LSE beside sinks": lambda mesh, wrong: call(
        mesh, sinks=zeros(4), return_lse="no" if wrong else False
    ),
    "layout of a decoded query": lambda mesh, wrong: decoded(mesh, 1 if wrong else None),
    "dynamic dims": lambda mesh, wrong: usp.dsp.DynamicShard.of(
        zeros(2, 2, 4), (1, 3 if wrong else 2), mesh
    ),
    "parameters": lambda mesh, wrong: usp.all_reduce_gradients(None if wrong else [], mesh),
    "group of gradients": lambda mesh, wrong: usp.all_reduce_gradients(
        [], mesh, dist.group.WORLD if wrong else None
    ),
    "sums of gradients": lambda mesh, wrong: usp.all_reduce_gradients(
        [], mesh, accumulate_in_fp32=wrong
    ),
    "group of a loss": lambda mesh, wrong: usp.cross_entropy(
        zeros(2, 3), zeros(2, dtype=torch.int64), mesh, dist.group.WORLD if wrong else None
    ),
    "held": lambda mesh, wrong: usp.held(2**63 if wrong else 2, mesh),
    "documents": lambda mesh, wrong: usp.Spread.infer(
        2, mesh, cu_seqlens=(0, 5, 4) if wrong else (0, 4)
    ),
    "other documents": lambda mesh, wrong: usp.Spread.infer(
        2, mesh, cu_seqlens=(0, 3, 4) if wrong else (0, 4)
    ),
}


def asks(name: str) -> Any:
    mesh = worker.mesh(1, 2)
    return ASKS[name](mesh, mesh.rank == 1)


@pytest.mark.parametrize("name", ASKS)
def test_what_one_rank_alone_says_of_a_whole(pool, name: str) -> None:
    assert_refused(pool, asks, name, ranks=2)


def without_values(name: str, fake: bool) -> Any:
    """One rank of two has shapes alone."""
    mesh = worker.mesh(1, 2)
    with FakeTensorMode() if fake and mesh.rank else nullcontext():
        return NO_VALUES[name](mesh, "meta" if mesh.rank and not fake else "cpu")


# functions of a mesh and a device, beside attention and unsharding
NO_VALUES: dict[str, Callable[[usp.SequenceMesh, str], Any]] = {
    "take": lambda mesh, on: usp.take(zeros(2, 6, 4, device=on), mesh, [0], seq_len=12),
    "roll": lambda mesh, on: usp.roll(zeros(2, 6, 4, device=on), mesh, 1),
    "mean": lambda mesh, on: usp.mean(zeros(2, 6, 4, device=on), mesh),
    "switch": lambda mesh, on: usp.dsp.switch(zeros(2, 6, 4, device=on), 1, 2, mesh),
    "loss": lambda mesh, on: usp.cross_entropy(
        zeros(6, 3, device=on), zeros(6, dtype=torch.int64, device=on), mesh
    ),
    "linear": lambda mesh, on: usp.linear_attention(*[zeros(2, 6, 2, 4, device=on)] * 3, mesh=mesh),
    "multihead": lambda mesh, on: usp.MultiheadAttention(
        8, 2, mesh=mesh, batch_first=True, seq_len=12, device=on
    )(*[zeros(2, 6, 8, device=on)] * 3),
    "latent": lambda mesh, on: usp.latent_attention(
        zeros(2, 6, 2, 5, device=on),
        zeros(2, 6, 7, device=on),
        zeros(2, 6, 1, device=on),
        *[zeros(2, 4, 7, device=on)] * 2,
        mesh,
    ),
}


@pytest.mark.parametrize("fake", [False, True], ids=["meta", "fake"])
@pytest.mark.parametrize("name", NO_VALUES)
def test_values_that_one_rank_does_not_have(pool, name: str, fake: bool) -> None:
    for message in assert_refused(pool, without_values, name, fake, ranks=2):
        assert "no values" in message or "without values" in message, message


def function_validates(validate: bool) -> Any:
    causal = dist.get_rank() == 2
    return call(worker.mesh(2, 2), causal=causal, validate=validate).shape


def test_the_function_compares_on_request(pool) -> None:
    for message in assert_refused(pool, function_validates, True, ranks=4):
        assert "rank 2" in message and "disagree" in message


def test_workers_go_on_after_refusals(pool) -> None:
    judge(Case(ulysses=2, ring=2, seq_len=13, heads=3, kv_heads=3, causal=True), pool)


def later_calls(validate: str) -> str:
    attention = usp.LongContextAttention(worker.mesh(1, 2), validate=validate)
    tensors, _ = shaped()
    attention(*tensors.values())
    # the same on all ranks: fine; then one rank changes what all must agree on
    attention(*(x[:1] for x in tensors.values()))
    tensors, _ = shaped(dtype=torch.float32 if dist.get_rank() else torch.float64)
    attention(*tensors.values())
    return "done"


def test_always_compares_every_call(pool) -> None:
    for message in assert_refused(pool, later_calls, "always", ranks=2):
        assert "float32" in message and "float64" in message
