"""Keys and values of a sequence that grows, each token on one rank of a mesh."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from usp.distributed.agreement import Facts
from usp.distributed.mesh import SequenceMesh, check_mesh, degrees_and_place
from usp.masks import Mask, causal, first_keys, window
from usp.nn.buffer import Buffer
from usp.planning.dealt import Dealt, Run
from usp.planning.kinds import DTYPES, integer, tensor
from usp.planning.layout import Layout
from usp.planning.shares import local_row
from usp.sharding.whole import agree_on_length


class ShardedCache:
    """The keys and values that decoding attends to, cut over the ranks of a mesh.

    A prompt whose tokens are cut over the ranks comes in by ``extend``, each rank's shard as it is;
    tokens that every rank has computed come in by ``append``, and each is kept by one rank: the
    last one's goes on until it holds ``page`` tokens more than the rank that holds least. The ranks
    agree on that without a message. ``usp.decode_attention`` attends to it.

    It holds no gradients, and a rank's memory grows by doubling.

    Args:
        mesh: The ranks that share the sequence; None is one device.
        window: So many tokens before its own are seen by a query; None is no bound. What no later
            query can see is dropped, once it is as much as what stays and a page.
        first_keys: So many first tokens of each sample are seen all the same (sink tokens,
            arXiv:2309.17453), and never dropped.
        padding: For each sample, so many tokens at its front are none: what makes a batch of
            texts of different lengths end together. Distances and ``first_keys`` count behind them.
        value_dim: Values are the first dims of the keys, and no memory is spent on them: the
            latent of MLA (arXiv:2405.04434), with its rotary dims behind it.
        page: See above.

    Raises:
        TypeError, ValueError: an argument is no number of its kind.

    Example:
        >>> cache = usp.ShardedCache(mesh)
        >>> cache.extend(k, v, layout="zigzag", seq_len=prompt)      # this rank's shard
        >>> cache.append(new_k, new_v)                               # the same on every rank
        >>> out = usp.decode_attention(new_q, cache, mesh)
    """

    def __init__(
        self,
        mesh: SequenceMesh | None = None,
        *,
        window: int | None = None,
        first_keys: int = 0,
        padding: Sequence[int] | None = None,
        value_dim: int | None = None,
        page: int = 64,
    ) -> None:
        self.mesh = check_mesh(mesh)
        self.window = None if window is None else integer("window", window, least=0)
        self.first_keys = integer("first_keys", first_keys, least=0)
        self.padding = tuple(integer("an entry of padding", n, least=0) for n in padding or ())
        self.value_dim = None if value_dim is None else integer("value_dim", value_dim, least=1)
        self.page = integer("page", page, least=1)
        self.layout = Dealt(1 if mesh is None else mesh.size)
        self._gone = 0  # tokens before this position may have been dropped
        self._k: Buffer | None = None
        self._v: Buffer | None = None

    @property
    def length(self) -> int:
        """Tokens of the sequence so far, padding and dropped ones too."""
        return self.layout.seq_len

    @property
    def k(self) -> Tensor:
        """(B, tokens of this rank, G, D), a view.

        Raises:
            ValueError: nothing has come yet.
        """
        if self._k is None:
            raise ValueError("the cache holds 0 tokens yet: extend or append it first")
        return self._k.rows

    @property
    def v(self) -> Tensor:
        """(B, tokens of this rank, G, Dv), a view."""
        return self.k[..., : self.value_dim] if self._v is None else self._v.rows

    @property
    def nbytes(self) -> int:
        """Memory of this rank, what was got ahead too."""
        return sum(buffer.nbytes for buffer in (self._k, self._v) if buffer is not None)

    def append(self, k: Tensor, v: Tensor | None = None) -> None:
        """New tokens that every rank holds; each is kept by one.

        Args:
            k: (B, new tokens, G, D), the same on every rank.
            v: (B, new tokens, G, Dv); None where ``value_dim`` is given.

        Raises:
            TypeError, ValueError: they do not fit each other, or what is here.
        """
        self._check(k, v)
        self._drop(k.shape[1])
        start = self.length
        self.layout = self.layout.grown(k.shape[1], self.page)
        mine = self.layout.taken(self._rank, start)
        self._push(*(None if x is None else [x[:, a:b] for a, b in mine] for x in (k, v)))

    def extend(
        self,
        k: Tensor,
        v: Tensor | None = None,
        layout: Layout = "contiguous",
        seq_len: int | None = None,
        validate: bool | None = None,
    ) -> None:
        """New tokens of which every rank holds a shard, which stays there.

        Args:
            k: (B, local tokens, G, D). v: (B, local tokens, G, Dv), or None as above.
            layout: How the new tokens are cut, counted from the first of them.
            seq_len: New tokens of all ranks; asked for where nobody says it.
            validate: See ``long_context_attention``.

        Raises:
            TypeError, ValueError: as above, on every rank that meets.
            NotImplementedError: the layout is "striped", with a run for each token.
        """

        def more() -> Facts:
            if layout == "striped":
                raise NotImplementedError(
                    "a striped shard is a run for each token: extend a cache by 'contiguous' or "
                    "'zigzag' shards"
                )
            self._check(k, v)
            return {"tokens so far": self.length, "page": self.page, "values": v is not None}

        tokens, _ = agree_on_length(
            "ShardedCache.extend", k, self.mesh, 1, layout, seq_len, validate, more
        )
        self._drop(tokens)
        self.layout = self.layout.extended(tokens, self._runs(layout, tokens))
        self._push([k], None if v is None else [v])

    def crop(self, length: int) -> None:
        """Back to the first tokens: of a prompt that is used again, or of drafts that were wrong.

        Raises:
            ValueError: there are not so many, or the window has dropped what the next query sees.
        """
        length = integer("length", length, least=0)
        if length > self.length:
            raise ValueError(f"there is no crop to {length} of {self.length} tokens")
        self.refuse_dropped(length, f"crop({length})")
        self.layout = self.layout.cropped(length)
        for buffer in (self._k, self._v):
            if buffer is not None:
                buffer.crop(self.layout.counts[self._rank])

    def select(self, samples: Sequence[int]) -> ShardedCache:
        """A copy with these samples of the batch: several continuations of one prompt
        (``[0] * 4``), beams that go on, or a prompt that is kept.

        Raises:
            TypeError, ValueError: an entry is no sample.
        """
        batch = self.k.shape[0]
        for i in samples:
            if integer("an entry of samples", i, least=0) >= batch:
                raise ValueError(f"there is no sample {i} in a batch of {batch}")
        copy = ShardedCache(
            self.mesh, window=self.window, first_keys=self.first_keys,
            padding=[self.padding[i] for i in samples] if self.padding else None,
            value_dim=self.value_dim, page=self.page,
        )  # fmt: skip
        copy.layout, copy._gone = self.layout, self._gone
        copy._k, copy._v = (
            None if buffer is None else buffer.select(samples) for buffer in (self._k, self._v)
        )
        return copy

    def masks(self) -> Mask | list[Mask]:
        """Who sees whom among the tokens of the sequence, by position; one, or one a sample."""
        each = [self._mask(pad) for pad in self.padding or (0,)]
        return each if len(set(each)) > 1 else each[0]

    def _mask(self, padding: int) -> Mask:
        seen = causal()
        if self.window is not None:
            near = window(self.window, None)
            seen = seen & (
                near | first_keys(padding + self.first_keys) if self.first_keys else near
            )
        return seen & ~first_keys(padding) if padding else seen

    def refuse_dropped(self, position: int, who: str) -> None:
        """Raise where a query at this position would see tokens that have been dropped.

        Raises:
            ValueError: names both positions.
        """
        if self.window is not None and max(0, position - self.window) < self._gone:
            raise ValueError(
                f"{who}: a query at {position} sees {self.window} tokens before it, but those "
                f"before {self._gone} may have been dropped: select a copy before, or make the "
                "window of the cache wider"
            )

    @property
    def _rank(self) -> int:
        return 0 if self.mesh is None else self.mesh.rank

    def _drop(self, tokens: int) -> None:
        """What nobody sees from the next tokens on, where that pays."""
        if self.window is None:
            return
        first = max(self.padding, default=0) + self.first_keys
        stop = self.length - self.window
        after = self.layout.thinned(first, stop, self.page)
        if after is self.layout:
            return
        if after.counts[self._rank] < self.layout.counts[self._rank]:
            kept = self.layout.indices(self._rank, first, stop)
            for buffer in (self._k, self._v):
                if buffer is not None:
                    buffer.keep(kept)
        self.layout, self._gone = after, stop

    def _runs(self, layout: Layout, tokens: int) -> list[Run]:
        degrees, _ = degrees_and_place(self.mesh)
        found = []
        for rank in range(self.layout.ranks):
            row = local_row(layout, tokens, degrees, divmod(rank, degrees[1]))
            bounds = zip(row.start.flatten().tolist(), row.stop.flatten().tolist(), strict=True)
            found += [Run(rank, a, b) for a, b in bounds]
        return found

    def _push(self, k: list[Tensor] | None, v: list[Tensor] | None) -> None:
        for name, new in (("_k", k), ("_v", v)):
            buffer = cast("Buffer | None", getattr(self, name))
            for x in new or ():
                assert buffer is not None
                with torch.no_grad():
                    buffer.push(x.detach())

    def _check(self, k: Tensor, v: Tensor | None) -> None:
        """New keys and values; the first ones say what the later ones are."""
        if (v is None) != (self.value_dim is not None):
            what = "is None" if v is None else "is given"
            raise ValueError(
                f"v {what}, and value_dim of the cache is {self.value_dim}: give one of the two"
            )
        given = {"k": (k, self._k)} | ({} if v is None else {"v": (v, self._v)})
        for name, (x, buffer) in given.items():
            if tensor(name, x).dim() != 4 or x.dtype not in DTYPES:
                raise ValueError(
                    f"{name} must be (batch, tokens, heads, head_dim) of fp16, bf16, fp32 or fp64, "
                    f"got {x.dtype} {tuple(x.shape)}"
                )
            if buffer is not None:
                _refuse_others(name, x, buffer.rows)
        if v is not None and v.shape[:3] != k.shape[:3]:
            raise ValueError(
                f"k and v must have the same samples, tokens and heads: {tuple(k.shape)} and "
                f"{tuple(v.shape)}"
            )
        if self.padding and len(self.padding) != k.shape[0]:
            raise ValueError(
                f"padding has {len(self.padding)} entries, one a sample, but k has {k.shape[0]}"
            )
        if self.value_dim is not None and self.value_dim > k.shape[3]:
            raise ValueError(f"value_dim={self.value_dim} of keys of {k.shape[3]} dims")
        self._k = self._k or Buffer(k)
        self._v = self._v or (None if v is None else Buffer(v))


def _refuse_others(name: str, x: Tensor, held: Tensor) -> None:
    """New rows that do not lie beside those that are here."""
    mine, theirs = ((y.shape[0], *y.shape[2:], y.dtype, y.device) for y in (x, held))
    if mine != theirs:
        raise ValueError(
            f"{name} has (batch, heads, head_dim), dtype and device {mine}, but the cache holds "
            f"{theirs}"
        )
