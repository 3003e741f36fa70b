"""Keeps a candidate that faults or hangs from taking what others measure with it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, NoReturn

from usp.bench.device import said, synchronize

SECONDS = 120.0  # of one candidate's first call, which compiles


class Guard:
    """Tries candidates one by one.

    Args:
        avoid: Candidates that were fatal before, with the reason.
        fatal: Called with a candidate and a reason once the GPU can do nothing more for this
            process, perhaps from another thread; does not come back.
        seconds: After which a candidate counts as hanging.
    """

    def __init__(
        self,
        avoid: dict[str, str],
        fatal: Callable[[str, str], NoReturn],
        seconds: float = SECONDS,
    ) -> None:
        self._avoid, self._fatal, self._seconds = avoid, fatal, seconds

    def tried(self, runs: dict[str, Callable[[], Any]]) -> tuple[dict[str, Any], dict[str, str]]:
        """What each gives; why the others give nothing."""
        found: dict[str, Any] = {}
        failed = {name: self._avoid[name] for name in runs if name in self._avoid}
        for name, run in runs.items():
            if name in failed:
                continue
            watch = threading.Timer(self._seconds, self._fatal, (name, "it hangs"))
            watch.daemon = True
            watch.start()
            try:
                found[name] = run()
                synchronize()
            except Exception as error:  # whoever cannot do this says so in many ways
                failed[name] = said(error)
                if is_dead():
                    self._fatal(name, failed[name])
            finally:
                watch.cancel()
        return found, failed


def is_dead() -> bool:
    """Whether the GPU faulted: whatever this process asks of it afterwards fails, too."""
    try:
        synchronize()
    except Exception:
        return True
    return False
