"""What stands in the place of a module's ``forward``, and leaves what was there when it goes.

Objects and no closures, and no hooks: they copy and pickle with their module, a checkpoint that
calls the module again comes through them, and taking one away leaves what was there.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import nn


class Site:
    """A module's ``forward`` as it was.

    Attributes:
        module, name: Whose it is.
    """

    def __init__(self, module: nn.Module, name: str) -> None:
        self.module, self.name = module, name
        self._own: Callable[..., Any] | None = None

    def place(self) -> None:
        """Stand in; before another site of the same module, or an object's own forward."""
        self._own = self.module.__dict__.get("forward")
        self.module.forward = self

    def remove(self) -> None:
        """Leave what was there."""
        del self.module.forward
        if self._own is not None:
            self.module.forward = self._own

    def inner(self, *args: Any, **kwargs: Any) -> Any:
        """What stood there before."""
        if self._own is not None:
            return self._own(*args, **kwargs)
        return type(self.module).forward(self.module, *args, **kwargs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner(*args, **kwargs)

    @property
    def __signature__(self) -> inspect.Signature:
        """For those who look at what a model takes."""
        if self._own is not None:
            return inspect.signature(self._own)
        return inspect.signature(type(self.module).forward.__get__(self.module))

    def described(self) -> str:
        return f"{self.name or 'the model'} ({type(self.module).__qualname__})"
