"""Check the measurements on a GPU: order and budget, what travels, and on the CPU the same code with the tiny model."""

import json
import os
import re
import subprocess
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.gpu import measure
from tests.gpu.measure import PARTS, ROOT, Budget, Part, Processes, main, run_parts
from tests.gpu.models import fill_row
from tests.gpu.some_images import copy_some
from tests.gpu.steps import SYNC, counting_waits
from tests.gpu.ways import SMALL, by_segment, gradients, grouped, largest_error, random_states


def part(name: str, needs: float = 1, most: float = 60) -> Part:
    return Part(name, "nowhere:nothing", needs, most)


@dataclass
class Fake:
    """A launcher whose parts take `seconds` of a clock of its own."""

    seconds: dict[str, float]
    time: float = 0.0
    calls: list[tuple[str, str | None, float]] = field(default_factory=list[tuple[str, str | None, float]])

    def __call__(self, asked: Part, following: Part | None, most: float) -> str:
        self.calls.append((asked.name, None if following is None else following.name, most))
        self.time += min(self.seconds[asked.name], most)
        return "done" if self.seconds[asked.name] <= most else "failed: ended"


def test_parts_run_in_their_order_within_the_budget(capsys: pytest.CaptureFixture[str]) -> None:
    """100 s: a takes 40; b would take 50 but is ended after 20; 40 are left, so c is not begun, and d is."""
    fake = Fake({"a": 40, "b": 50, "c": 1, "d": 100})
    parts = [part("a"), part("b", most=20), part("c", needs=41), part("d")]
    ended = run_parts(parts, Budget(100, lambda: fake.time), fake)
    assert fake.calls == [("a", "b", 60), ("b", "c", 20), ("d", None, 40)]
    assert ended == {"a": "done", "b": "failed: ended", "c": "not run: out of time", "d": "failed: ended"}
    assert list(ended) == ["a", "b", "c", "d"]
    assert "c: not run: out of time (40 s left, it needs 41)" in capsys.readouterr().out


def test_the_budget_never_goes_below_nothing() -> None:
    times = iter([0.0, 3.0, 11.0])
    budget = Budget(10, lambda: next(times))
    assert (budget.left(), budget.left()) == (7.0, 0.0)


def scripts(**sources: str) -> Processes:
    return Processes(lambda asked: [sys.executable, "-c", sources[asked.name]])


def test_a_part_that_fails_or_hangs_does_not_stop_the_next(tmp_path: Path) -> None:
    """One ends with a status, one hangs with a child of its own, one never reads its line."""
    child = "import subprocess, sys, time; p = subprocess.Popen(['sleep', '600']); print(p.pid, file=open({!r}, 'w'))"
    pid = tmp_path / "pid"
    hangs = f"{child.format(str(pid))}; sys.stdin.readline(); time.sleep(600)"
    processes = scripts(fails="raise SystemExit(3)", hangs=hangs, runs="input()")
    parts = [part("fails"), part("hangs", most=2), part("runs")]
    ended = run_parts(parts, Budget(60), processes)
    assert ended == {"fails": "failed: exit status 3", "hangs": "failed: ended after 2 s", "runs": "done"}
    for _ in range(100):
        if not Path("/proc", pid.read_text().strip()).exists():
            break
        time.sleep(0.05)
    status = Path("/proc", pid.read_text().strip(), "status")
    assert not status.exists() or "zombie" in status.read_text()


def test_the_next_part_imports_while_one_runs_but_waits_for_its_turn(tmp_path: Path) -> None:
    """The first ends only after the second has begun; the second's work comes after the first's end."""
    began, done = tmp_path / "began", tmp_path / "done"
    first = f"""
import time; from pathlib import Path
input()
while not Path({str(began)!r}).exists(): time.sleep(0.01)
time.sleep(0.2); Path({str(done)!r}).touch()
"""
    second = f"""
from pathlib import Path
Path({str(began)!r}).touch(); input(); assert Path({str(done)!r}).exists()
"""
    processes = scripts(first=first, second=second)
    assert run_parts([part("first"), part("second")], Budget(60), processes) == {"first": "done", "second": "done"}


