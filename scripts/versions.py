#!/usr/bin/env python3
"""The versions of Python and torch that pyproject.toml says are supported. Standard library only.

usage: scripts/versions.py check VENV   types for the oldest and the newest Python, and
                                        byte-compilation by each interpreter found here
       scripts/versions.py test         make test with each pair, in an environment of its own
                                        (downloads each torch: gigabytes, and an hour)
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from glob import glob
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ("usp", "build_backend", "scripts", "setup.py", "examples", "benchmarks")


def supported() -> list[str]:
    """Versions of Python, as the classifiers name them."""
    text = (ROOT / "pyproject.toml").read_text()
    return re.findall(r'"Programming Language :: Python :: (3\.\d+)"', text)


def pairs() -> list[tuple[str, str]]:
    """(Python, torch) to run `make test` with."""
    text = (ROOT / "pyproject.toml").read_text()
    (listed,) = re.findall(r"^tested = \[(.*?)^\]", text, re.DOTALL | re.MULTILINE)
    return re.findall(r'"python (\S+), torch (\S+)"', listed)


def interpreter(version: str) -> str | None:
    """One of that version on the PATH, or of pyenv."""
    pyenv = sorted(glob(os.path.expanduser(f"~/.pyenv/versions/{version}.*/bin/python")))
    candidates = [shutil.which(f"python{version}"), *pyenv]
    return next((path for path in candidates if path and answers(path, version)), None)


def answers(path: str, version: str) -> bool:
    """Whether it runs: a shim may only say that the version is not active."""
    said = subprocess.run([path, "--version"], capture_output=True, text=True, check=False)
    return said.returncode == 0 and said.stdout.startswith(f"Python {version}.")


def wrong_types(version: str, venv: Path) -> Iterator[str]:
    mypy = [str(venv / "bin" / "mypy"), "--python-version", version]
    done = subprocess.run(mypy, cwd=ROOT, capture_output=True, text=True, check=False)
    print(f"[usp] python {version}: types checked")
    if done.returncode:
        yield done.stdout


def wrong_syntax(version: str) -> Iterator[str]:
    found = interpreter(version)
    if found is None:
        print(f"[usp] python {version}: no interpreter here to compile by")
        return
    code = "import sys; [compile(open(f).read(), f, 'exec') for f in sys.argv[1:]]"
    files = [str(f) for s in SOURCES for f in ([ROOT / s] if s[-3:] == ".py" else python_in(s))]
    done = subprocess.run(
        [found, "-W", "error", "-c", code, *files], capture_output=True, text=True, check=False
    )
    if done.returncode:
        yield done.stderr
    print(f"[usp] python {version}: {len(files)} files compiled by {found}")


def python_in(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def check(venv: Path) -> int:
    versions = supported()
    # what lies between has all that the oldest has, and nothing that the newest lacks
    ends = versions[0], versions[-1]
    with ThreadPoolExecutor() as pool:  # mypy keeps to one core
        types = list(pool.map(lambda version: [*wrong_types(version, venv)], ends))
    wrong = [text for texts in types for text in texts]
    wrong += [text for version in versions for text in wrong_syntax(version)]
    print("\n".join(wrong), end="")
    return bool(wrong)


def test() -> int:
    failed = []
    for python, torch in pairs():
        venv = ROOT / "build" / f"python{python}-torch{torch}"
        found = interpreter(python)
        if found is None:
            print(f"[usp] python {python} is not installed here: left out")
            continue
        subprocess.run([found, "-m", "venv", str(venv)], check=True)
        install = [str(venv / "bin" / "python"), "-m", "pip", "install", "-q", f"torch=={torch}.*"]
        subprocess.run(install, check=True)
        if subprocess.run(["make", "test", f"VENV={venv}"], cwd=ROOT, check=False).returncode:
            failed.append(f"python {python}, torch {torch}")
    print(f"[usp] failed: {'; '.join(failed)}" if failed else "[usp] every pair passed")
    return bool(failed)


def main(arguments: list[str]) -> int:
    if len(arguments) == 2 and arguments[0] == "check":
        return check(Path(arguments[1]))
    if arguments == ["test"]:
        return test()
    print(__doc__, file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
