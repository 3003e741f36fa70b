"""Where torch's attention means the whole sequence, and what would not is refused."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import FrameType, MappingProxyType
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack
from torch.utils.checkpoint import CheckpointFunction

from usp import rng
from usp.distributed.mesh import SequenceMesh
from usp.integrations._answer import Tokens, answer, refuse

_ATTENTION = frozenset(
    (
        F.scaled_dot_product_attention,
        torch.ops.aten.scaled_dot_product_attention,
        torch.ops.aten.scaled_dot_product_attention.default,
    )
)
_SOFTMAX = frozenset((F.softmax, torch.softmax, Tensor.softmax))
# of tokens and features; ``F.feature_alpha_dropout`` and the others of channels drop whole ones
_DROPOUT = frozenset((F.dropout, F.alpha_dropout, torch.dropout, torch.alpha_dropout))
_OTHERS = {
    F.multi_head_attention_forward: "replace it first (usp.replace_attention)",
    # flex_attention itself is answered (_flex.py)
    getattr(torch.ops.higher_order, "flex_attention", None): (
        "import torch.nn.attention.flex_attention before the region is made, and call it by name"
    ),
}


class Region(TorchFunctionMode):
    """A context in which ``F.scaled_dot_product_attention`` is that of the whole sequence.

    Attributes:
        tokens: Who holds which, and what lengths mean.
        answered: Calls that were answered since the region was made; those in graphs of
            ``torch.compile`` are not counted.
        is_paused: Whether nothing is answered or refused just now.
        keeps_state: Whether a cache of the whole is to get the state that a linear layer finds.
        owner: Who made it, and finds it again where somebody else enters it a second time.
        pieces: Options of ``long_context_attention`` by which attention in it is worked off.
    """

    def __init__(
        self,
        tokens: Tokens,
        watch: bool = True,
        owner: object = None,
        pieces: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        super().__init__()
        self.tokens, self.owner, self.pieces = tokens, owner, pieces
        self.watch = watch
        self.answered = 0
        self.is_paused = False
        self.keeps_state = False
        self._graded = True

    def __enter__(self) -> Region:
        self._graded = torch.is_grad_enabled()
        super().__enter__()
        return self

    @contextmanager
    def entered_again(self) -> Iterator[None]:
        """From here on a checkpoint comes through, which computes again what is in here."""
        graded, self._graded = self._graded, torch.is_grad_enabled()
        try:
            yield
        finally:
            self._graded = graded

    @contextmanager
    def meaning(self, tokens: Tokens) -> Iterator[None]:
        """Attention in here is among other tokens."""
        before, self.tokens = self.tokens, tokens
        try:
            yield
        finally:
            self.tokens = before

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Nothing in here is answered, or refused."""
        before, self.is_paused = self.is_paused, True
        try:
            yield
        finally:
            self.is_paused = before

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.unflatten and torch.compiler.is_compiling():
            func = torch.unflatten  # Dynamo cannot follow the method, which asks its super()
        if self.is_paused:
            return func(*args, **kwargs)
        if func in _ATTENTION:
            return self._answer(*args, **kwargs)
        if len(self.tokens.shares) == 1:
            return func(*args, **kwargs)
        if func in _DROPOUT:
            return self._dropout(func, args, kwargs)
        if func in _OTHERS:
            self._refuse(f"{_name(func)} would see this rank's own tokens alone", _OTHERS[func])
        if self.watch and (func in _SOFTMAX or func is torch.arange):
            self._watch(func, args, kwargs)
        return func(*args, **kwargs)

    def _answer(self, *args: Any, **kwargs: Any) -> Tensor:
        self.count()
        return answer(self.tokens, *args, **kwargs, pieces=self.pieces)

    def count(self) -> None:
        """One more call is answered.

        Raises:
            NotImplementedError: it would not be where a checkpoint computes it again.
        """
        if not torch.compiler.is_compiling():
            if self._graded and is_in_reentrant_checkpoint():
                # it computes again when this has ended, with torch's numbers and no error
                raise NotImplementedError(
                    "an activation checkpoint computes again in the backward, where this region "
                    "has ended: enter it inside of what is checkpointed (usp.parallelize does)"
                )
            self.answered += 1

    def _dropout(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Other numbers on each rank, and one drawn on each, however many tokens it holds."""
        x = args[0] if args else kwargs["input"]
        if x.dim() > 1 and x.shape[-2] in self.tokens.whole:
            return func(*args, **kwargs)  # equal on all ranks, and to stay so
        return _apart(self.tokens.spread.mesh, func, args, kwargs)

    def _watch(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """Refuse what goes by the number of local tokens, as if they were all."""
        held, length = self.tokens.held, self.tokens.spread.seq_len
        if held == length or _is_ours():
            return
        if func is not torch.arange:
            x = args[0] if args else kwargs["input"]
            if x.dim() > 2 and x.shape[-1] == x.shape[-2] == held:
                self._refuse(
                    f"a softmax over {held} x {held} scores is attention by hand among the {held} "
                    f"tokens of this rank, of {length}",
                    "let the model call F.scaled_dot_product_attention",
                )
        elif _count(args, kwargs) == held:
            self._refuse(
                f"torch.arange of {held} numbers looks like positions of the {held} tokens of "
                f"this rank, of {length}, that begin at 0 on every rank",
                "make positions before tokens are cut, or take spread.positions()",
            )

    def _refuse(self, fault: str, advice: str) -> None:
        refuse(
            self.tokens.spread,
            NotImplementedError(
                f"{fault}: {advice}. Where this is wrong or meant, keep the module out of the "
                "region, or watch=False"
            ),
        )


def current_region() -> Region | None:
    """The innermost region that is entered, for doors that torch's functions do not lead to."""
    for mode in reversed(_get_current_function_mode_stack()):
        if isinstance(mode, Region):
            return None if mode.is_paused else mode
    return None


def region_of(owner: object) -> Region | None:
    """The innermost that is entered of those that somebody made."""
    found = (m for m in _get_current_function_mode_stack() if isinstance(m, Region))
    return next((mode for mode in reversed([*found]) if mode.owner is owner), None)


def _apart(
    mesh: SequenceMesh | None,
    func: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """The call with random numbers of this rank's own; graphs end here."""
    p = kwargs.get("p", args[1] if len(args) > 1 else 0.5)
    train = kwargs.get("training", kwargs.get("train", args[2] if len(args) > 2 else True))
    if not p or not train:
        return func(*args, **kwargs)
    if torch.compiler.is_compiling():
        return torch.compiler.disable(_apart)(mesh, func, args, kwargs)
    with rng.sharded(mesh):
        return func(*args, **kwargs)


def _count(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """How many numbers ``torch.arange`` gives, where it is told by integers."""
    given = [*args, *(kwargs[name] for name in ("start", "end", "step") if name in kwargs)]
    if not all(isinstance(number, int | torch.SymInt) for number in given) or not given:
        return None
    return len(range(*given)) if given[2:] != [0] else None


def _name(func: Callable[..., Any]) -> str:
    return cast(str, getattr(func, "__name__", str(func)))


def _is_ours() -> bool:
    """Whether a call comes from our own code, which knows what it does."""
    if torch.compiler.is_compiling():
        return False
    caller = sys._getframe(3).f_globals.get("__name__", "")  # behind _watch, __torch_function__
    return str(caller).partition(".")[0] == "usp"


def is_in_reentrant_checkpoint() -> bool:
    """Whether this is the first time of what a reentrant checkpoint computes again."""
    if torch.compiler.is_compiling() or torch.is_grad_enabled():
        return False
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code is CheckpointFunction.forward.__code__:
            return True
        frame = frame.f_back
    return False
