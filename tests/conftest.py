"""Session-wide set-up: hypothesis profiles and the pool of distributed workers."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# the workers and the tests import helpers of this folder by name
sys.path.insert(0, str(Path(__file__).resolve().parent))

from pool import Pool
from triton_interpreter import start_interpreter

_COMMON = {
    "deadline": None,
    "print_blob": True,
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
}
settings.register_profile("default", max_examples=100, **_COMMON)
settings.register_profile("ci", max_examples=100, derandomize=True, **_COMMON)
settings.register_profile("long", max_examples=2000, **_COMMON)
settings.load_profile("default")

_pool = Pool()
_interpreter = Pool(size=4, setup=start_interpreter)


def pytest_collection_finish(session: pytest.Session) -> None:
    if any("pool" in getattr(item, "fixturenames", ()) for item in session.items):
        _pool.prepare()


@pytest.fixture(scope="session")
def pool() -> Iterator[Pool]:
    """Up to six gloo workers; see ``tests/pool.py``."""
    yield _pool
    _pool.close()


@pytest.fixture(scope="session")
def interpreter() -> Iterator[Pool]:
    """Up to four gloo workers in which Triton interprets its kernels on CPU."""
    pytest.importorskip("triton")
    yield _interpreter
    _interpreter.close()
