"""Folders are floors (the table of docs/design.md), and importing has no effects."""

from __future__ import annotations

import ast
import functools
import json
import re
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
from places import ROOT

PACKAGE = ROOT / "usp"
DOOR = PACKAGE / "__init__.py"  # the public names: for people's programs, on the floors above all
NEUTRAL = {PACKAGE / "__main__.py", PACKAGE / "_version.py"}
SOURCES = sorted(set(PACKAGE.rglob("*.py")) - NEUTRAL - {DOOR})
# The only files that may touch torch.distributed, and what each may use of it.
DISTRIBUTED = {
    "distributed/comm.py": None,
    "distributed/making.py": {"DeviceMesh", "ProcessGroup", "device_mesh"},
    "distributed/mesh.py": {"DeviceMesh", "device_mesh"},
    "distributed/mesh_axes.py": {"DeviceMesh", "device_mesh"},
    "testing/wire.py": {"unbox", "ProcessGroup"},  # listens to the c10d ops, which is not a call
    "sharding/gradients.py": {"ProcessGroup"},  # a type
    "sharding/loss.py": {"ProcessGroup"},
    "sharding/tiled_loss.py": {"ProcessGroup"},
    "nn/batch.py": {"ProcessGroup"},
    # measures, and has rings of others beside usp's
    "bench/world.py": None,
    "bench/peers/plain.py": None,
    "bench/peers/deepspeed.py": None,
    "bench/peers/ringmaster.py": None,
    # a program starts its own world
    "demo/": {"init_process_group", "destroy_process_group", "FileStore"},
}


def floors() -> dict[str, int]:
    """The table of docs/design.md: folder with a slash, or file, to floor."""
    table: dict[str, int] = {}
    for line in (ROOT / "docs" / "design.md").read_text().splitlines():
        row = re.match(r"\|\s*(\d)\s*\|([^|]*)\|", line)
        if row:
            table |= {name: int(row[1]) for name in re.findall(r"`usp/([^`]+)`", row[2])}
    return table


FLOORS = floors()


def room(path: Path) -> str:
    """Where a file lives: its folder right below usp/, or itself."""
    first, *rest = path.relative_to(PACKAGE).parts
    return f"{first}/" if rest else first


def label(path: Path) -> str:
    return str(path.relative_to(PACKAGE))


@functools.cache
def nodes(path: Path) -> list[ast.AST]:
    """Imports and attributes in a file."""
    wanted = (ast.Import, ast.ImportFrom, ast.Attribute)
    return [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, wanted)]


def imports(path: Path) -> Iterator[str]:
    """Dotted names of everything a file imports, inside functions and for typing too."""
    for node in nodes(path):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = path.relative_to(ROOT).with_suffix("").parts[: -node.level or None]
            base = ".".join([*(package if node.level else ()), *filter(None, [node.module])])
            yield from (f"{base}.{alias.name}" for alias in node.names)


@functools.cache
def source_of(name: str) -> Path | None:
    """The file of usp that a dotted name comes from, or None for what is not ours."""
    parts = name.split(".")
    if parts[0] != "usp":
        return None
    for end in (len(parts), len(parts) - 1):
        path = ROOT.joinpath(*parts[:end])
        if path.with_suffix(".py").is_file() and end > 1:
            return path.with_suffix(".py")
        if (path / "__init__.py").is_file():
            return path / "__init__.py"
    return None


@functools.cache
def our_imports(path: Path) -> set[Path]:
    found = {source_of(name) for name in imports(path)}
    return {other for other in found if other is not None} - {path} - NEUTRAL


def test_the_table_is_the_tree() -> None:
    assert {room(path) for path in SOURCES} == set(FLOORS)


@pytest.mark.parametrize("path", SOURCES, ids=label)
def test_a_folder_imports_only_from_lower_floors(path: Path) -> None:
    mine = FLOORS[room(path)]
    for other in our_imports(path):
        if other == DOOR:
            assert mine > FLOORS["integrations/"], f"{label(path)} imports the package's door"
        elif room(other) != room(path):
            theirs = FLOORS[room(other)]
            assert theirs < mine, (
                f"{label(path)} (floor {mine}) imports {label(other)} (floor {theirs})"
            )


