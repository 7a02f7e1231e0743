"""The entries end to end: train, resume, evaluate; and the quickstart's yaml on two ranks."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from convert.shapes import iter_samples
from convert.write import write_split
from recipe.checkpoints.save import CheckpointSaver
from recipe.checkpoints.weights import EVALUATED, read_weights
from recipe.config import LoaderConfig, RecipeConfig, TeacherConfig
from recipe.eval import main as evaluate
from recipe.train import main as train
from recipe.upstream.agreement import DIST_TIMEOUT
from tests.launches.launch import run_composer


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A converted data set: ten training scenes, five to evaluate on, four teachers."""
    folder = str(tmp_path_factory.mktemp("scenes"))
    for split, count, seed in (("train", 10, 1), ("val", 5, 2), ("teachers", 4, 3)):
        samples = list(iter_samples(count, seed, image_size=84, max_objects=2))
        write_split(iter(samples), folder, split)
    return folder


@pytest.fixture
def make_run(tiny_config: Callable[..., RecipeConfig], scenes: str, tmp_path: Path) -> Callable[..., RecipeConfig]:
    """`make_run(name, max_duration, **trainer)`: a float32 run of its own folder."""

    def make(name: str, max_duration: str, load_path: str | None = None, **trainer: object) -> RecipeConfig:
        loaders = {split: {"shapes": {"local": scenes, "split": split}} for split in ("train", "val")}
        return replace(
            tiny_config(model={"dtype": "float32"}, detection_head={"dropout": 0.1}),
            run_folder=str(tmp_path / name),
            load_path=load_path,
            teachers=TeacherConfig({"local": scenes, "split": "teachers"}, num_teachers=1, teacher_ratio=0.5),
            train_loader=LoaderConfig(
                streams=loaders["train"],
                global_batch_size=4,
                collator="packed",
                dataset={"shuffle": True, "num_canonical_nodes": 1},
            ),
            eval_loader=LoaderConfig(streams=loaders["val"], global_batch_size=2),
            loggers={"json_lines": {}, "tensorboard": {}, "wandb": {}},
            trainer={
                "max_duration": max_duration,
                "eval_interval": "2ba",
                "save_interval": "1ba",
                "save_filename": "ba{batch}.pt",
                "progress_bar": False,
                **trainer,
            },
        )

    return make


def test_a_run_leaves_what_the_readme_says(make_run: Callable[..., RecipeConfig]) -> None:
    config = make_run("run", "2ba")
    train(config).close()
    folder = Path(config.run_folder)
    assert {"config.yaml", "metrics.jsonl", "first_train_sample.txt", "first_eval_sample.txt"} <= {
        path.name for path in folder.iterdir()
    }
    assert len(list((folder / "images" / "000002").glob("*.png"))) == 6  # five scenes and the gallery
    assert list((folder / "tensorboard").rglob("events.*")) and list((folder / "wandb").glob("offline-run-*"))
    metrics: dict[str, float] = {}
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        metrics |= json.loads(line)["metrics"]
    names = ["lm_teacher", "lm_student", "bbox", "giou", "objectness", "caption", "bbox_aux", "bbox_dn"]
    for name in [*(f"loss/train/loss_{name}" for name in names), "loss/train/total"]:
        assert math.isfinite(metrics[name]), name
    for name in ("box_ap50", "category_ap50", "caption_match", "text_f1", "loss_caption"):
        assert f"metrics/eval/{name}" in metrics
    assert metrics["time/sample"] == 8
    assert 0.1 < metrics["memory/peak_gib"] < 24


