"""Session-wide set-up: hypothesis profiles, the pool of distributed workers, what is GPU code."""

from __future__ import annotations

import atexit
import gc
import os
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from background import Background, Said
from gpu_builds import Builds
from hypothesis import HealthCheck, settings
from parts import taken_part
from places import TESTS
from pool import Pool
from triton_interpreter import kernels_unavailable, start_interpreter

# Inductor would start a pool of compilers in every worker of a mesh, for a kernel or two each.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
# And try, in each of them, whether what it compiles for each kind of vector can be loaded.
os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "1")
# Tests replace kernels and ask for wrong ones by name; whether these are checked by usp itself, and
# what is kept of it for the user, is backends/test_trust.py's.
os.environ.setdefault("USP_SELF_CHECK", "0")

_COMMON = {
    "deadline": None,
    "print_blob": True,
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
}
settings.register_profile("default", max_examples=30, **_COMMON)
settings.register_profile("ci", max_examples=30, derandomize=True, **_COMMON)
settings.register_profile("long", max_examples=2000, **_COMMON)
settings.load_profile("default")

_pool = Pool()
_interpreter = Pool(size=4, setup=start_interpreter)
_background = Background(
    {
        "gpu_builds": "gpu_builds",
        "ahead_of_time": "test_triton_compile",
        "rehearsal": "test_gpu_rehearsal",
    }
)


def pytest_addoption(parser: pytest.Parser) -> None:
    about = "where the tests marked gpu run; on a cpu one case of each is rehearsed, a small one"
    parser.addoption("--device", choices=("cuda", "cpu"), default="cuda", help=about)
    about = "tests that wait for a long command (support/background.py): them alone, or all others"
    parser.addoption("--waiting", choices=("only", "without"), help=about)
    parser.addoption("--part", metavar="K/N", help="the K-th of N parts of the tests")


# Rooms of what executes or compiles GPU code; contract tests mark their own subjects.
_DEVICE_CODE = (TESTS / "kernels", TESTS / "gpu")


def in_device_room(path: Path) -> bool:
    return any(path.is_relative_to(room) for room in _DEVICE_CODE)


# A file that holds a test with the mark names one of these.
_NAMES = {
    "long": ("mark.long",),
    "device_code": ("device_code", "interpreter", "subjects", "move_ops"),
}


def may_hold(path: Path, mark: str) -> bool:
    if mark == "device_code" and in_device_room(path):
        return True
    return any(name in path.read_text() for name in _NAMES[mark])


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """What is left out is not imported either: most of a selection's time, and some need Triton."""
    if collection_path.suffix != ".py":
        return None
    wanted, *others = config.option.markexpr.split(" and ")
    if wanted in _NAMES and not may_hold(collection_path, wanted):
        return True
    left_out = "not device_code" in (wanted, *others) and in_device_room(collection_path)
    return True if left_out else None


def pytest_itemcollected(item: pytest.Item) -> None:
    if in_device_room(item.path) or "interpreter" in getattr(item, "fixturenames", ()):
        item.add_marker(pytest.mark.device_code)
    for mark in _NAMES.keys() & {each.name for each in item.iter_markers()}:
        assert may_hold(item.path, mark), f"{item.path}: -m {mark} would not find {item.name}"


def pytest_configure(config: pytest.Config) -> None:
    # Two processes share out the tests; threads that wait for each other would burn both cores.
    torch.set_num_threads(1)
    if config.getoption("--device") == "cpu":
        start_interpreter()


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    kept = list(items)
    if config.getoption("--device") == "cpu":
        kept = rehearsed(kept)
    kept = taken_part(kept, config.getoption("--part"))
    kept.sort(key=waits_for_the_background)
    waiting = config.getoption("--waiting")
    if waiting is not None:
        kept = [item for item in kept if waits_for_the_background(item) == (waiting == "only")]
    left = set(kept)
    config.hook.pytest_deselected(items=[item for item in items if item not in left])
    items[:] = kept


def waits_for_the_background(item: pytest.Item) -> bool:
    """Such tests come last: what they wait for is done beside the others."""
    return bool(_background.modules.keys() & asked_for(item))


def asked_for(item: pytest.Item) -> set[str]:
    """Fixtures of a test, and those that its subject runs on (``contract/subjects``)."""
    params = getattr(getattr(item, "callspec", None), "params", {})
    more = getattr(params.get("subject"), "fixtures", ())
    return {*getattr(item, "fixturenames", ()), *more}


def rehearsed(items: list[pytest.Item]) -> list[pytest.Item]:
    """One case of each test of each subject."""
    found = {}
    for item in items:
        params = getattr(getattr(item, "callspec", None), "params", {})
        found[item.path, getattr(item, "originalname", item.name), params.get("subject")] = item
    return list(found.values())


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> str:
    """Of the tests marked gpu, which fail where there is none: they were asked for."""
    found: str = request.config.getoption("--device")
    assert found == "cpu" or torch.cuda.is_available(), "torch sees no GPU"
    return found


def pytest_collection_finish(session: pytest.Session) -> None:
    if session.config.option.collectonly:
        return
    gc.freeze()  # torch and thousands of tests stay: nothing to walk through again and again
    _background.start({name for item in session.items for name in asked_for(item)})
    if any("pool" in getattr(item, "fixturenames", ()) for item in session.items):
        of_doors = any(item.get_closest_marker("library") for item in session.items)
        _pool.prepare(*(["doors_ahead"] if of_doors else []))


@pytest.fixture(scope="session")
def pool() -> Iterator[Pool]:
    """Up to six gloo workers; see ``tests/support/pool.py``."""
    yield _pool
    _pool.close()


@pytest.fixture(scope="session")
def interpreter() -> Iterator[Pool]:
    """Up to four gloo workers in which Triton interprets its kernels on CPU."""
    pytest.importorskip("triton")
    (unavailable,) = _interpreter.run(kernels_unavailable, ranks=1)
    if unavailable is not None:
        pytest.skip(unavailable)
    yield _interpreter
    _interpreter.close()


@pytest.fixture(scope="session")
def gpu_builds() -> Builds:
    """Wheels with GPU kernels, each made once; see ``tests/gpu_builds.py``."""
    return Builds(lambda: _background.result("gpu_builds"))


@pytest.fixture(scope="session")
def ahead_of_time() -> Said:
    """Every Triton kernel compiled ahead of time; see ``tests/kernels/test_triton_compile.py``."""
    return _background.result("ahead_of_time")


@pytest.fixture(scope="session")
def rehearsal() -> Said:
    """The tests that need a GPU on a CPU; see ``tests/gpu/test_gpu_rehearsal.py``."""
    return _background.result("rehearsal")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """One line for each kind of skip, however many tests and files it concerns."""
    skipped = terminalreporter.stats.get("skipped", [])
    reasons = Counter(report.longrepr[2].removeprefix("Skipped: ") for report in skipped)
    for reason, count in reasons.most_common():
        terminalreporter.write_line(f"skipped {count}: {reason}")


def pytest_unconfigure() -> None:
    _background.stop()
    if "triton" in sys.modules:
        atexit.register(_silence)


def _silence() -> None:
    """Triton's library reports pages of objects that live until the interpreter ends.

    It does this for its own worker processes; everything of ours has been said by now.
    """
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
