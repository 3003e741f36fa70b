"""What a module finds around it, for the second time that it computes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch.overrides import _get_current_function_mode_stack

from usp.rng import Drawn


class Surroundings:
    """Random numbers, autocast, and modes that answer torch's functions, as they are now.

    Attributes:
        drawn: The random numbers: the first time, too, is with these.
    """

    def __init__(self, device: torch.device) -> None:
        self.drawn = Drawn()
        self._autocast = [
            (
                kind,
                torch.get_autocast_dtype(kind),
                torch.is_autocast_enabled(kind),
                torch.is_autocast_cache_enabled(),
            )
            for kind in dict.fromkeys((device.type, "cpu"))
            if torch.amp.is_autocast_available(kind)
        ]
        # a region that is paused answers nothing
        stack = _get_current_function_mode_stack()
        self._modes = [mode for mode in stack if not getattr(mode, "is_paused", False)]

    @contextmanager
    def again(self) -> Iterator[None]:
        """As they were, and gradients are wanted."""
        with ExitStack() as stack:
            stack.enter_context(self.drawn.again())
            for options in self._autocast:
                stack.enter_context(torch.autocast(*options))
            entered = _get_current_function_mode_stack()
            for mode in self._modes:
                if not any(mode is other for other in entered):
                    stack.enter_context(mode)
            stack.enter_context(torch.enable_grad())
            yield
