"""``nn.MultiheadAttention`` over a sequence that is spread over the ranks of a mesh.

Shape letters: N batch, L local queries, S local keys, H heads, D head dim, E embedding.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any, cast

import torch
from torch import Tensor, nn

from usp.attention.functional import draw_dropout_seed
from usp.distributed.agreement import (
    When,
    check_on_all_ranks,
    compares_now,
    meet_without_values,
    meets,
)
from usp.distributed.mesh import SequenceMesh
from usp.nn.multihead import forward as multihead_forward
from usp.nn.multihead.arguments import Arguments
from usp.nn.multihead.extra_keys import make_extra_keys
from usp.nn.multihead.forward import Projected
from usp.nn.multihead.meeting import PLACE, meet_in_graph
from usp.nn.multihead.placement import Placement
from usp.nn.multihead.projections import join_heads, project
from usp.nn.multihead.uncut import content, refuse_equal
from usp.nn.tracing import one_node
from usp.ops.precision import as_given
from usp.planning.kinds import is_fake
from usp.planning.layout import Layouts
from usp.planning.masks.mask import Everything, Mask


class MultiheadAttention(nn.MultiheadAttention):
    """``nn.MultiheadAttention`` with the sequence spread over a mesh: the same parameters,
    ``state_dict``, arguments and results, each rank with its own tokens.

    The gradients of the parameters are this rank's part: their sum over the ranks is that of one
    device. A query that may attend to nothing gets 0 where torch gives NaN.

    Args:
        embed_dim, num_heads, bias, add_bias_kv, add_zero_attn, kdim, vdim, batch_first: As in
            ``torch.nn.MultiheadAttention``.
        dropout: As there, below 1. What it drops depends on global positions and one number of
            torch's default CPU generator: see ``long_context_attention``.
        device, dtype: As in ``torch.nn.MultiheadAttention``.
        mesh: The ranks that share the sequence; None is one device.
        layout: Which tokens this rank holds, or (of queries, of keys): see
            ``long_context_attention``.
        seq_len: Tokens of the whole sequence, or (query, key) lengths; None is the sum of what
            the ranks hold, which they tell each other at each call (48 bytes along each axis of
            the mesh, whatever ``validate`` says); "infer" is another word for it.
        transport, backend, heads, chunks, head_chunks, offload: See ``long_context_attention``;
            weights (``need_weights``) and their keys are whole all the same.
        validate: When ranks compare their arguments, so that a difference is an error on every
            rank and not a hang: "first", "always" or "never"; see ``LongContextAttention``.
        causal, window_size, mask: Masks by global positions that take no memory; see
            ``long_context_attention``. What all of them open, one ``mask`` of ``usp.masks`` for
            all samples; ``attn_mask`` may hide more.

    Attributes:
        placement: The options from ``mesh`` on; assign another to move the module.

    Raises:
        ValueError: an option is unknown.
        AssertionError: ``embed_dim`` is not a multiple of ``num_heads``.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        mesh: SequenceMesh | None = None,
        layout: Layouts = "contiguous",
        seq_len: int | tuple[int, int] | str | None = None,
        transport: str = "auto",
        backend: str = "auto",
        validate: str = "first",
        causal: bool = False,
        window_size: tuple[int | None, int | None] = (None, None),
        heads: tuple[int, int] | None = None,
        mask: Mask | None = None,
        chunks: int = 1,
        head_chunks: int = 1,
        offload: str | None = None,
    ) -> None:
        super().__init__(
            embed_dim,
            num_heads,
            dropout,
            bias,
            add_bias_kv,
            add_zero_attn,
            kdim,
            vdim,
            batch_first,
            device,
            dtype,
        )
        self._place(
            Placement(
                mesh,
                layout,
                seq_len,
                transport,
                backend,
                validate,
                causal,
                window_size,
                heads,
                mask,
                chunks,
                head_chunks,
                offload,
            )
        )

    @classmethod
    def from_torch(
        cls, module: nn.MultiheadAttention, mesh: SequenceMesh | None = None, **options: Any
    ) -> MultiheadAttention:
        """A module with the very parameters, hooks and settings of ``module``.

        Args:
            module: Left as it is.
            mesh, options: The keyword arguments of the constructor.

        Raises:
            NotImplementedError: ``module`` is of a class of its own; names it.
        """
        check_class(module)
        new = cls.__new__(cls)
        for name, value in vars(module).items():
            # registries of parameters, modules and hooks: the same entries in dicts of its own
            new.__dict__[name] = value.copy() if isinstance(value, dict) else value
        new._place(Placement(mesh, **options))
        return new

    @classmethod
    def adopt(cls, module: nn.MultiheadAttention, placement: Placement) -> None:
        """Make ``module`` itself one of ours, so that whoever holds it holds the new one.

        Raises:
            NotImplementedError: ``module`` is of a class of its own; names it.
        """
        check_class(module)
        if not isinstance(module, cls):
            module.__class__ = cls
        assert isinstance(module, cls)
        module._place(placement)

    def _place(self, placement: Placement) -> None:
        self.placement = placement
        self._compared: Placement | None = None
        self._keep_fused_paths_away()

    def _keep_fused_paths_away(self) -> None:
        # In evaluation nn.TransformerEncoderLayer computes attention from our parameters and never
        # calls us, unless a hook is there that it would pass by. Ours does nothing but be there,
        # under a number of this process: those in a pickle may be given out again.
        hooks = self._forward_pre_hooks
        for number in [number for number, hook in hooks.items() if hook is _no_change]:
            del hooks[number]
        self.register_forward_pre_hook(_no_change)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._keep_fused_paths_away()

    @one_node
    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attention of this rank's queries to the keys of all ranks.

        Args:
            query: (L, N, E), with ``batch_first`` (N, L, E), or unbatched (L, E).
            key: (S, N, kdim), (N, S, kdim) or (S, kdim); value alike with vdim.
            key_padding_mask: (N, S), unbatched (S,), of this rank's keys: bool, True = ignore, or
                float, added to the scores.
            need_weights: Also return the weights. They take memory and time of L times all keys,
                and K travels once more; pass False wherever they are not used. If they enter a
                loss, they must do so on every rank.
            attn_mask: (L, all keys) or (N * H, L, all keys): this rank's queries against the keys
                of all ranks in global order. Bool, True = do not attend, or float, added to the
                scores and differentiable.
            average_attn_weights: Whether the weights are averaged over heads.
            is_causal: A hint that ``attn_mask`` is the causal mask. Without key_padding_mask and
                weights it is taken at its word: by global positions, with no L x S memory.

        Returns:
            The output, like ``query`` with E features; and None, or the weights in the dtype of
            the projected queries: (N, L, all keys), (L, all keys) unbatched; per head
            (N, H, L, all keys) or (H, L, all keys). Keys are in global order, then that of
            ``add_bias_kv``, then that of ``add_zero_attn``. With dropout in training they are
            the dropped weights, as in torch.

        Raises:
            ValueError: arguments do not fit each other or the parameters; names both values. An
                ``AssertionError`` too, as in torch, where one rank can tell. Or all ranks hold the
                same tokens, though ``causal``, ``window_size`` or ``mask`` go by positions.
            RuntimeError: ``is_causal`` without ``attn_mask``.
            NotImplementedError: weights beyond 2 GiB on a rank, a NestedTensor, or a ``DTensor``.
        """
        arguments = Arguments(
            query,
            key,
            value,
            key_padding_mask,
            attn_mask,
            need_weights,
            is_causal,
            self.batch_first,
            (self.embed_dim, self.kdim, self.vdim),
            self.num_heads,
        )
        validate = compares_now(self.placement.validate, self._compared is self.placement)
        call = self._agree(arguments, validate)
        call = multihead_forward.with_columns(call, self.placement, validate is True)
        # autocast has had its say in the projections
        with as_given(query.device):
            extra = make_extra_keys(
                self.bias_k, self.bias_v, self.add_zero_attn, self.num_heads, call.q
            )
            out = multihead_forward.attend(call, self.placement, extra, validate)
            weights = None
            if need_weights:
                weights = multihead_forward.weights(call, self.placement, extra)
                weights = weights.mean(1) if average_attn_weights else weights
                weights = weights if arguments.is_batched else weights[0]
        # a graph is run many times, and must change nothing
        if self._compared is not self.placement and not torch.compiler.is_compiling():
            self._compared = self.placement
        return join_heads(self, out, arguments), weights

    def _agree(self, arguments: Arguments, validate: When) -> Projected:
        """The call, checked together with all ranks where they meet.

        Whole lengths that nobody named are the sum of what the ranks hold, and the seed is that
        of the first.
        """
        placement, drawn = self.placement, self._dropout_seed(arguments)
        lengths, mesh = placement.named_lengths, placement.mesh
        enough = lengths is not None or not (drawn is not None or arguments.needs_lengths)
        if mesh is not None and placement.size > 1 and enough and _in_graph(arguments):
            return self._agree_in_graph(arguments, mesh, cast("Tensor | None", drawn), validate)

        def check() -> tuple[Tensor, ...]:
            arguments.check(None if lengths is None else lengths[1])
            return project(self, arguments)

        asks = lengths is None or drawn is not None
        if mesh is None or not meets(mesh, validate if lengths else None, asks):
            arguments.check_inputs()
            lengths = lengths or arguments.tokens  # of one rank, which has them all
            return self._prepare(arguments, project(self, arguments), lengths, drawn)
        seed = None if drawn is None else int(drawn)
        projected, told = check_on_all_ranks(
            mesh,
            PLACE,
            check,
            lambda _: arguments.facts(lengths),
            lambda: (*arguments.tokens, seed or 0, self._content(arguments, validate)),
        )
        refuse_equal([numbers[3] for numbers in told], arguments.tokens[1])
        lengths = lengths or placement.summed_lengths(told)
        seed = None if seed is None else told[0][2]
        return self._prepare(arguments, projected, lengths, seed)

    def _agree_in_graph(
        self, arguments: Arguments, mesh: SequenceMesh, seed: Tensor | None, validate: When
    ) -> Projected:
        """The same in a graph; attention itself asks for lengths that nobody named."""
        placement, lengths = self.placement, self.placement.named_lengths
        if not torch.compiler.is_compiling():
            meet_without_values(mesh, validate)
        arguments.check(None if lengths is None else lengths[1])
        if validate is not False or seed is not None:
            differ = lengths is None and bool(placement.whole_mask(False) != Everything())
            seed = meet_in_graph(
                mesh,
                arguments.facts(lengths),
                arguments.tokens,
                seed,
                (arguments.key, arguments.token_dim, differ),
                validate,
            )
        return self._prepare(arguments, project(self, arguments), lengths, seed)

    def _content(self, arguments: Arguments, validate: When) -> int:
        """Of the keys, where a sequence that nobody cut would pass for many; else 0."""
        placement = self.placement
        if not validate or placement.named_lengths or placement.whole_mask(False) == Everything():
            return 0
        return content(arguments.key, arguments.token_dim)

    def _prepare(
        self,
        arguments: Arguments,
        projected: tuple[Tensor, ...],
        lengths: tuple[int, int] | None,
        seed: int | Tensor | None,
    ) -> Projected:
        """What follows from the lengths of the whole where they are known; no collective.

        The inputs have been checked, the masks are checked against these lengths.
        """
        arguments.check_masks(None if lengths is None else lengths[1])
        q, k, v = projected
        causal = arguments.trusts_hint and self.placement.is_spread(lengths)
        call = Projected(
            q,
            k,
            v,
            arguments.padding(),
            None if causal else arguments.bias(q.dtype),
            causal,
            lengths,
            self.dropout if self.training else 0.0,
            seed,
        )
        if arguments.need_weights:
            multihead_forward.check_weights(call, self.placement)
        return call

    def _dropout_seed(self, arguments: Arguments) -> int | Tensor | None:
        """Drawn here where more than the attention itself drops by it; a graph holds a tensor."""
        if not (self.training and self.dropout):
            return None
        if not (arguments.need_weights or self.add_zero_attn or self.bias_k is not None):
            return None
        seed = draw_dropout_seed()
        return seed if _in_graph(arguments) else int(seed)

    def extra_repr(self) -> str:
        shown = f"embed_dim={self.embed_dim}, num_heads={self.num_heads}, dropout={self.dropout}, "
        shown += f"batch_first={self.batch_first}, mesh={self.placement.mesh}"
        for field in fields(Placement):
            value = getattr(self.placement, field.name)
            if field.name != "mesh" and value != field.default:
                shown += f", {field.name}={value!r}"
        return shown


def _in_graph(arguments: Arguments) -> bool:
    return torch.compiler.is_compiling() or is_fake(arguments.query)


def _no_change(module: nn.Module, inputs: Any) -> None:
    """A hook for being there."""


def check_class(module: nn.Module) -> None:
    """Refuse what computes something else than ``nn.MultiheadAttention``.

    Raises:
        NotImplementedError: names the class, and what to do.
    """
    if type(module) is nn.MultiheadAttention or isinstance(module, MultiheadAttention):
        return
    kind = f"{type(module).__module__}.{type(module).__qualname__}"
    raise NotImplementedError(
        f"{kind} is not nn.MultiheadAttention itself, and what it changes would be lost: derive "
        "it from usp.MultiheadAttention; remove parametrizations first, and wrap for FSDP or "
        "quantise afterwards"
    )