def test_uploads_are_finished_when_training_fails(
    make_run: Callable[..., RecipeConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What an upload loses otherwise: `tests/checkpoints/test_in_a_store.py`."""
    finished: list[CheckpointSaver] = []
    monkeypatch.setattr(CheckpointSaver, "finish_uploads", lambda self: finished.append(self))

    def fail(*_: object, **__: object) -> None:
        raise OSError("a node is lost")

    monkeypatch.setattr("composer.Trainer.fit", fail)
    with pytest.raises(OSError, match="a node is lost"):
        train(make_run("run", "2ba"))
    assert len(finished) == 1


def test_resume_in_mid_epoch_gives_the_same_weights(make_run: Callable[..., RecipeConfig]) -> None:
    """Bit for bit, dropout included, over the end of an epoch (ten samples, three steps an epoch)."""
    whole = make_run("whole", "5ba")
    train(whole).close()
    part = make_run("part", "5ba", load_path=f"{whole.run_folder}/checkpoints/ba2.pt")
    train(part).close()
    expected = read_weights(f"{whole.run_folder}/checkpoints/ba5.pt")
    resumed = read_weights(f"{part.run_folder}/checkpoints/ba5.pt")
    for name, value in expected.items():
        assert torch.equal(value, resumed[name]), name


def test_a_checkpoint_that_does_not_fit_leaves_the_runs_config_alone(make_run: Callable[..., RecipeConfig]) -> None:
    run = make_run("run", "1ba", eval_interval="1ep")
    train(run).close()
    saved = Path(run.run_folder, "config.yaml").read_bytes()
    other = make_run("run", "2ba", load_path=f"{run.run_folder}/checkpoints/ba1.pt", eval_interval="1ep")
    assert other.detection_head is not None
    other.detection_head.num_queries += 1
    with pytest.raises(ValueError, match=r"made with another model .* differ in detection_head\.num_queries"):
        train(other)
    assert Path(run.run_folder, "config.yaml").read_bytes() == saved


def test_ranks_wait_as_long_as_the_yaml_says(make_run: Callable[..., RecipeConfig], monkeypatch) -> None:
    class Started(Exception):
        pass

    waits = []

    def initialize(device: object, timeout: float) -> None:
        waits.append(timeout)
        raise Started

    monkeypatch.setattr("composer.utils.dist.initialize_dist", initialize)
    for keywords in ({}, {"dist_timeout": 7200.0}):
        for main in (train, evaluate):
            with pytest.raises(Started):
                main(make_run("run", "1ba", **keywords))
    assert waits == [DIST_TIMEOUT, DIST_TIMEOUT, 7200.0, 7200.0]


def test_eval_gives_what_training_measured(make_run: Callable[..., RecipeConfig]) -> None:
    config = make_run("judged", "2ba")
    trainer = train(config)
    measured = {name: float(value) for name, value in trainer.state.eval_metric_values.items()}
    trainer.close()
    scores = evaluate(
        replace(config, load_path=f"{config.run_folder}/checkpoints/ba2.pt", run_folder=f"{config.run_folder}-eval")
    )
    assert scores == pytest.approx(measured, abs=1e-6)
    written = json.loads(Path(f"{config.run_folder}-eval", "eval.json").read_text())
    assert len(written.pop(EVALUATED)) == 64
    assert written.pop("categories") and written == scores


@pytest.mark.world_size(2)
def test_quickstart_yaml_on_two_ranks(tiny_checkpoint: str, scenes: str, tmp_path: Path) -> None:
    """Five evaluation samples on two ranks: one rank is a sample short and must not wait for ever."""
    run_composer(
        2,
        "recipe/train.py",
        "yamls/quickstart.yaml",
        f"run_folder={tmp_path}/run",
        f"model.pretrained_model_name_or_path={tiny_checkpoint}",
        f"teachers.stream.local={scenes}/teachers",
        f"train_loader.streams.shapes.local={scenes}",
        f"eval_loader.streams.shapes.local={scenes}",
        "train_loader.global_batch_size=4",
        "eval_loader.global_batch_size=2",
        "caption_decoder.max_caption_tokens=16",
        "evaluation.max_new_tokens=4",
        "trainer.max_duration=2ba",
        "trainer.eval_interval=2ba",
        "trainer.save_interval=2ba",
    )
    assert (tmp_path / "run" / "checkpoints" / "latest-rank0.pt").exists()
    rows = [json.loads(line)["metrics"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert max(row.get("time/sample", 0) for row in rows) == 8
    assert any("metrics/eval/box_ap50" in row for row in rows)


@pytest.mark.slow
def test_joint_yaml_through_all_its_stages(tiny_checkpoint: str, scenes: str, tmp_path: Path) -> None:
    """As on a machine without a GPU: twenty steps of one small pack."""
    output = run_composer(
        1,
        "recipe/train.py",
        "yamls/joint.yaml",
        f"run_folder={tmp_path}/run",
        f"model.pretrained_model_name_or_path={tiny_checkpoint}",
        f"train_loader.streams.main.local={scenes}",
        f"eval_loader.streams.main.local={scenes}",
        "train_loader.global_batch_size=1",
        "train_loader.dataloader.num_workers=1",
        "eval_loader.dataloader.num_workers=1",
        "max_seq_len=512",
        "train_loader.packing.max_tokens=512",
        "detection_head={num_layers: 1, num_queries: 8, width: 32}",
        "evaluation.max_new_tokens=4",
        "trainer.parallelism_config=null",
        "trainer.precision=fp32",
        "trainer.max_duration=20ba",
    ).output
    # In the first step after 5 % the rate of what thaws is 0.
    assert output.count("stage from batch") == 3
    rows = [json.loads(line)["metrics"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    rates = {
        group: [row[f"lr/{group}"] for row in rows if f"lr/{group}" in row] for group in ("vision", "llm", "detection")
    }
    assert all(len(found) == 20 for found in rates.values())
    # Nothing in the first step: the curve's own warm-up begins at 0, and is shorter than a step here.
    assert all(rate > 0 for rate in rates["vision"][1:])
    for group in ("llm", "detection"):
        assert rates[group][:2] == [0, 0] and all(rate > 0 for rate in rates[group][2:])
    assert rates["llm"][15] < 0.2 * rates["llm"][14]
    assert any("metrics/eval/box_ap50" in row for row in rows)
    assert (tmp_path / "run" / "checkpoints" / "latest-rank0.pt").exists()
