"""The function: checked, put into chunks, and joined over ranks by states."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from usp.distributed.agreement import When
from usp.distributed.comm import untraced
from usp.distributed.mesh import SequenceMesh, check_mesh
from usp.linear_attention import families, fused, kernels, op, plain, whole_op
from usp.linear_attention.arguments import Given, Options, Request, agree
from usp.linear_attention.both_ways import both_ways
from usp.linear_attention.exchange import Chain
from usp.linear_attention.states import Meeting, begin, states_before
from usp.planning.layout import Layout
from usp.planning.problem import state_dtype
from usp.planning.shares import named_lengths


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None = None,
    *,
    beta: Tensor | None = None,
    mesh: SequenceMesh | None = None,
    method: str = "gather",
    causal: bool = True,
    cu_seqlens: Sequence[int] | Tensor | None = None,
    initial_state: Tensor | None = None,
    return_state: bool = False,
    layout: Layout = "contiguous",
    seq_len: int | None = None,
    validate: bool | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Linear attention over a sequence that is spread over the ranks of a mesh.

    Of each head ``S_t = diag(exp(decay_t)) S_{t-1} + k_t^T v_t`` and ``o_t = q_t S_t``: no softmax,
    no scale, no feature map and no normaliser, which are the caller's. With ``beta`` it is the
    delta rule: in the place of ``v_t`` stands ``beta_t (v_t - k_t diag(exp(decay_t)) S_{t-1})``.
    Cost and memory are linear in the length, and what ranks send does not depend on it: a state
    each, and by the delta rule a matrix of D x D a head.

    Args:
        q: (B, L, Hq, D) fp16 | bf16 | fp32 | fp64. This rank's tokens.
        k: (B, L, Hk, D), dtype and device of q.
        v: (B, L, Hv, Dv), like k. H, the largest number of heads, is a multiple of the other two,
            each of whose heads stands for H / of them neighbours.
        decay: Logs of the factors, natural, 0 or less: (H,) one a head (retention, lightning), (B,
            L, H) one a token and head (Mamba-2's SSD), (B, L, H, D) one a key channel too (GLA);
            None is no decay. Any float dtype. -inf forgets all that was before; above 0 grows,
            and may overflow. The gradient of (H,) is this rank's part of the sum.
        beta: (B, L, H), the strength of each write (DeltaNet, with a decay gated DeltaNet). Any
            float dtype. A state grows where ``beta |k|^2`` is above 2: keys are mostly normalised.
        mesh: The ranks that share the sequence, all of them in its order, whatever the shape of the
            mesh; None is one device.
        method: "gather": everyone is told everyone's state and decay (by the delta rule the matrix
            in its place), in one collective. "ring":
            the state is passed from rank to rank. The same result, to the bit.
        causal: Whether a token sees itself and those before it, or all of its document; then
            without decay and states, and ranks add their sums up.
        cu_seqlens: Global boundaries ``(0, ..., total)`` of packed documents, host integers: each
            but the first begins with an empty state.
        initial_state: (B, H, D, Dv) before the first token of the whole, the same on every rank.
            Its gradient is this rank's part of the sum: all of it on the first rank.
        return_state: Also return the state behind the last token of the whole.
        layout: "contiguous", or ``usp.Held(counts)``.
        seq_len: Tokens of the whole; by default what the ranks hold, which they tell each other.
        validate: Whether the ranks compare their arguments first; see ``long_context_attention``.

    Returns:
        (B, L, H, Dv) in the dtype of q. With ``return_state`` also (B, H, D, Dv), fp32 (fp64 for
        fp64), the same on every rank: gradients of it are added up over ranks, and a loss that all
        ranks compute alike of it is divided by ``mesh.size``.

    Raises:
        TypeError: an argument is of another kind.
        ValueError: arguments do not fit each other, this rank's share, or those of another rank;
            or a layout that is not in the order of the sequence.
        NotImplementedError: a tensor is no plain one; or a second derivative, forward mode.

    Source:
        LASP arXiv:2404.02882, LASP-2 arXiv:2502.07563; the delta rule 2406.06484, 2412.06464.
    """
    given = Given(q, k, v, decay, beta, initial_state)
    options = Options(method, causal, cu_seqlens, return_state, layout, seq_len)
    return attend(given, options, mesh, validate)


def attend(
    given: Given, options: Options, mesh: SequenceMesh | None, validate: When
) -> Tensor | tuple[Tensor, Tensor]:
    """``linear_attention`` with its arguments in two parts."""
    alone = check_mesh(mesh) is None or mesh is None or mesh.size == 1
    in_graph = torch.compiler.is_compiling() and options.causal
    if in_graph and (alone or named_lengths(options.seq_len, options.layout) is not None):
        return _attend_in_graph(given, options, mesh, validate)
    return (_attend if alone else untraced(_attend))(given, options, mesh, validate)


