"""What a call is given, checked once; where ranks share the sequence, by all of them together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from usp.distributed.agreement import (
    LENGTH_ADVICE,
    Advised,
    Facts,
    When,
    check_on_all_ranks,
    check_when,
    meets,
    new_name,
)
from usp.distributed.mesh import SequenceMesh, check_mesh, degrees_and_place
from usp.linear_attention.exchange import METHODS
from usp.planning.kinds import DTYPES, check_kinds, device_type, flag, integer, tensor
from usp.planning.layout import Held, Layout
from usp.planning.masks.bounds import check_cu_seqlens
from usp.planning.shares import named_lengths, shares, summed_length


@dataclass(frozen=True, eq=False)
class Given:
    """The tensors of a call.

    Attributes:
        q, k, v, decay, beta, initial_state: See ``linear_attention``.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    decay: Tensor | None
    beta: Tensor | None
    initial_state: Tensor | None

    @property
    def heads(self) -> int:
        """H, of out and states."""
        return max(x.shape[2] for x in (self.q, self.k, self.v))

    @property
    def decay_of(self) -> str | None:
        """What has a decay of its own: "heads", "tokens" or "channels"."""
        if self.decay is None:
            return None
        return ("heads", "tokens", "channels")[max(self.decay.dim() - 2, 0)]

    @property
    def needed(self) -> list[bool]:
        """Which of them need a gradient."""
        tensors = (self.q, self.k, self.v, self.decay, self.beta, self.initial_state)
        graded = torch.is_grad_enabled()
        return [graded and x is not None and x.requires_grad for x in tensors]


@dataclass(frozen=True)
class Options:
    """The rest of its arguments; see ``linear_attention``."""

    method: str = "gather"
    causal: bool = True
    cu_seqlens: Sequence[int] | Tensor | None = None
    return_state: bool = False
    layout: Layout = "contiguous"
    seq_len: int | None = None


@dataclass(frozen=True)
class Request:
    """What is to be computed.

    Attributes:
        documents: Boundaries of documents, from 0 to the length of the whole.
        first: Of each rank the position of its first token, and behind them the length.
        rank: This one.
        name: Of this call, where the ranks have met.
    """

    documents: tuple[int, ...]
    first: tuple[int, ...]
    rank: int
    name: int | None

    @property
    def mine(self) -> tuple[int, int]:
        """Positions of this rank's tokens, from and up to."""
        return self.first[self.rank], self.first[self.rank + 1]


def agree(given: Given, options: Options, mesh: SequenceMesh | None, validate: When) -> Request:
    """The arguments, checked; together with all ranks of the mesh where these meet.

    Raises:
        TypeError, ValueError, NotImplementedError: what does not fit, on every rank that meets.
    """
    asks = options.seq_len is None and isinstance(options.layout, str)

    def check() -> int | None:
        check_when(validate)
        length = _check(given, options)
        if length is not None:
            _request(given, options, mesh, length, None)  # that the others hear of it
        return length

    if (
        check_mesh(mesh) is None
        or mesh is None
        or not meets(mesh, None if asks else validate, asks)
    ):
        length = check()
        return _request(given, options, mesh, given.q.shape[1] if length is None else length, None)
    length, told = check_on_all_ranks(
        mesh,
        "linear_attention",
        check,
        lambda length: _facts(given, options, length),
        lambda: (given.q.shape[1], new_name()),
    )
    if length is None:
        held = [tokens for tokens, *_ in told]
        length = summed_length("q", held, options.layout, degrees_and_place(mesh)[0])
    return _request(given, options, mesh, length, told[0][1])


def _check(given: Given, options: Options) -> int | None:
    """The length of the whole as far as one rank can tell; and what it can see is wrong."""
    if options.method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {options.method!r}")
    causal = flag("causal", options.causal)
    returns = flag("return_state", options.return_state)
    layout = options.layout
    if layout != "contiguous" and not isinstance(layout, Held):
        raise ValueError(
            "a state is handed on in the order of the sequence: layout must be 'contiguous' or "
            f"usp.Held, got {layout!r}"
        )
    _check_qkv(given)
    if given.decay is not None:
        _check_decay(given.decay, given)
    if given.beta is not None:
        _check_beta(given.beta, given)
    if given.initial_state is not None:
        _check_state(given.initial_state, given)
    ordered = given.decay, given.beta, given.initial_state
    if not causal and (returns or any(x is not None for x in ordered)):
        decay, beta, state = (_shape(x) for x in ordered)
        raise ValueError(
            "causal=False has no order: it takes no decay, no beta and no initial_state, and "
            f"returns no state, got decay {decay}, beta {beta}, initial_state {state}, "
            f"return_state={returns}"
        )
    if options.cu_seqlens is not None:
        check_cu_seqlens(options.cu_seqlens)
    whole = None if options.seq_len is None else integer("seq_len", options.seq_len, least=0)
    named = named_lengths(whole, layout)
    return None if named is None else named[0]


