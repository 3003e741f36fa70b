"""An MLP tile by tile: its inner activations are never there for more than one tile of tokens.

Mini-sequence training (MsT, arXiv:2407.15892) and ALST (arXiv:2506.13996) do so.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _NormBase

from usp.nn.across import drops_samples, reason
from usp.nn.long_context import LongContextAttention
from usp.nn.site import Site
from usp.nn.tiled.function import Call, in_tiles
from usp.nn.tiled.given import Given
from usp.nn.tiled.surroundings import Surroundings
from usp.ops.derivatives import refuse_in_transforms
from usp.planning.kinds import integer

# they reduce the gradients of what they wrap, and so cannot be called once a tile
_WRAPPERS = ("DistributedDataParallel", "FullyShardedDataParallel", "DataParallel")
_CHANNEL_DROPOUTS = (nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.FeatureAlphaDropout)


def tiled_mlp(module: nn.Module, x: Tensor, tiles: int, *beside: Any, dim: int = -2) -> Tensor:
    """``module(x, *beside)``, computed in tiles of tokens, forward and backward.

    The result is that of the plain call; dropout draws other numbers, the same in both, and one
    of torch's default CPU generator a call. What is kept between forward and backward is what was
    given: the forward keeps nothing, and the backward takes tile after tile, computes it again and
    runs its backward. A parameter's gradient is summed over the tiles in fp32 (fp64 for fp64),
    rounded once, and handed to autograd once: its hooks, DDP and FSDP see one gradient in a
    backward. Hooks of the module itself run once, around all tiles; those of what it holds run for
    each tile, and again in the backward. Autocast and modes that answer functions
    (``usp.spread_attention``) are in the backward as they were. Nothing is communicated: each rank
    may have its own number of tokens, or of tiles.

    Args:
        module: Treats each token by itself, and returns one tensor. ``fully_shard`` may have been
            called on it or on what holds it, not on what it holds.
        x: (..., tokens, features), or as ``dim`` says.
        tiles: How many, as even as they come; at most one a token. 1 is an activation checkpoint.
        beside: More arguments of the module. Tensors of as many dims as ``x`` are cut like it, or
            whole where they have one entry along ``dim``; those of one dim or none are whole.
        dim: The dim of tokens.

    Returns:
        What the module does, once differentiable.

    Raises:
        TypeError: an argument is of another kind.
        ValueError: ``x`` or a tensor beside it does not fit; the module writes to a buffer or an
            argument, or does not return a result for each token; in the backward: it uses a tensor
            that needs a gradient and is neither its parameter nor an argument.
        NotImplementedError: the module holds something that looks at several tokens (attention,
            batch statistics, convolutions, DropPath), or a DTensor; is a wrapper like DDP; or
            returns more than one tensor; or it is called inside of a transform of torch.func.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module must be an nn.Module, got {type(module).__name__}")
    site = Tiled(module, "", tiles, dim)
    site.place()
    try:
        return cast(Tensor, module(x, *beside))
    finally:
        site.remove()