def test_no_circles() -> None:
    graph = {path: our_imports(path) for path in SOURCES}
    state: dict[Path, str] = {}

    def visit(path: Path, way: tuple[Path, ...]) -> None:
        assert state.get(path) != "open", f"a circle: {' -> '.join(map(label, (*way, path)))}"
        if path in state or path not in graph:
            return
        state[path] = "open"
        for other in sorted(graph[path]):
            visit(other, (*way, path))
        state[path] = "done"

    for path in sorted(graph):
        visit(path, ())


@pytest.mark.parametrize("folder", ["backends", "integrations"])
def test_families_never_import_each_other(folder: str) -> None:
    """One kernel family, one library a file; what they share has a name with an underscore."""
    files = set((PACKAGE / folder).glob("[a-z]*.py"))
    assert files
    for path in files:
        assert not our_imports(path) & files, f"{label(path)} imports its neighbour"


def test_no_test_file_imports_another() -> None:
    """What several need lives in tests/support."""
    for path in (ROOT / "tests").rglob("*.py"):
        taken = [name for name in imports(path) if name.startswith("test_")]
        assert not taken, f"{path.relative_to(ROOT)} imports {taken}"


@pytest.mark.parametrize("path", SOURCES, ids=label)
def test_only_comm_talks_to_torch_distributed(path: Path) -> None:
    allowed = DISTRIBUTED.get(label(path), DISTRIBUTED.get(room(path), set()))
    if allowed is None:
        return
    used = {name for name in imports(path) if name.startswith("torch.distributed")}
    used |= {
        ast.unparse(node)
        for node in nodes(path)
        if isinstance(node, ast.Attribute) and ast.unparse(node).startswith("torch.distributed.")
    }
    surplus = {name for name in used if name.split(".")[-1] not in allowed}
    assert not surplus, f"{label(path)} uses {surplus}: that is distributed/comm.py's work"


PROBE = """
import importlib.abc, json, os, sys

blocked = ("numpy", "triton", "flash_attn", "torchvision", "timm", "transformers", "diffusers",
           "matplotlib", "skimage", "scipy", "rich", "tqdm")

class Block(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in blocked:
            raise ModuleNotFoundError(f"{name} is blocked", name=name)

if BLOCKING:
    sys.meta_path.insert(0, Block())
import torch
modules, environ = set(sys.modules), dict(os.environ)
threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
state = torch.random.get_rng_state()
said = os.open(sys.argv[1] + ".said", os.O_CREAT | os.O_RDWR)
kept = os.dup(1), os.dup(2)
os.dup2(said, 1), os.dup2(said, 2)
import usp
sys.stdout.flush(), sys.stderr.flush()
os.dup2(kept[0], 1), os.dup2(kept[1], 2)
after = {
    "said": os.pread(said, 2000, 0).decode(),
    "heavy": sorted(name for name in set(sys.modules) - modules if name.split(".")[0] in blocked),
    "environ": dict(os.environ) != environ,
    "threads": torch.get_num_threads() != threads,
    "dtype": torch.get_default_dtype() != dtype,
    "rng": not torch.equal(torch.random.get_rng_state(), state),
    "distributed": torch.distributed.is_available() and torch.distributed.is_initialized(),
    "cuda": torch.cuda.is_initialized(),
}
q = torch.ones(1, 3, 2, 4)
after["works"] = torch.equal(usp.long_context_attention(q, q, q, causal=True), q)
with open(sys.argv[1], "w") as file:
    json.dump(after, file)
"""


@pytest.mark.parametrize("blocking", [True, False], ids=["torch alone", "everything there"])
def test_import_is_pure(blocking: bool, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    code = PROBE.replace("BLOCKING", str(blocking))
    # -c puts the working folder first on sys.path: usp comes from where it came from here.
    paths = [str(Path(folder).resolve()) for folder in sys.path if folder]
    code = f"import sys; sys.path[:0] = {paths!r}\n{textwrap.dedent(code)}"
    done = subprocess.run(
        [sys.executable, "-W", "error::ResourceWarning", "-c", code, str(report)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(report.read_text())
    assert found == {
        "said": "",
        "heavy": [],
        "environ": False,
        "threads": False,
        "dtype": False,
        "rng": False,
        "distributed": False,
        "cuda": False,
        "works": True,
    }


def test_test_files_have_names_of_their_own() -> None:
    """pytest imports them by name, and of two of one name collects neither."""
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert sorted(set(names)) == sorted(names)
