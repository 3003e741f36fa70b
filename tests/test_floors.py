"""Who may import whom (the table of docs/design.md), and that importing has no effects."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted((ROOT / "usp").rglob("*.py"))
# No floor of their own: the package's doors, and the oracle, which may know nothing it judges.
DOORS = {"__init__.py", "__main__.py", "_version.py"}
ORACLE = "testing.py"
# The only files that may touch torch.distributed, and what each may use of it.
DISTRIBUTED = {
    "comm.py": None,
    "mesh.py": {"DeviceMesh", "ProcessGroup", "device_mesh"},
    "demo/": {"init_process_group", "destroy_process_group"},  # a program starts its own world
}


def floors() -> dict[str, int]:
    """The table of docs/design.md: file, or folder with a slash, to floor."""
    table: dict[str, int] = {}
    for line in (ROOT / "docs" / "design.md").read_text().splitlines():
        row = re.match(r"\|\s*(\d)\s*\|([^|]*)\|", line)
        if row:
            table |= {name: int(row[1]) for name in re.findall(r"`([^`]+)`", row[2])}
    return table


FLOORS = floors()


def home(path: Path) -> str:
    """The row of the table a source file stands in: its name, or its folder's."""
    parts = path.relative_to(ROOT / "usp").parts
    return parts[0] if len(parts) == 1 else f"{parts[0]}/"


def imports(path: Path, tree: ast.AST) -> Iterator[str]:
    """Dotted names of everything a file imports, also inside functions, not for typing alone."""
    typing_only: set[ast.stmt] = set()  # annotations may look up: they do nothing at run time
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            typing_only.update(node.body)
        if node in typing_only:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = path.relative_to(ROOT).with_suffix("").parts[: -node.level or None]
            base = ".".join([*(package if node.level else ()), *filter(None, [node.module])])
            yield from (f"{base}.{alias.name}" for alias in node.names)


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


def our_imports(path: Path) -> set[Path]:
    tree = ast.parse(path.read_text())
    return {found for name in imports(path, tree) if (found := source_of(name)) and found != path}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_file_imports_from_a_higher_floor(path: Path) -> None:
    if path.name in DOORS and path.parent == ROOT / "usp":
        return
    if path.name == ORACLE:
        assert our_imports(path) == set(), "the oracle must not import what it judges"
        return
    assert home(path) in FLOORS, f"docs/design.md has no floor for {home(path)}"
    for other in our_imports(path):
        if other.parent == ROOT / "usp" and other.name in DOORS:
            assert FLOORS[home(path)] == 7 or other.name == "_version.py", (
                f"{path.name} imports the package's door {other.name}: only floor 7 may"
            )
            continue
        if other.name == ORACLE:
            assert FLOORS[home(path)] == 7, f"{path.name} imports the oracle"
            continue
        assert FLOORS[home(other)] <= FLOORS[home(path)], (
            f"{path.name} (floor {FLOORS[home(path)]}) imports {other.name} "
            f"(floor {FLOORS[home(other)]})"
        )


def test_every_file_of_the_table_exists() -> None:
    built = {name for name in FLOORS if name not in ("csrc/", "kernels/", "integrations/")}
    missing = [name for name in built if not (ROOT / "usp" / name).exists()]
    assert not missing, f"docs/design.md names {missing}, which usp/ does not hold"


def test_no_two_files_import_each_other() -> None:
    graph = {path: our_imports(path) for path in SOURCES if path.name not in DOORS}
    state: dict[Path, str] = {}

    def visit(path: Path, way: tuple[Path, ...]) -> None:
        assert state.get(path) != "open", f"a circle: {' -> '.join(p.name for p in (*way, path))}"
        if path in state or path not in graph:
            return
        state[path] = "open"
        for other in sorted(graph[path]):
            visit(other, (*way, path))
        state[path] = "done"

    for path in sorted(graph):
        visit(path, ())


def test_backends_never_import_each_other() -> None:
    folder = ROOT / "usp" / "backends"
    files = [path for path in SOURCES if path.parent == folder and path.name != "__init__.py"]
    assert files
    families = {path for path in files if not path.name.startswith("_")}
    for path in files:
        others = {other.name for other in our_imports(path) & families}
        assert not others, f"backends/{path.name} imports {others}"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_only_comm_talks_to_torch_distributed(path: Path) -> None:
    if path.name == ORACLE:  # its byte counter listens to the c10d ops, which is not a call
        return
    allowed = DISTRIBUTED.get(home(path), set())
    if allowed is None:
        return
    tree = ast.parse(path.read_text())
    used = {name for name in imports(path, tree) if name.startswith("torch.distributed")}
    used |= {
        ast.unparse(node)
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and ast.unparse(node).startswith("torch.distributed.")
    }
    surplus = {name for name in used if name.split(".")[-1] not in allowed}
    assert not surplus, f"{path.name} uses {surplus}: that is comm.py's work"


PROBE = """
import importlib.abc, json, os, sys

blocked = ("numpy", "triton", "flash_attn", "torchvision", "timm", "transformers", "diffusers",
           "matplotlib", "skimage", "scipy", "rich", "tqdm", "pybind11")

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
import usp
after = {
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
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    # torch itself warns that numpy is missing; nothing else may be said
    said = [line for line in done.stderr.splitlines() if "usp" in line]
    assert not said, done.stderr
    found = json.loads(report.read_text())
    assert found == {
        "heavy": [],
        "environ": False,
        "threads": False,
        "dtype": False,
        "rng": False,
        "distributed": False,
        "cuda": False,
        "works": True,
    }
