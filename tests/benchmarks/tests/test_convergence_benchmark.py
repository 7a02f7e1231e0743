"""`tests/benchmarks/convergence.py` and its peers run on few scenes, and the figures are what they say."""

import json
import logging
import math
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.ops import box_convert

import convergence
import peer_detr
from convert.shapes import draw_scene
from peer_detr import (
    Budget,
    build_peer,
    evaluate_peer,
    pixel_statistics,
    read_pictures,
    train_peer,
)
from recipe.callbacks import table
from recipe.schema import Sample

PICTURE = (96, 128)  # rows and columns at which `pixel_statistics` looks at pictures


@pytest.fixture
def small_benchmark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Few scenes in a folder of its own; what the benchmark changes in this process is put back."""
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
    assert figures.keys() - {"plain_over_full"} == {"steps_to_ap50", "final", "real"}
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
    """Ten CPU seconds a step."""
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


def test_real_sets_that_are_not_there_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        convergence.main(["--variants", "--real", str(tmp_path)])
    assert "no chess_train and no bccd_trainval in" in capsys.readouterr().err


@pytest.fixture(scope="module")
def scenes() -> list[Sample]:
    return [draw_scene(seed=3, index=index, image_size=64, max_objects=2) for index in range(4)]


def trained_peer(kind: str, scenes: list[Sample], seconds: int) -> tuple[nn.Module, dict[str, Tensor], float, int]:
    """A peer after so many seconds of a clock that is read once a step; its first weights, its AP50 and its steps."""
    clock = iter(range(seconds + 2))
    torch.manual_seed(0)
    names = sorted({item.caption for scene in scenes for item in scene.objects or ()})
    peer = build_peer(kind, len(names), num_queries=10, width=32, num_layers=2, num_heads=2)
    before = {name: weight.detach().clone() for name, weight in peer.named_parameters()}
    budget = Budget(seconds, batch_size=3, learning_rate=1e-3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(peer_detr, "time", SimpleNamespace(process_time=lambda: next(clock)))
        return peer, before, *train_peer(peer, scenes, scenes, (64, 64), budget, seed=0, names=names)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["deformable", "conditional"])
def test_peers_are_trained(kind: str, scenes: list[Sample]) -> None:
    """For their time and no longer; batch norm too, which Hugging Face freezes."""
    peer, before, ap50, steps = trained_peer(kind, scenes, seconds=4)
    assert steps == 3  # at 1, 2 and 3 seconds
    assert 0 <= ap50 <= 1
    learned = {name: weight for name, weight in peer.named_parameters() if weight.grad is not None}
    assert all(bool(weight.isfinite().all()) for weight in learned.values())
    assert [name for name, weight in learned.items() if torch.equal(weight, before[name])] == []
    assert sum(name.endswith("normalization.weight") for name in learned) == 20


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["deformable", "conditional"])
def test_nothing_of_a_peer_is_left_as_it_was_drawn(kind: str, scenes: list[Sample]) -> None:
    peer, *_ = trained_peer(kind, scenes, seconds=2)
    assert [name for name, weight in peer.named_parameters() if weight.grad is None] == []


class Oracle(nn.Module):
    """Says what is true of the scenes that it is shown, in turn, but for the boxes that `wrong` moves."""

    def __init__(self, scenes: list[Sample], wrong: int = 0):
        super().__init__()
        boxes = torch.tensor([scene.objects[0].box for scene in scenes if scene.objects]) / 64
        boxes[:wrong] = torch.tensor([0.0, 0.0, 0.01, 0.01])
        self.boxes = box_convert(boxes, "xyxy", "cxcywh")[:, None]  # (n, 1, 4)

    def forward(self, pixel_values: Tensor) -> SimpleNamespace:
        logits = torch.tensor([-4.0, 2.0]).expand(len(pixel_values), 1, 2)
        return SimpleNamespace(pred_boxes=self.boxes[: len(pixel_values)], logits=logits)


def test_peers_are_judged_by_where_they_find_things() -> None:
    scenes = [draw_scene(seed=5, index=index, image_size=64, max_objects=1) for index in range(4)]
    pictures = read_pictures(scenes, (32, 32)).float()
    assert pictures.shape == (4, 3, 32, 32)
    assert evaluate_peer(Oracle(scenes), scenes, pictures) == pytest.approx(1)
    assert evaluate_peer(Oracle(scenes, wrong=4), scenes, pictures) == 0
    assert 0.2 < evaluate_peer(Oracle(scenes, wrong=2), scenes, pictures) < 0.6


def picture(left: tuple[int, int, int], right: tuple[int, int, int]) -> Sample:
    """Two colours, each on one half."""
    (rows, columns), data = PICTURE, BytesIO()
    image = Image.new("RGB", (columns, rows), left)
    image.paste(right, (columns // 2, 0, columns, rows))
    image.save(data, "PNG")
    return Sample("two", data.getvalue(), columns, rows, ())


def test_pixel_statistics_by_hand() -> None:
    """Red is 1 and 0, green always 0.2, blue 0.6 and 0.2; n - 1 pixels are divided by."""
    one, other = (255, 51, 153), (0, 51, 51)
    mean, std = pixel_statistics([picture(one, other)])
    assert mean == pytest.approx([0.5, 0.2, 0.4])
    pixels = PICTURE[0] * PICTURE[1]
    larger = math.sqrt(pixels / (pixels - 1))
    assert std == pytest.approx([0.5 * larger, 0, 0.2 * larger], rel=1e-9, abs=1e-9)
    halves = pixel_statistics([picture(one, one), picture(other, other)])  # the same pixels, each twice
    assert halves[0] == pytest.approx(mean)
    assert halves[1] == pytest.approx(std, rel=1e-4, abs=1e-9)


def test_real_pictures_are_two_tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """Ours learns captions where the peers learn classes, and none where they learn one."""
    sample = draw_scene(seed=3, index=0, image_size=64, min_objects=2, max_objects=2)
    names = sorted({item.caption for item in sample.objects or ()})
    weights: list[object] = []
    classes: list[tuple[int, list[str]]] = []

    def trained(changes: dict[str, Any], *_: object, **__: object) -> convergence.Curve:
        weights.append(changes.get("loss.weight_caption", 0))
        return curve_of((100, 0.7))

    def peer(kind: str, num_labels: int, *_: object, **__: object) -> int:
        return num_labels

    def compared(num_labels: int, *others: Any) -> tuple[float, int]:
        classes.append((num_labels, others[-1]))
        return 0.1 * len(classes), 5

    monkeypatch.setattr(convergence, "FOLDER", tmp_path / "bench")
    monkeypatch.setattr(convergence, "make_data", lambda: None)
    monkeypatch.setattr(convergence, "make_real_set", lambda *_: ([sample], [sample]))
    for name, stub in (("train_head", trained), ("build_peer", peer), ("train_peer", compared)):
        monkeypatch.setattr(convergence, name, stub)
    monkeypatch.setattr(table, "CALLBACKS", table.CALLBACKS)
    (tmp_path / "chess_train").mkdir()
    level = logging.root.manager.disable
    convergence.main(["--variants", "--real", str(tmp_path), "--real-sets", "chess_train"])
    logging.disable(level)
    assert weights == [4.0, 0] and len(names) == 2
    assert classes == [(2, names), (2, names), (1, []), (1, [])]
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])["real"]["chess_train"]
    assert (figures["ours"], figures["peer"]) == (0.7, pytest.approx(0.2))
    assert (figures["boxes"]["ours"], figures["boxes"]["peer"]) == (0.7, pytest.approx(0.4))