def test_sigterm_ends_the_part_that_runs_and_the_one_that_waits(tmp_path: Path) -> None:
    code = f"""
import signal, sys
from tests.gpu.measure import Part, Processes
signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
source = "import os, sys, time; open(os.path.join({str(tmp_path)!r}, str(os.getpid())), 'w'); "
sources = {{"a": source + "input(); time.sleep(600)", "b": source + "input()"}}
processes = Processes(lambda part: [sys.executable, "-c", sources[part.name]])
a, b = (Part(name, "", 1, 600) for name in sources)
try:
    processes(a, b, 600)
finally:
    processes.close()
"""
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, cwd=ROOT) as process:
        while len(list(tmp_path.iterdir())) < 2:
            time.sleep(0.02)
        process.terminate()
        assert process.wait(30) == 143
    assert not [path.name for path in tmp_path.iterdir() if Path("/proc", path.name).exists()]


def test_what_waits_in_vain_is_ended(tmp_path: Path) -> None:
    processes = scripts(a="input()", b="input()")
    assert processes(part("a"), part("b"), 60) == "done"
    (waiting,) = processes._waiting.values()
    assert waiting.poll() is None
    processes.close()
    assert waiting.poll() is not None


def test_without_time_there_is_still_a_report(capsys: pytest.CaptureFixture[str]) -> None:
    report = main(["--budget", "5", "--spent", "5", "--device", "cpu", "--size", "tiny"])
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == report
    assert report["parts"] == {entry.name: "not run: out of time" for entry in PARTS}
    assert report["figures"] == {} and report["card"] is None


def test_a_name_that_comes_again_replaces_the_earlier(tmp_path: Path) -> None:
    (tmp_path / "figures.jsonl").write_text('{"a": {"x": 1}}\n{"b": {"x": 2}}\n{"a": {"x": 3}}\n')
    assert measure.read_figures(tmp_path) == {"a": {"x": 3}, "b": {"x": 2}}


def test_the_ways_to_attend_agree() -> None:
    for lengths, heads, width, causal in SMALL.values():
        states = random_states("cpu", lengths, heads, width, torch.float64)
        expected = gradients(by_segment, states, lengths, causal)
        # measured: 2.2e-16
        assert largest_error(gradients(grouped, states, lengths, causal), expected) <= 1e-12


@pytest.mark.parametrize(("tokens", "lengths"), [(10, [4, 3, 3]), (9, [4, 3]), (17, [4, 3, 3, 4, 3]), (1, [4])])
def test_a_row_is_filled_in_order(tokens: int, lengths: Sequence[int]) -> None:
    examples: Any = [SimpleNamespace(input_ids=range(length)) for length in (4, 3, 3)]
    assert [len(item.input_ids) for item in fill_row(examples, tokens)] == lengths


def test_waits_are_counted_by_line(monkeypatch: pytest.MonkeyPatch) -> None:
    modes: list[str] = []
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    found: Counter[str] = Counter()
    with counting_waits(found):
        for _ in range(3):
            warnings.warn(f"{SYNC} (Triggered internally)", stacklevel=1)
        warnings.warn("another", stacklevel=1)
    assert list(found.values()) == [3] and next(iter(found)).startswith("test_measure.py:")
    assert modes == ["warn", "default"]


def pins(path: Path) -> dict[str, str]:
    lines = [line.split("==") for line in path.read_text().splitlines() if "==" in line]
    return {name.lower().replace("-", "_"): version for name, version in lines}


def test_wheels_are_the_versions_that_were_tested() -> None:
    constraints, wheels = (pins(ROOT / name) for name in ("constraints.txt", "tests/gpu/wheels.txt"))
    assert {name for name, version in wheels.items() if constraints[name] != version} == {"zstd"}