def _attend(
    given: Given, options: Options, mesh: SequenceMesh | None, validate: When
) -> Tensor | tuple[Tensor, Tensor]:
    request = agree(given, options, mesh, validate)
    chain = Chain.of(mesh, options.method, options.return_state)
    meeting = Meeting(mesh, request.name)
    if not options.causal:
        q, k, v = _wide(given)
        return both_ways(q, k, v, request, chain.axis, meeting).to(given.q.dtype)
    family = families.chosen(_traits(given))
    if family is not None:
        tokens = _tokens(given, request)
        out, final = fused.attend(tokens, _initial(given), family, chain, meeting)
        return out if final is None else (out, final)

    def between(transitions: Tensor, updates: Tensor, initial: Tensor) -> plain.Between:
        arrived = begin(transitions, updates, initial, chain)
        return lambda: states_before(transitions, updates, initial, chain, arrived, meeting)

    return _causal(given, request, between)


def _attend_in_graph(
    given: Given, options: Options, mesh: SequenceMesh | None, validate: When
) -> Tensor | tuple[Tensor, Tensor]:
    """The same as one op, or by the delta rule with what ranks do together as one. They meet when
    it runs."""
    request = agree(given, options, mesh, False)
    chain, sequence = (options.method, options.return_state), (request.first, request.documents)
    told = op.settings(chain, sequence, given.needed, mesh, validate)
    if given.beta is None:
        out, final = whole_op.attend(_tokens(given, request), _initial(given), told)
        return out if final is None else (out, final)

    def between(transitions: Tensor, updates: Tensor, initial: Tensor) -> plain.Between:
        return lambda: op.states(transitions, updates, initial, told)

    return _causal(given, request, between)


def _causal(given: Given, request: Request, between: plain.Begin) -> Tensor | tuple[Tensor, Tensor]:
    q, k, v = _wide(given)
    beta = None if given.beta is None else given.beta.to(q.dtype)[..., None]
    tokens = plain.Wide(q, k, v, _log_decay(given, _starts(request)), beta)
    out, final = plain.walk(tokens, _initial(given), between)
    out = out.to(given.q.dtype)
    return out if final is None else (out, final)


def _wide(given: Given) -> tuple[Tensor, ...]:
    """q, k and v in the dtype of the state, with all heads."""
    return tuple(plain.all_heads(x, given.heads) for x in (given.q, given.k, given.v))


def _starts(request: Request) -> list[int]:
    """Which of this rank's tokens begin with an empty state."""
    start, stop = request.mine
    inner = (a for a, _ in pairwise(request.documents[1:]))
    return sorted({a - start for a in inner if start <= a < stop})


def _initial(given: Given) -> Tensor:
    """(B, H, D, Dv) in the dtype of the state."""
    dtype = state_dtype(given.q.dtype)
    if given.initial_state is not None:
        return given.initial_state.to(dtype)
    shape = given.q.shape[0], given.heads, given.q.shape[3], given.v.shape[3]
    return given.q.new_zeros(shape, dtype=dtype)


def _log_decay(given: Given, starts: list[int]) -> Tensor:
    """(b, L, h, d) in the dtype of the state, -inf where a document starts."""
    length, dtype = given.q.shape[1], state_dtype(given.q.dtype)
    if given.decay is None:
        g = given.q.new_zeros((1, length, 1, 1), dtype=dtype)
    else:
        g = given.decay.to(dtype)
        if g.dim() == 1:
            g = g.view(1, 1, -1, 1).expand(-1, length, -1, -1)
        g = g if g.dim() == 4 else g[..., None]
    if not starts:
        return g
    is_start = torch.zeros(length, dtype=torch.bool, device="cpu")
    is_start[starts] = True
    return g.masked_fill(is_start.to(given.q.device)[None, :, None, None], float("-inf"))


def _tokens(given: Given, request: Request) -> kernels.Tokens:
    starts, g = _starts(request), None
    if starts or given.decay is not None:
        g = _log_decay(given, starts)
        g = g if given.decay_of == "channels" else g[..., 0]
    return kernels.Tokens(given.q, given.k, given.v, g)


def _traits(given: Given) -> kernels.Traits:
    dims = given.q.shape[3], given.v.shape[3]
    device, dtype = given.q.device, given.q.dtype
    return kernels.Traits(device, dtype, dims, given.decay_of, given.beta is not None)
