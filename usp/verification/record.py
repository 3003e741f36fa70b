"""What happens in a forward and a backward of a model, written down in its order."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import keystr, tree_flatten_with_path, tree_leaves


class Key(NamedTuple):
    """A tensor that a module was given or has returned.

    Attributes:
        module: Its name; "" is the model itself.
        call: Which of its calls, from 0.
        side: "in" or "out".
        leaf: Which of the tensors, by its path among arguments or results.
    """

    module: str
    call: int
    side: str
    leaf: str


class Called(NamedTuple):
    """A function of torch that was called.

    Attributes:
        name: Its own.
        event: How many modules had been entered and left before.
        module: Whose code called it.
        target: Class indices of a cross entropy.
        shape: Of its first tensor.
    """

    name: str
    event: int
    module: str
    target: Tensor | None
    shape: tuple[int, ...]


@dataclass
class Record:
    """One run of a model on one rank; tensors lie on the CPU.

    Attributes:
        values: What modules were given and returned, in the order of the forward.
        events: Of each (module, call, side), how many modules had been entered and left before.
        callers: Of each (module, call), the module whose code called it.
        gradients: Of these, where there is one.
        parameters: Gradients by name; None where there is none.
        is_reduced: Whether a wrapper (DDP, FSDP2) has averaged them over the ranks.
        outputs: The tensors that the model returns.
        loss: That of the backward; None where the outputs' cotangents were drawn.
        called: Functions of torch, in their order.
        shortest: Of the floating dtypes in it, the one with the fewest digits.
        inside: Modules that were entered and not left.
        kept: Of each call of what drops whole samples, which samples were kept.
    """

    values: dict[Key, Tensor] = field(default_factory=dict)
    events: dict[tuple[str, int, str], int] = field(default_factory=dict)
    callers: dict[tuple[str, int], str] = field(default_factory=dict)
    gradients: dict[Key, Tensor] = field(default_factory=dict)
    parameters: dict[str, Tensor | None] = field(default_factory=dict)
    is_reduced: bool = False
    outputs: list[Tensor] = field(default_factory=list)
    loss: Tensor | None = None
    called: list[Called] = field(default_factory=list)
    shortest: torch.dtype | None = None
    inside: list[str] = field(default_factory=list)
    kept: dict[str, list[tuple[bool, ...]]] = field(default_factory=dict)

    def segment(self, key: Key) -> list[Called]:
        """What was called between the module that was entered or left before, and this one."""
        event = self.events[key[:3]]
        return [call for call in self.called if call.event == event]


def tensors(tree: Any) -> list[Tensor]:
    """Of a tree of arguments or results, in their order."""
    return [x for x in tree_leaves(tree) if isinstance(x, Tensor)]


def copied(x: Tensor) -> Tensor:
    return x.detach().to("cpu", copy=True).contiguous()


class Recorder(TorchFunctionMode):
    """Writes down a run of the modules that it is hooked to, while it is entered."""

    def __init__(self, dtype: torch.dtype, notes_values: bool = True) -> None:
        super().__init__()
        self.record, self.dtype, self.notes_values = Record(), dtype, notes_values
        self._calls: Counter[str] = Counter()
        self._open: list[tuple[str, int]] = []
        self._events = 0

    @contextmanager
    def hooked(self, names: dict[nn.Module, str]) -> Iterator[None]:
        """Listens to these modules."""
        handles = []
        for module, name in names.items():
            handles.append(module.register_forward_pre_hook(self._entering(name), with_kwargs=True))
            handles.append(module.register_forward_hook(self._leaving(name, module)))
        try:
            with self:
                yield
        finally:
            for handle in handles:
                handle.remove()

    def _entering(self, name: str) -> Callable[..., None]:
        def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
            if is_computed_again():
                return
            call = self._calls[name]
            self._calls[name] += 1
            self.record.callers[name, call] = self._open[-1][0] if self._open else ""
            self._note(name, call, "in", (args, kwargs))
            self._open.append((name, call))
            self.record.inside.append(name)

        return enter

    def _leaving(self, name: str, module: nn.Module) -> Callable[..., None]:
        def leave(module: nn.Module, args: Any, out: Any) -> None:
            if is_computed_again():
                return
            while self._open and self._open[-1][0] != name:  # an exception that somebody caught
                self._open.pop()
            _, call = self._open.pop() if self._open else (name, 0)
            self.record.inside[:] = [entered for entered, _ in self._open]
            self._note(name, call, "out", out)

        return leave

    def _note(self, name: str, call: int, side: str, tree: Any) -> None:
        self.record.events[name, call, side] = self._events
        self._events += 1
        if not self.notes_values:
            return
        for path, x in tree_flatten_with_path(tree)[0]:
            if not isinstance(x, Tensor) or x.is_sparse or x.is_nested or x.is_quantized:
                continue
            key = Key(name, call, side, keystr(path))
            self.record.values[key] = copied(x)
            if x.requires_grad:
                x.register_hook(self._noting_gradient(key))

    def _noting_gradient(self, key: Key) -> Callable[[Tensor], None]:
        def note(grad: Tensor) -> None:
            self.record.gradients[key] = copied(grad)

        return note

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if is_computed_again():
            return out
        if isinstance(out, Tensor) and out.is_floating_point():
            shortest = self.record.shortest or self.dtype
            if torch.finfo(out.dtype).eps >= torch.finfo(shortest).eps:
                self.record.shortest = out.dtype
        target = None
        if func is F.cross_entropy:
            target = args[1] if len(args) > 1 else kwargs["target"]
        name = getattr(func, "__name__", str(func))
        if name == "__get__":  # of x.shape and the like
            return out
        first = next((x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)), None)
        self.record.called.append(
            Called(
                name,
                self._events,
                self._open[-1][0] if self._open else "",
                None if target is None else copied(target),
                () if first is None else tuple(first.shape),
            )
        )
        return out


def is_computed_again() -> bool:
    """Whether an activation checkpoint computes in the backward what was there before."""
    return torch._C._current_graph_task_id() != -1
