"""``usp bench compare``, ``table`` and ``plot``: from files alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from usp import bench
from usp.bench import compare, machine, table
from usp.bench.grouping import grouped
from usp.bench.options import BenchError
from usp.bench.plot import panels_of
from usp.bench.records import Sink, not_timed, read, time_records
from usp.bench.timing import Times


def write(file: Path, factor: float = 1.0, lengths: tuple[int, ...] = (8, 16)) -> Path:
    """usp slower by a factor; sdpa twice usp's first time, but for the roof."""
    sink = Sink(file, machine.header("kernels", "cpu", {}, "wall"))
    sink.add({"record": "roofline", "flops_per_s": {"fp32": 1e9}, "bytes_per_s": 1e9})
    for length in lengths:
        seconds = [0.010 * length, 0.011 * length, 0.012 * length]
        times = {"usp native": [factor * s for s in seconds], "sdpa": [2 * s for s in seconds]}
        case = {"dtype": "fp32", "length": length}
        more = {"usp native": {"flops_per_s": 1e9}, "sdpa": {"flops_per_s": 5e8}}
        for record in time_records("forward", case, Times({**times, "matmul": seconds}), more=more):
            sink.add(record)
        for record in not_timed("forward", case, {"flex": "it compiles"}):
            sink.add(record)
    values = {"record": "value", "what": "fit", "case": {}, "candidate": "shift"}
    sink.add({**values, "values": {"latency_s": 1e-5}})
    sink.close()
    return file


def test_compare_says_what_is_more_than_noise(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a, slow = write(tmp_path / "a.json"), write(tmp_path / "b.json", 1.3, (8, 32))
    assert bench.run("compare", [str(a), str(a)]) == 0
    assert "LOSS" not in capsys.readouterr().out
    assert bench.run("compare", [str(a), str(slow)]) == 1
    said = capsys.readouterr().out
    assert "-  1.300" in said and "LOSS" in said and "in A alone 3, in B alone 3" in said
    assert said.index("matmul, forward") < said.index("usp native, forward")
    assert bench.run("compare", [str(slow), str(a)]) == 0
    assert bench.run("compare", [str(a), str(slow), "--allow", "1.4"]) == 0
    capsys.readouterr()
    # within the spread of the rounds it is noise
    near = write(tmp_path / "c.json", 1.05, (8,))
    assert bench.run("compare", [str(a), str(near), "--allow", "1.0", "--json"]) == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert {r["verdict"] for r in found if r["record"] == "compared"} == {"same"}


def test_a_table_has_a_row_a_case_and_a_column_a_candidate(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(tmp_path / "a.json")
    out = tmp_path / "a.md"
    assert bench.run("table", [str(file), "--over", "sdpa", "--out", str(out)]) == 0
    text = out.read_text()
    assert capsys.readouterr().out == ""
    assert text.startswith("`usp bench kernels`, 20")
    assert "**forward**: dtype fp32" in text
    assert "| length | usp native | sdpa | matmul |" in text
    assert "| 8 | 88 ms (83.2 ms - 92.8 ms), 2.00 | 176 ms" in text
    assert "Not timed: flex (it compiles)" in text
    assert "| candidate | latency_s |\n| --- | --- |\n| shift | 1e-05 |" in text
    single = table.markdown(read(write(tmp_path / "b.json", lengths=(8,))), ["forward"])
    assert "|  | usp native |" in single and "| shift |" not in single


def test_old_results_are_tables_too(tmp_path: Path) -> None:
    """Programs for one question write what they like, one record a line."""
    file = tmp_path / "a.json"
    head = machine.header("sweep", "cpu", {}, "wall")
    lines = [head, {"record": "points", "length": 5, "ratio": 1.5, "seconds": {"a": [1.0]}}]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert "**points**\n\n| length | ratio |\n| --- | --- |\n| 5 | 1.5 |" in table.markdown(
        read(file)
    )


def test_plot(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    file = write(tmp_path / "a.json")
    assert bench.run("plot", [str(file)]) == 0
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert bench.run("plot", [str(file), "--out", str(tmp_path / "b.svg")]) == 0
    (panel,) = (p for group in grouped(read(file).records) for p in panels_of(group))
    assert panel.over == "length" and panel.title == "forward: fp32"
    capsys.readouterr()
    with pytest.raises(BenchError, match="holds no times of these"):
        bench.run("plot", [str(file), "--what", "backward"])
    with pytest.raises(BenchError, match=r"x.foo: Format 'foo' is not supported"):
        bench.run("plot", [str(file), "--out", str(tmp_path / "x.foo")])
    for wrong in (["--what", "backward"], ["--over", "nobody"]):
        with pytest.raises(BenchError, match=f"{' '.join(wrong)}: the results have none of these"):
            bench.run("table", [str(file), *wrong])


@pytest.mark.parametrize("program", ["compare", "table", "plot"])
def test_what_is_no_result_is_refused(program: str, tmp_path: Path) -> None:
    files = [str(tmp_path / "none.json")] * (2 if program == "compare" else 1)
    with pytest.raises(BenchError, match="cannot be read"):
        bench.run(program, files)


def test_files_without_a_common_measurement(tmp_path: Path) -> None:
    files = [write(tmp_path / f"{n}.json", lengths=(n,)) for n in (8, 16)]
    with pytest.raises(BenchError, match="hold no measurement that is in both"):
        bench.run("compare", list(map(str, files)))
    found: list[dict[str, Any]] = compare.compared(read(files[0]), read(files[0]), 1.05)
    assert [r["ratio"] for r in found] == [1.0] * 3