class Tiled(Site):
    """A module that computes in tiles of tokens."""

    def __init__(self, module: nn.Module, name: str, tiles: int, dim: int = -2) -> None:
        super().__init__(module, name)
        self.tiles, self.dim = integer("tiles", tiles, least=1), integer("dim", dim)
        if type(module).__name__ in _WRAPPERS:
            raise NotImplementedError(
                f"{type(module).__name__} is to be called once a step: let the module that it "
                "wraps compute in tiles (usp.replace_mlp, before it is wrapped)"
            )
        self.check()

    def described(self) -> str:
        return f"{self.name or 'the module'} ({type(self.module).__qualname__})"

    def check(self) -> None:
        """Raises:
        NotImplementedError: it holds what looks at several tokens; names that.
        """
        if faults := [f"{n or 'it'} ({type(m).__qualname__}): {w}" for n, m, w in self._faults()]:
            raise NotImplementedError(
                f"{self.described()} cannot be computed in tiles of tokens: {'; '.join(faults)}"
            )

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return torch.compiler.disable(self._run)(args, kwargs)
        return self._run(args, kwargs)

    def _run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        refuse_in_transforms("usp.tiled_mlp")
        self.check()  # training or not, and what it holds, may be others than when it was made
        given = Given.of(args, kwargs, self.tiles, self.dim)
        parameters = dict(self.module.named_parameters())
        self._check_gathered(parameters)
        parameters = {name: p for name, p in parameters.items() if p.requires_grad}
        inputs = (*given.tensors, *parameters.values())
        around = Surroundings(given.tensors[0].device)
        with around.drawn.again():
            if not torch.is_grad_enabled() or not any(x.requires_grad for x in inputs):
                return self._forward(given)
            name = self.described()
            call = Call(self._forward, self._body, name, given, tuple(parameters), around)
            return in_tiles(call, tuple(parameters.values()))

    def _forward(self, given: Given) -> Tensor:
        """Tile after tile, each written where it belongs in the whole."""
        whole = torch.empty(0)
        for start, length in given.tiles:
            parts = given.parts(start, length)
            args, kwargs = given.filled(parts)
            before = {} if start else self._writes(parts)
            out = self.inner(*args, **kwargs)
            if not start:
                self._check_output(out, length, given.dim)
                self._check_writes(before, self._writes(parts))
                shape = list(out.shape)
                shape[given.dim] = given.tokens
                whole = out.new_empty(shape)
            whole.narrow(given.dim, start, length).copy_(out)
            del out, parts, args, kwargs  # or two tiles would be there at a time
        return whole

    def _body(self, parameters: Mapping[str, Tensor], args: Any, kwargs: Any) -> Tensor:
        held = {f"module.{name}": x for name, x in parameters.items()}
        return cast(Tensor, functional_call(_Inner(self), held, args, kwargs))

    def _faults(self) -> Iterator[tuple[str, nn.Module, str]]:
        """What is no matter of each token by itself: name, module, why."""
        for name, module in self.module.named_modules():
            drops = module.training and bool(
                getattr(module, "p", 0.0) or getattr(module, "drop_prob", 0.0)
            )
            if isinstance(module, nn.MultiheadAttention | LongContextAttention):
                yield name, module, "it is attention among tokens"
            elif isinstance(module, _NormBase) and _is_fixed(module):
                continue
            elif why := reason(module):
                yield name, module, why
            elif drops and drops_samples(module):
                yield name, module, "it drops whole samples, and others in each tile"
            elif drops and isinstance(module, _CHANNEL_DROPOUTS):
                yield name, module, "it drops whole channels, and others in each tile"

    def _check_gathered(self, parameters: Mapping[str, Tensor]) -> None:
        for name, parameter in parameters.items():
            if hasattr(parameter, "to_local"):
                raise NotImplementedError(
                    f"{name} of {self.described()} is a DTensor where it is called: call "
                    "fully_shard on this module or on what holds it, not on what it holds; "
                    "parameters that tensor ranks share are not known here"
                )

    def _check_output(self, out: Any, length: int, dim: int) -> None:
        if not isinstance(out, Tensor):
            raise NotImplementedError(
                f"{self.described()} returns {type(out).__name__}: tiles are joined where a module "
                "returns one tensor"
            )
        if out.dim() < -dim or out.shape[dim] != length:
            raise ValueError(
                f"{self.described()} returns {tuple(out.shape)} for {length} tokens along dim "
                f"{dim}: tiles are joined where a module has one result for each token"
            )

    def _writes(self, arguments: Sequence[Tensor]) -> dict[str, tuple[int, int]]:
        """How often each buffer and argument was written to."""
        kept = {f"argument {n}": x for n, x in enumerate(arguments)}
        kept |= {f"buffer {name}": x for name, x in self.module.named_buffers()}
        return {n: (id(x), x._version) for n, x in kept.items() if not x.is_inference()}

    def _check_writes(
        self, before: Mapping[str, tuple[int, int]], after: Mapping[str, tuple[int, int]]
    ) -> None:
        if changed := [name for name, count in after.items() if before.get(name) != count]:
            raise ValueError(
                f"{self.described()} changes its {', '.join(changed)} when it is called, which it "
                f"would do for each of {self.tiles} tiles, and again in the backward"
            )


def _is_fixed(norm: _NormBase) -> bool:
    """Whether its statistics are those that it has learned."""
    return not norm.training and norm.track_running_stats


class _Inner(nn.Module):
    """What stood in the place of a module's forward, as a module that holds its parameters."""

    def __init__(self, site: Tiled) -> None:
        super().__init__()
        self.module, self._site = site.module, site

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._site.inner(*args, **kwargs)
