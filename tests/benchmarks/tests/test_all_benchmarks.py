"""Check `tests/benchmarks/all.py`: its table keeps what was not measured, and its figures are in the scripts' JSON."""

import json
from pathlib import Path
from typing import Any

import pytest

import all as everything
from all import BEGIN, BENCHMARKS, END, Benchmark, Figure, lines_of, main, with_lines

FIGURES = {"a": {"today": 2.0, "reached": 1.0, "ratio": 0.5}, "b": {"today": None, "reached": 3.0, "ratio": None}}
BENCHMARK = Benchmark(("x.py",), (Figure("a", "one", "two", "half", "0.6"), Figure("b", "three")))
REPORT = {"one": 1, "two": 2, "half": 0.5, "three": 3}


@pytest.fixture
def results(tmp_path: Path) -> Path:
    path = tmp_path / "RESULTS.md"
    path.write_text(f"before\n\n{BEGIN}\n{END}\n\nafter\n")
    return path


@pytest.fixture
def two(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace the benchmarks by one that works and one that fails."""
    monkeypatch.setattr(everything, "BENCHMARKS", {"good": BENCHMARK, "bad": Benchmark(("y.py",), ())})

    def run(arguments: list[str]) -> dict[str, Any]:
        if arguments[0] == "x.py":
            return REPORT
        raise RuntimeError("exit status 1")

    monkeypatch.setattr(everything, "run", run)


def test_only_measured_lines_change() -> None:
    text = with_lines(f"before\n{BEGIN}\n{END}\nafter\n", lines_of(BENCHMARK, FIGURES, ["x.py"]))
    again = with_lines(text, lines_of(BENCHMARK, {**FIGURES, "a": {**FIGURES["a"], "reached": 7.0}}, ["x.py"]))
    old, new = text.splitlines(), again.splitlines()
    changed = [line for line in range(len(old)) if old[line] != new[line]]
    assert len(old) == len(new) and [new[line].split(" | ")[:3] for line in changed] == [["| a", "2", "7"]]
    assert with_lines(again, {}) == again and new[0] == "before" and new[-1] == "after"


def test_a_file_without_the_marks_is_refused() -> None:
    with pytest.raises(ValueError, match="not marked"):
        with_lines("text", {})


@pytest.mark.usefixtures("two")
def test_what_fails_is_named_and_the_rest_is_written(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="1"):
        main(["--only", "good", "bad", "--results", str(results)])
    printed = capsys.readouterr()
    assert "bad failed: exit status 1" in printed.out and "failed: bad" in printed.err
    assert json.loads(printed.out.splitlines()[-1])["a"] == {"today": 2, "reached": 1, "ratio": 0.5, "asked": "0.6"}
    assert "| a | 2 | 1 | 0.5 | 0.6 | `x.py` |" in results.read_text() and results.read_text().endswith("after\n")


def test_what_is_missing_is_said_first(monkeypatch: pytest.MonkeyPatch, results: Path) -> None:
    monkeypatch.setattr(everything, "ROOT", results.parent)
    with pytest.raises(SystemExit, match="2"):
        main(["--only", "answering", "--results", str(results)])


def test_names_of_figures_are_different() -> None:
    names = [figure.what for benchmark in BENCHMARKS.values() for figure in benchmark.figures]
    assert len(names) == len(set(names))


@pytest.mark.slow
def test_a_quick_run(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["--only", "criterion", "plan", "--quick", "--results", str(results)])
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    figures = [figure.what for name in ("criterion", "plan") for figure in BENCHMARKS[name].figures]
    assert sorted(report) == sorted(figures) and all(row["reached"] > 0 for row in report.values())
