#!/usr/bin/env python3
"""Make a virtual environment that holds the right torch and usp. Standard library only.

Run again it does nothing, unless the sources, the extras or the torch have changed. What it
installs is the package itself, not a link to the sources; an editable install that is already
there stays editable.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "build_backend"))

from usp_build.toolchains import VARIABLES  # noqa: E402
from usp_build.torch_install import MINIMUM, REQUIREMENT, installed_torch, release  # noqa: E402

STAMP = "usp-installed.json"
# pip's lines that tell nothing to somebody who waits.
NOISE = ("Requirement already", "Looking in", "Processing", "Using cached", "Collecting", "  ")


class SetupFailed(Exception):
    """The environment cannot be made; the message says what to do."""


def say(text: str) -> None:
    print(f"[usp] {text}", flush=True)


def make_venv(venv: Path) -> Path:
    """The interpreter of `venv`, which is made if it is not there."""
    python = venv / "bin" / "python"
    if not python.is_file():
        say(f"making {venv} with Python {sys.version.split()[0]}")
        made = subprocess.run([sys.executable, "-m", "venv", str(venv)], check=False)
        if made.returncode:
            shutil.rmtree(venv, ignore_errors=True)
            raise SetupFailed(
                "python -m venv failed; on Debian and Ubuntu: apt-get install python3-venv"
            )
    return python


def site_packages(venv: Path) -> list[Path]:
    return sorted({path.resolve() for path in venv.glob("lib*/python*/site-packages")})


def run_pip(python: Path, arguments: Sequence[str]) -> None:
    """pip, with the lines left out that say nothing and a sign of life where it says none."""
    command = [str(python), "-m", "pip", "install", "--disable-pip-version-check", *arguments]
    started = time.monotonic()
    environ = {**os.environ, "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
        text=True,
        env=environ,
    )
    assert process.stdout is not None
    hidden: list[str] = []
    for line in process.stdout:
        if line.strip() and not line.startswith(NOISE):
            text = line.rstrip()
            print(f"  {text if len(text) < 100 else text[:97] + '...'}", flush=True)
        else:
            hidden.append(line.rstrip())
    if process.wait():
        print("\n".join(hidden[-20:]), flush=True)  # the cause may be among them
        raise SetupFailed(f"failed: {' '.join(command)}")
    say(f"done in {time.monotonic() - started:.0f} s")


def has_gpu() -> bool:
    """Whether this machine has an NVIDIA or AMD device a torch could use."""
    return any(Path(node).exists() for node in ("/dev/nvidiactl", "/dev/dxg", "/dev/kfd"))


def cpu_builds(index_output: str) -> list[str]:
    """The CPU builds new enough for usp in what `pip index versions torch` prints, newest first."""
    for line in index_output.splitlines():
        name, _, versions = line.partition(":")
        if name.strip() == "Available versions":
            listed = [version.strip() for version in versions.split(",")]
            fit = [v for v in listed if v.endswith("+cpu") and release(v) >= MINIMUM]
            return sorted(fit, key=release, reverse=True)
    return []


def choose_torch(python: Path) -> str:
    """What to ask pip for: a CPU build where there is no GPU and pip can see one."""
    if sys.platform != "linux" or has_gpu():
        return REQUIREMENT
    listing = subprocess.run(
        [str(python), "-m", "pip", "index", "versions", "torch", "--disable-pip-version-check"],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        check=False,
    )
    builds = cpu_builds(listing.stdout)
    return f"torch=={builds[0]}" if builds else REQUIREMENT


def ensure_torch(python: Path, venv: Path) -> str:
    """The version of torch in `venv`, which is installed only where there is none to keep."""
    present = installed_torch(site_packages(venv))
    if present is None:
        wanted = choose_torch(python)
        say(f"installing {wanted}")
        run_pip(python, [wanted])
        present = installed_torch(site_packages(venv))
        if present is None:
            raise SetupFailed(f"pip installed {wanted}, but {venv} holds no {REQUIREMENT}")
    return present.version


def is_editable(venv: Path) -> bool:
    """Whether `venv` holds an editable install of usp."""
    for folder in site_packages(venv):
        for found in metadata.distributions(name="usp", path=[str(folder)]):
            origin = json.loads(found.read_text("direct_url.json") or "{}")
            return bool(origin.get("dir_info", {}).get("editable", False))
    return False


def build_tools() -> list[tuple[str, tuple[int, ...]]]:
    """What a build requires, and from which version on."""
    listed = re.search(r"(?m)^requires = \[(.*)\]$", (ROOT / "pyproject.toml").read_text())
    assert listed is not None
    required = re.findall(r'"([\w-]+)>=([\d.]+)"', listed[1])
    return [(name, release(version)) for name, version in required]


def has_build_tools(venv: Path) -> bool:
    """Whether `venv` holds all that a build requires: pip need not make an environment for it."""
    folders = [str(folder) for folder in site_packages(venv)]
    return all(
        any(
            release(found.version) >= minimum
            for found in metadata.distributions(name=name, path=folders)
        )
        for name, minimum in build_tools()
    )


def fingerprint(torch: str, editable: bool) -> str:
    """A digest of everything an install depends on."""
    # An editable install reads its Python files from the tree: only what is compiled matters.
    trees = ["build_backend", "csrc"] if editable else ["build_backend", "csrc", "usp"]
    files = [ROOT / "pyproject.toml", ROOT / "setup.py", ROOT / "usp" / "_version.py"]
    for tree in trees:
        files += [p for p in sorted((ROOT / tree).rglob("*")) if p.is_file()]
    generated = (".pyc", ".so", "_build.json")
    digest = hashlib.sha256()
    settings = [os.environ.get(name, "") for name in ("USP_BUILD", "CXX", *VARIABLES)]
    digest.update(json.dumps([torch, editable, *settings]).encode())
    for file in files:
        if not file.name.endswith(generated):
            digest.update(f"\0{file.relative_to(ROOT)}\0".encode() + file.read_bytes())
    return digest.hexdigest()


def install_usp(python: Path, venv: Path, torch: str, extras: set[str]) -> None:
    """Install usp with `extras`, unless the same sources are in `venv` already."""
    editable = is_editable(venv)
    now = fingerprint(torch, editable)
    stamp = venv / STAMP
    before = json.loads(stamp.read_text()) if stamp.is_file() else {}
    extras = extras | set(before.get("extras", []))
    if before.get("fingerprint") == now and set(before["extras"]) == extras:
        return
    stamp.unlink(missing_ok=True)
    listed = f"[{','.join(sorted(extras))}]" if extras else ""
    say(f"installing usp{listed} and compiling its kernels")
    constraint = venv / "usp-constraint.txt"
    constraint.write_text(f"torch=={torch}\n")
    # without isolation nothing is downloaded where everything is there
    options = ["--no-build-isolation"] if has_build_tools(venv) else []
    package = [*(["-e"] if editable else []), f".{listed}"]
    run_pip(python, [*options, "-c", str(constraint), *package])
    stamp.write_text(json.dumps({"fingerprint": now, "extras": sorted(extras)}) + "\n")


def report(venv: Path) -> None:
    """Say what was built, loudly if nothing was: pip hides the build's own words."""
    folders = [ROOT] if is_editable(venv) else site_packages(venv)
    for file in [folder / "usp" / "_build.json" for folder in folders]:
        record = json.loads(file.read_text()) if file.is_file() else {}
        if record.get("reason"):
            say(f"WARNING: the compiled extension was not built: {record['reason']}")
            say("WARNING: usp runs as pure Python, which is right but slow")
            continue
        for kind, reason in record.get("left_out", {}).items():
            say(f"WARNING: the {kind} kernels were not built: {reason}")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv", help="default: .venv")
    parser.add_argument("--extras", default="demo", help="comma-separated; default: demo")
    arguments = parser.parse_args(argv)
    try:
        if sys.version_info < (3, 10):  # noqa: UP036 (run before anything is installed)
            raise SetupFailed(f"usp needs Python 3.10 or newer; this is {sys.version.split()[0]}")
        venv = arguments.venv.absolute()
        python = make_venv(venv)
        torch = ensure_torch(python, venv)
        install_usp(python, venv, torch, set(filter(None, arguments.extras.split(","))))
        report(venv)
        say(f"{venv} is ready: torch {torch}")
    except SetupFailed as failure:
        print(f"[usp] {failure}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
