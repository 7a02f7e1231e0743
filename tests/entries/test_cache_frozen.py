"""`cache_frozen` through `recipe.train`: the same losses, the trunk runs in the first epoch alone; what is refused."""

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from convert.shapes import iter_samples
from convert.write import write_split
from recipe.checks import check_cache
from recipe.config import (
    CacheFrozenConfig,
    ConfigError,
    LoaderConfig,
    OptimizerConfig,
    PackingConfig,
    PromptConfig,
    RecipeConfig,
    TeacherConfig,
)
from recipe.models.vlm import VisionLanguageModel
from recipe.train import main
from tests.support.tiny_cases import make_config

FROZEN = OptimizerConfig(lr_vision=0, lr_merger=0, lr_llm=0)
NUM_IMAGES = 12


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = str(tmp_path_factory.mktemp("data"))
    for split, num_samples, seed in (("train", NUM_IMAGES, 1), ("val", 2, 2)):
        write_split(iter_samples(num_samples, seed, image_size=84, max_objects=4), folder, split)
    return folder


@pytest.fixture
def trunk_runs(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Of each time that the trunk runs: whether in training."""
    runs: list[bool] = []
    forward = VisionLanguageModel.forward

    def counted(self: VisionLanguageModel, *arguments: Any, **keywords: Any) -> Any:
        runs.append(self.training)
        return forward(self, *arguments, **keywords)

    monkeypatch.setattr(VisionLanguageModel, "forward", counted)
    return runs


def config_of(checkpoint: str, data: str, folder: Path, **changes: Any) -> RecipeConfig:
    """Three epochs of some three steps, evaluated after each epoch, saved after each step."""
    config = replace(
        make_config(checkpoint, evaluation={"answers": None}),
        run_folder=str(folder),
        optimizer=FROZEN,
        train_loader=LoaderConfig(
            streams={"train": {"local": data, "split": "train"}},
            global_batch_size=2,
            collator="packed",
            packing=PackingConfig(max_tokens=200),
            dataset={"shuffle": True},
        ),
        eval_loader=LoaderConfig(streams={"val": {"local": data, "split": "val"}}, global_batch_size=2),
        loggers={"json_lines": {}},
        trainer={
            "max_duration": "3ep",
            "eval_interval": "1ep",
            "save_interval": "1ba",
            "save_filename": "ba{batch}.pt",
            "device_train_microbatch_size": 1,
            "progress_bar": False,
        },
    )
    return replace(config, **changes)


def metrics_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def losses(folder: Path) -> dict[tuple[int, str], float]:
    """By step and name, of training and evaluation."""
    rows = metrics_of(folder)
    return {(row["step"], name): value for row in rows for name, value in row["metrics"].items() if "loss" in name}


def read_shares(folder: Path) -> list[float]:
    return [row["metrics"]["cache/read_share"] for row in metrics_of(folder) if "cache/read_share" in row["metrics"]]


def test_the_trunk_runs_in_the_first_epoch_alone(
    tiny_checkpoint: str, data: str, tmp_path: Path, trunk_runs: list[bool], caplog: pytest.LogCaptureFixture
):
    def train(name: str, **changes: Any) -> tuple[int, int]:
        """How often the trunk ran in training, and in evaluation."""
        trunk_runs.clear()
        main(config_of(tiny_checkpoint, data, tmp_path / name, **changes)).close()
        return sum(trunk_runs), trunk_runs.count(False)

    cache = CacheFrozenConfig(str(tmp_path / "cache"))
    plain, plain_evaluations = train("plain")
    with caplog.at_level(logging.INFO, logger="recipe"):
        cached, evaluations = train("cached", cache_frozen=cache)
    assert f"cache_frozen: {NUM_IMAGES} images need about 0.000" in caplog.text
    assert 3 * cached == plain > 0 and evaluations == plain_evaluations > 0
    assert len(list((tmp_path / "cache").glob("*/*"))) == NUM_IMAGES
    expected = losses(tmp_path / "plain")
    # In float64. Images share other packs in later epochs, so they are not the bits of computing there.
    assert losses(tmp_path / "cached") == pytest.approx(expected, rel=1e-9)
    assert read_shares(tmp_path / "cached")[-1] == pytest.approx(2 / 3)

    assert train("again", cache_frozen=cache) == (0, evaluations)  # another run with the same trunk
    assert losses(tmp_path / "again") == losses(tmp_path / "cached")
    resumed = {"load_path": str(tmp_path / "cached" / "checkpoints" / "ba4.pt"), "cache_frozen": cache}
    assert train("resumed", **resumed)[0] == 0
    found = losses(tmp_path / "resumed")
    assert 0 < len(found) < len(expected) and found.items() <= losses(tmp_path / "cached").items()

    caplog.clear()
    small = replace(cache, local=str(tmp_path / "small"), size_limit="60kb")
    runs, _ = train("full", cache_frozen=small)
    assert cached < runs <= plain
    assert "cache_frozen holds only a part of the images" in caplog.text
    assert caplog.text.count("takes no more images") == 1
    assert losses(tmp_path / "full") == pytest.approx(expected, rel=1e-9)
    assert 0 < sum(path.stat().st_size for path in (tmp_path / "small").glob("*/*")) < 70_000


def test_another_trunk_is_not_read(tiny_checkpoint: str, data: str, tmp_path: Path, trunk_runs: list[bool]):
    cache = CacheFrozenConfig(str(tmp_path / "cache"))
    config = config_of(tiny_checkpoint, data, tmp_path / "first", cache_frozen=cache)
    main(config).close()
    assert config.detection_head is not None
    for name, changes in {
        "precision": {"model": replace(config.model, dtype="float32")},
        "budget": {"image": replace(config.image, max_pixels=3136)},
        "features": {"detection_head": replace(config.detection_head, multi_scale=False, select_queries=False)},
    }.items():
        trunk_runs.clear()
        main(replace(config, run_folder=str(tmp_path / name), **changes)).close()
        assert sum(trunk_runs) > 0, name


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"optimizer": OptimizerConfig(lr_vision=0)}, r"a trunk that never learns: set optimizer\.lr_merger=0 optimiz"),
        ({"teachers": TeacherConfig({}, 2)}, r"with teachers\.num_teachers 2: .* set teachers\.num_teachers=0"),
        (
            {"prompt": PromptConfig(student_answer=True)},
            r"with prompt\.student_answer true: .* set prompt\.student_answer=null",
        ),
        ({"trainer": {"parallelism_config": {"fsdp": {}}}}, r"fsdp: .* set trainer\.parallelism_config=null"),
        ({"cache_frozen": CacheFrozenConfig("x", "50 parsecs")}, r"size_limit is '50 parsecs': give a size such as"),
    ],
)
def test_refused_where_it_would_be_wrong(changes: dict[str, Any], expected: str):
    sound = replace(make_config("unread"), optimizer=FROZEN, cache_frozen=CacheFrozenConfig("x"))
    check_cache(sound)
    with pytest.raises(ConfigError, match=expected):
        check_cache(replace(sound, **changes))
    check_cache(replace(sound, **{**changes, "cache_frozen": None}))


def test_a_folder_that_cannot_be_made_is_named(tiny_checkpoint: str, data: str, tmp_path: Path):
    (tmp_path / "file").touch()
    config = config_of(tiny_checkpoint, data, tmp_path / "run", cache_frozen=CacheFrozenConfig(str(tmp_path / "file")))
    with pytest.raises(ConfigError, match=r"^cache_frozen\.local .*file cannot be used \("):
        main(config)