def test_the_first_images_of_a_set(tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "images").mkdir(parents=True)
    for number in range(3):
        (source / "images" / f"{number}.png").write_bytes(bytes([number]))
    images = [{"id": 7 + number, "file_name": f"{number}.png"} for number in range(3)]
    rows = [{"id": number, "image_id": 7 + number} for number in range(3)]
    (source / "instances.json").write_text(json.dumps({"images": images, "annotations": rows, "categories": []}))
    copy_some(source, tmp_path / "out", 2)
    copied = json.loads((tmp_path / "out" / "instances.json").read_text())
    assert copied == {"images": images[:2], "annotations": rows[:2], "categories": []}
    assert sorted(path.name for path in (tmp_path / "out" / "images").iterdir()) == ["0.png", "1.png"]


@pytest.fixture
def collect(tmp_path: Path) -> Callable[..., "subprocess.CompletedProcess[str]"]:
    """Return a function that runs wheels.sh with a pip that makes one file of `mib` MiB."""
    pip = tmp_path / "python"
    pip.write_text(
        '#!/bin/bash\necho "$@" >"$0.asked"\nwhile [ "$1" != --dest ]; do shift; done\n'
        'truncate -s "${MIB}M" "$2/a-1-py3-none-any.whl"\n'
    )
    pip.chmod(0o755)

    def run(mib: int, *arguments: str) -> "subprocess.CompletedProcess[str]":
        command = [str(ROOT / "tests/gpu/wheels.sh"), "--out", str(tmp_path / "out"), *arguments]
        environment = {**os.environ, "PYTHON": str(pip), "MIB": str(mib)}
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)

    return run


def test_what_travels_is_at_most_64_mib(
    collect: Callable[..., "subprocess.CompletedProcess[str]"], tmp_path: Path
) -> None:
    nowhere = ("--data", str(tmp_path / "nowhere"))
    done = collect(50, *nowhere)
    said = re.fullmatch(rf"{tmp_path}/out: 1 wheels, (5\d\.\d) MiB in all, with the repository\n", done.stdout)
    assert done.returncode == 0 and said is not None and 50.0 <= float(said[1]) < 60
    tokenizer = tmp_path / "data" / "tokenizer"
    tokenizer.mkdir(parents=True)
    (tokenizer / "vocabulary").write_text("a")
    done = collect(65, "--data", str(tmp_path / "data"), "more==1")
    assert done.returncode == 1 and "more than 64 MiB" in done.stderr
    assert "--requirement" in (asked := (tmp_path / "python.asked").read_text()) and "more==1" in asked
    done = collect(1, "--images")
    assert done.returncode == 2 and "--images needs a value" in done.stderr
    done = collect(1, "--nothing")
    assert done.returncode == 2 and "unknown option --nothing" in done.stderr


@pytest.mark.drill
def test_all_parts_run_on_the_cpu_with_the_tiny_model() -> None:
    """Every part ends well, and everything is reported that does not need CUDA."""
    command = [str(ROOT / "tests/gpu/run.sh"), "--device", "cpu", "--size", "tiny", "--budget", "900"]
    environment = {**os.environ, "PYTHON": sys.executable}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["parts"] == {entry.name: "done" for entry in PARTS}
    assert (report["card"], report["torch"]) == ("cpu", torch.__version__)
    figures = report["figures"]
    for leg in ("head", "lora", "full"):
        for tokens in (256, 512):
            step = figures[f"step {leg} {tokens}"]
            assert min(step[name] for name in ("ms", "tokens_per_s", "images_per_s", "tflops", "estimate_gib")) > 0
            assert step["tokens"] <= tokens
    assert figures["snapshot"]["gb"] > 0 and figures["packed_over_padded"]["speed"] > 0
    assert figures["fsdp2"]["resumed_error"] == 0 and figures["fsdp2"]["exported_head_equals_the_run"]
    assert figures["bf16_beside_fp32"] == {"steps": 30, "worst": 0.0, "band": 0.1}
    assert figures["answering 1"]["boxes_per_s_head"] > 0 < figures["answering 1"]["boxes_per_s_text"]
    assert figures["tests"] == {"not_run": "they need CUDA"} and "not_run" in figures["several_gpus"]
