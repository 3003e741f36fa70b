"""Linear attention as a module, without parameters but a learned decay of each head."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from usp.distributed.agreement import check_validate, compares_now
from usp.distributed.mesh import SequenceMesh, check_mesh
from usp.linear_attention.arguments import Given, Options
from usp.linear_attention.functional import attend
from usp.nn.spread import Spread, check_spread
from usp.nn.tracing import one_node
from usp.planning.layout import Layout


class LinearAttention(nn.Module):
    """Linear attention over a sequence that is spread over the ranks of a mesh.

    The options are those of ``usp.linear_attention``. Copies and pickles. Beside
    ``LongContextAttention`` on the same mesh, with the contiguous layout, it makes a hybrid model.

    Args:
        mesh: The ranks that share the sequence; None is one device.
        decay: (H,) logs, where ``forward`` is given none: a ``nn.Parameter`` is learned, and all
            else a buffer.
        method, causal, return_state, layout, seq_len: See ``linear_attention``.
        cu_seqlens: Default of the argument of ``forward``.
        validate: "first", "always" or "never"; see ``LongContextAttention``.

    Raises:
        ValueError: ``validate`` is none of the three.
    """

    def __init__(
        self,
        mesh: SequenceMesh | None = None,
        *,
        decay: Tensor | None = None,
        method: str = "gather",
        causal: bool = True,
        cu_seqlens: Sequence[int] | Tensor | None = None,
        return_state: bool = False,
        layout: Layout = "contiguous",
        seq_len: int | None = None,
        validate: str = "first",
    ):
        super().__init__()
        check_validate(validate)
        self.mesh = check_mesh(mesh)
        self.method, self.causal, self.return_state = method, causal, return_state
        self.cu_seqlens, self.layout, self.seq_len = cu_seqlens, layout, seq_len
        self.validate = validate
        self.decay: Tensor | None
        if isinstance(decay, nn.Parameter):
            self.register_parameter("decay", decay)
        else:
            self.register_buffer("decay", decay, persistent=False)
        self._compared = False

    @one_node
    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        decay: Tensor | None = None,
        *,
        beta: Tensor | None = None,
        cu_seqlens: Sequence[int] | Tensor | None = None,
        initial_state: Tensor | None = None,
        seq_len: int | None = None,
        spread: Spread | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Linear attention of this rank's tokens; see ``usp.linear_attention``.

        Args:
            q: (B, L, Hq, D). k: (B, L, Hk, D). v: (B, L, Hv, Dv). This rank's shards.
            decay: (H,), (B, L, H) or (B, L, H, D) logs, in place of that of the constructor.
            beta: (B, L, H), for the delta rule.
            cu_seqlens, seq_len: In place of those of the constructor.
            initial_state: (B, H, D, Dv) before the first token of the whole.
            spread: In place of mesh, layout, ``seq_len`` and ``cu_seqlens``; of the same mesh on
                all ranks.

        Returns:
            (B, L, H, Dv), with ``return_state`` also (B, H, D, Dv).

        Raises:
            TypeError, ValueError: ``spread`` is none, or there is one of ``seq_len`` and
                ``cu_seqlens``, too; beside what the function refuses.
        """
        mesh, layout = self.mesh, self.layout
        cu_seqlens = self.cu_seqlens if cu_seqlens is None else cu_seqlens
        seq_len = self.seq_len if seq_len is None else seq_len
        compare = compares_now(self.validate, self._compared)
        if spread is not None:
            other = cu_seqlens if seq_len is None else seq_len
            check_spread(spread, mesh, "linear_attention", compare, other)
            mesh, layout = spread.mesh, spread.layout
            seq_len, cu_seqlens = spread.seq_len, spread.cu_seqlens
        given = Given(q, k, v, self.decay if decay is None else decay, beta, initial_state)
        options = Options(self.method, self.causal, cu_seqlens, self.return_state, layout, seq_len)
        out = attend(given, options, mesh, compare)
        if not torch.compiler.is_compiling():  # a graph is run many times, and must change nothing
            self._compared = True
        return out

    def extra_repr(self) -> str:
        shown = [f"mesh={self.mesh}"]
        usual = {"method": "gather", "causal": True, "cu_seqlens": None, "return_state": False}
        for name, value in {**usual, "layout": "contiguous", "seq_len": None}.items():
            if getattr(self, name) is not value and getattr(self, name) != value:
                shown.append(f"{name}={getattr(self, name)!r}")
        return ", ".join(shown)
