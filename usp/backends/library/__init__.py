"""Attention kernels of libraries, as backends: partial results that usp merges.

``table.py`` holds what is known of each; ``flash2.py`` and its neighbours call them, each in its
own convention; ``tiles.py`` cuts a visit into calls that they take; ``backend.py`` is all that they
share. Nothing here imports a library before it is asked for.
"""

from usp.backends.library.backend import LibraryBackend
from usp.backends.library.hub import HubBackends
from usp.backends.library.table import ROWS, trusted

__all__ = ["LIBRARIES", "HubBackends", "LibraryBackend", "trusted"]


def _by_name() -> tuple[LibraryBackend, ...]:
    names = dict.fromkeys(record.name for record in ROWS)
    return tuple(
        LibraryBackend(tuple(record for record in ROWS if record.name == name)) for name in names
    )


LIBRARIES = _by_name()
