"""Check that `tests/benchmarks/convergence.py` runs on few scenes, and the figures are what they say."""

import json
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import convergence
from recipe.callbacks import table


@pytest.fixture
def small_benchmark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Use few scenes in a folder of its own; restore what the benchmark changes in this process."""
    monkeypatch.setattr(convergence, "FOLDER", tmp_path)
    monkeypatch.setattr(convergence, "EVERY", 1)
    monkeypatch.setattr(convergence, "SCENES", {"train": (32, 1), "val": (32, 2)})
    monkeypatch.setattr(table, "CALLBACKS", table.CALLBACKS)
    threads, level = torch.get_num_threads(), logging.root.manager.disable
    yield
    torch.set_num_threads(threads)
    logging.disable(level)


@pytest.mark.slow
@pytest.mark.usefixtures("small_benchmark")
def test_it_ends_with_its_figures(capsys: pytest.CaptureFixture[str]) -> None:
    steps = ["--steps", "2", "--plain-steps", "2", "--seeds", "17", "18", "--real-sets"]
    convergence.main(["--variants", "full", "plain", *steps])
    lines = capsys.readouterr().out.splitlines()
    figures = json.loads(lines[-1])
    assert figures.keys() - {"plain_over_full"} == {"steps_to_ap50", "final", "real", "rates"}
    assert figures["real"] == {}
    assert figures["steps_to_ap50"].keys() == figures["final"].keys() == {"full", "plain"}
    assert all(0 <= ap50 < 0.5 for ap50 in figures["final"].values())
    assert figures["steps_to_ap50"]["full"] == {"0.5": None, "0.5 cpu_s": None, "0.8": None, "0.8 cpu_s": None}
    curves = {line.split(":")[0]: line for line in lines if line.startswith(("full, seed", "plain, seed"))}
    for name, ap50 in figures["final"].items():
        ends = []
        for seed in (17, 18):
            steps, values = zip(
                *(point.split(":") for point in curves[f"{name}, seed {seed}"].split(": ")[1].split()), strict=True
            )
            assert steps == ("1", "2")
            ends.append(float(values[-1]))
        assert ap50 == pytest.approx(sum(ends) / 2, abs=1e-3)


def curve_of(*points: tuple[int, float]) -> convergence.Curve:
    """Return a curve with ten CPU seconds per step."""
    curve = convergence.Curve()
    curve.points = [(step, ap50, 10.0 * step) for step, ap50 in points]
    return curve


def test_figures_of_several_seeds_by_hand(capsys: pytest.CaptureFixture[str]) -> None:
    """The median over seeds, for which a seed that does not get there is slower than all that do."""
    full = [curve_of((25, 0.6), (50, 0.9)), curve_of((25, 0.4), (50, 0.7)), curve_of((25, 0.5), (50, 0.8))]
    plain = [curve_of((25, 0.1), (50, 0.5)), curve_of((25, 0.1), (50, 0.2)), curve_of((25, 0.1), (50, 0.3))]
    figures = convergence.report({"full": full, "plain": plain})
    assert figures["steps_to_ap50"]["full"] == {"0.5": 25, "0.5 cpu_s": 250, "0.8": 50, "0.8 cpu_s": 500}
    assert figures["steps_to_ap50"]["plain"] == {"0.5": None, "0.5 cpu_s": None, "0.8": None, "0.8 cpu_s": None}
    assert figures["final"] == {"full": 0.8, "plain": 0.3}
    assert figures["plain_over_full"] == 2  # at least: plain was not there after 50 steps
    assert "| full | 25 | 250 | 50 | 500 | 0.800 (0.70-0.90) | 50 |" in capsys.readouterr().out