def _check_qkv(given: Given) -> None:
    q, k, v = given.q, given.k, given.v
    check_kinds(q, k, v)
    for name, x in (("k", k), ("v", v)):
        if x.shape[:2] != q.shape[:2]:
            raise ValueError(
                f"q, k and v must have the same samples and tokens: q has {tuple(q.shape[:2])}, "
                f"{name} has {tuple(x.shape[:2])}"
            )
    if q.shape[3] != k.shape[3] or not q.shape[3] or not v.shape[3]:
        raise ValueError(
            f"head_dim of q and k must be equal and none may be 0: q has {q.shape[3]}, "
            f"k has {k.shape[3]}, v has {v.shape[3]}"
        )
    heads = [x.shape[2] for x in (q, k, v)]
    if not all(heads) or any(max(heads) % each for each in heads):
        raise ValueError(
            "the largest number of heads must be a multiple of the others: q, k and v have "
            f"{heads[0]}, {heads[1]} and {heads[2]}"
        )


def _check_decay(decay: Tensor, given: Given) -> None:
    q = given.q
    tensor("decay", decay)
    batch, length, _, dim = q.shape
    heads = given.heads
    shapes = (heads,), (batch, length, heads), (batch, length, heads, dim)
    if tuple(decay.shape) not in shapes:
        raise ValueError(
            f"decay must be (heads,), (batch, sequence, heads) or (batch, sequence, heads, "
            f"head_dim), here {shapes[0]}, {shapes[1]} or {shapes[2]}, got {tuple(decay.shape)}"
        )
    if decay.dtype not in DTYPES or decay.device != q.device:
        raise ValueError(
            f"decay must be floating point, the log of the factor, on the device of q: q is on "
            f"{q.device}, decay is {decay.dtype} on {decay.device}"
        )


def _check_beta(beta: Tensor, given: Given) -> None:
    tensor("beta", beta)
    expected = *given.q.shape[:2], given.heads
    if tuple(beta.shape) != expected:
        raise ValueError(
            f"beta must be (batch, sequence, heads), here {expected}, got {tuple(beta.shape)}"
        )
    if beta.dtype not in DTYPES or beta.device != given.q.device:
        raise ValueError(
            f"beta must be floating point on the device of q: q is on {given.q.device}, beta is "
            f"{beta.dtype} on {beta.device}"
        )


def _check_state(state: Tensor, given: Given) -> None:
    tensor("initial_state", state)
    expected = given.q.shape[0], given.heads, given.q.shape[3], given.v.shape[3]
    if tuple(state.shape) != expected:
        raise ValueError(
            "initial_state must be (batch, heads, head_dim, value head_dim) = "
            f"{expected}, got {tuple(state.shape)}"
        )
    if state.dtype not in DTYPES or state.device != given.q.device:
        raise ValueError(
            f"initial_state must be floating point on the device of q: q is on {given.q.device}, "
            f"initial_state is {state.dtype} on {state.device}"
        )


def _request(
    given: Given, options: Options, mesh: SequenceMesh | None, length: int, name: int | None
) -> Request:
    """The second half: what is told may differ between ranks in shares alone."""
    degrees, _ = degrees_and_place(mesh)
    rank = 0 if mesh is None else mesh.rank
    of_ranks = shares(options.layout, length, *degrees)
    if given.q.shape[1] != of_ranks[rank]:
        raise ValueError(
            f"rank {rank} holds {given.q.shape[1]} tokens, but layout {options.layout} gives it "
            f"{of_ranks[rank]} of {length}: cut with usp.shard_sequence and pass seq_len= of the "
            "whole sequence"
        )
    documents: tuple[int, ...] = (0, length)
    if options.cu_seqlens is not None:
        documents = check_cu_seqlens(options.cu_seqlens)
        if documents[-1] != length:
            raise ValueError(
                f"cu_seqlens must end with the length of the whole sequence, {length}, got "
                f"{documents[-1]}"
            )
    return Request(documents, tuple(accumulate(of_ranks, initial=0)), rank, name)


def _facts(given: Given, options: Options, length: int | None) -> Facts:
    documents = options.cu_seqlens
    return {
        "batch size": given.q.shape[0],
        "heads of q, k and v": tuple(x.shape[2] for x in (given.q, given.k, given.v)),
        "head_dim": (given.q.shape[3], given.v.shape[3]),
        "dtype": given.q.dtype,
        "device type": device_type(given.q),
        "seq_len": Advised("not given" if length is None else length, LENGTH_ADVICE),
        "layout": options.layout,
        "decay": given.decay_of,
        "beta": given.beta is not None,
        "method": options.method,
        "causal": options.causal,
        "cu_seqlens": None if documents is None else check_cu_seqlens(documents),
        "initial_state": given.initial_state is not None,
        "return_state": options.return_state,
        # each exchanges in its backward what it needs, so all must need it
        "gradients needed of q, k, v, decay, beta, initial_state": given.needed,
    }


def _shape(x: Tensor | None) -> object:
    return None if x is None else tuple(x.shape)
