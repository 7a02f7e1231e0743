"""Loggers and the predictions image in a real Trainer: what they write, and that training does not notice."""

import json
import random
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from composer import Callback, DataSpec, Evaluator, Trainer
from composer.loggers import InMemoryLogger, LoggerDestination
from composer.models import ComposerModel
from PIL import Image
from torch import Tensor, nn

from recipe.build import build_all_callbacks
from recipe.callbacks.loggers import GuardedTensorboardLogger
from recipe.callbacks.samples import LogFirstSample, LogPredictions
from recipe.callbacks.table import CALLBACKS, LOGGERS, build_callbacks, build_loggers
from recipe.config import CALLBACK_NAMES, LOGGER_NAMES, ModelConfig, RecipeConfig
from recipe.schema import DetectedObject, Object, Prediction, Sample
from recipe.tiny import build_tiny_tokenizer, tokenizer_corpus


class ToyModel(ComposerModel):
    """Dropout, so that every random number drawn elsewhere would show in the weights."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.Linear(4, 1))

    def forward(self, batch: dict[str, Any]) -> Tensor:
        return self.model(batch["x"])

    def loss(self, outputs: Tensor, batch: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        return outputs.square().mean()

    def eval_forward(self, batch: dict[str, Any], outputs: Any = None) -> Any:
        found = DetectedObject((2.0, 2.0, 20.0, 20.0), 0.9, "red circle")
        return SimpleNamespace(
            samples=batch["samples"],
            predictions=[Prediction(item.id, item.width, item.height, (found,)) for item in batch["samples"]],
        )


class RecordImages(LoggerDestination):
    """Keeps what `log_images` is given."""

    def __init__(self) -> None:
        self.logged: list[tuple[int | None, tuple[int, ...]]] = []

    def log_images(self, images: Any, name: str = "Images", *args: Any, **kwargs: Any) -> None:
        step = args[1] if len(args) > 1 else kwargs["step"]
        self.logged.append((step, np.asarray(images).shape))


def make_sample(sample_id: str, has_image: bool = True) -> Sample:
    data = BytesIO()
    Image.new("RGB", (48, 32), "white").save(data, format="PNG")
    objects = (Object((3.0, 3.0, 20.0, 20.0), "red circle"),)
    return Sample(sample_id, data.getvalue() if has_image else b"", 48, 32, objects if has_image else None)


def make_loader() -> DataSpec:
    names = [["a/b", "text", "c"], ["d", "e", "f"]]
    batches = [
        [{"x": torch.randn(1, 4), "samples": [make_sample(name, name != "text")]} for name in row] for row in names
    ]
    return DataSpec(
        batches,
        split_batch=lambda batch, size: batch,
        get_num_samples_in_batch=lambda batch: len(batch) if isinstance(batch, list) else 1,
        get_num_tokens_in_batch=lambda batch: 1,
    )


def train(callbacks: list[Callback], loggers: list[LoggerDestination]) -> tuple[dict[str, Tensor], list[Any]]:
    torch.manual_seed(1)
    model = ToyModel()
    trainer = Trainer(
        model=model,
        train_dataloader=make_loader(),
        eval_dataloader=Evaluator(label="eval", dataloader=make_loader(), device_eval_microbatch_size=1),
        optimizers=torch.optim.SGD(model.parameters(), lr=0.1),
        device_train_microbatch_size=1,
        max_duration="2ep",
        eval_interval="1ba",
        callbacks=callbacks,
        loggers=loggers,
        progress_bar=False,
        run_name="toy",
        seed=7,
        device="cpu",
    )
    trainer.fit()
    trainer.close()
    next_numbers = [torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random()]
    return model.state_dict(), next_numbers


def make_config(run_folder: Path, **loggers: Any) -> RecipeConfig:
    model = ModelConfig(pretrained_model_name_or_path="unused")
    return RecipeConfig(run_folder=str(run_folder), model=model, loggers=loggers)


def test_pictures_of_every_evaluation(tmp_path: Path) -> None:
    recorder = RecordImages()
    train([LogPredictions(3, tmp_path / "pictures", score_threshold=0.3)], [recorder])
    folders = sorted(path.name for path in (tmp_path / "pictures").iterdir())
    assert folders == ["000001", "000002", "000003", "000004"]
    names = sorted(path.name for path in (tmp_path / "pictures" / "000002").iterdir())
    assert names == ["00_a_b.png", "01_c.png", "02_d.png", "gallery.png"]  # the text-only sample has no image
    picture = np.asarray(Image.open(tmp_path / "pictures" / "000002" / "00_a_b.png"))
    assert len(np.unique(picture.reshape(-1, picture.shape[-1]), axis=0)) > 2, "nothing was drawn"
    assert [step for step, _ in recorder.logged] == [1, 2, 3, 4]
    assert all(len(shape) == 3 and shape[2] == 3 for _, shape in recorder.logged)


def test_training_does_not_notice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_MODE", raising=False)
    plain, plain_numbers = train([], [])
    config = make_config(tmp_path / "run", tensorboard={}, wandb={}, json_lines={}, file={})
    watched, watched_numbers = train(
        [LogPredictions(3, tmp_path / "pictures", 0.3)], build_loggers(config.loggers, config.run_folder)
    )
    assert all(torch.equal(plain[name], watched[name]) for name in plain)
    assert plain_numbers == watched_numbers

    # Every logger wrote into the run folder; W&B offline, without an account.
    run = tmp_path / "run"
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss/train/total" in line["metrics"]] == [0, 1, 2, 3]
    assert list((run / "tensorboard").rglob("events.out.tfevents.*"))
    assert list((run / "wandb").glob("offline-run-*"))
    assert list((run / "wandb").rglob("media/images/predictions*.png"))
    assert (run / "log-rank0.txt").stat().st_size > 0


def test_user_keywords_win(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    config = make_config(
        tmp_path / "run",
        json_lines={"path": str(tmp_path / "elsewhere.jsonl")},
        wandb={"project": "mine", "init_kwargs": {"notes": "text"}},
        tensorboard=None,
    )
    json_lines, wandb = build_loggers(config.loggers, config.run_folder)
    assert vars(json_lines)["path"] == tmp_path / "elsewhere.jsonl"
    init_kwargs = {"dir": str(tmp_path / "run"), "mode": "disabled", "notes": "text", "project": "mine"}
    assert {**vars(wandb)["_init_kwargs"], "id": None, "resume": None} == {**init_kwargs, "id": None, "resume": None}
    assert config.loggers["wandb"]["init_kwargs"] == {"notes": "text"}


def test_the_names_next_to_the_keys_are_those_of_the_classes() -> None:
    assert tuple(CALLBACKS) == CALLBACK_NAMES and (*LOGGERS, "wandb") == LOGGER_NAMES


def test_callbacks_of_every_run(tmp_path: Path) -> None:
    tokenizer = build_tiny_tokenizer(tokenizer_corpus())
    config = make_config(tmp_path)
    config.callbacks = {"speed_monitor": {"window_size": 5}, "lr_monitor": None}
    names = [type(callback).__name__ for callback in build_all_callbacks(config, tokenizer)]
    assert names[:3] == ["EvaluationWithoutTraces", "EvaluationParts", "SpeedMonitor"]
    assert names[3:] == ["TrainingData", "EvaluationData", "LogFirstSample", "LogPredictions"]
    config.evaluation.num_logged_images = 0
    assert isinstance(build_all_callbacks(config, tokenizer)[-1], LogFirstSample)


def test_in_memory_logger_agrees_with_json_lines(tmp_path: Path) -> None:
    memory = InMemoryLogger()
    train([], [memory, *build_loggers({"json_lines": {}}, str(tmp_path))])
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    losses = [line["metrics"]["loss/train/total"] for line in lines if "loss/train/total" in line["metrics"]]
    expected = [float(value) for _, value in memory.data["loss/train/total"]]
    assert losses == pytest.approx(expected, rel=1e-6)


def test_out_of_memory_traces_lie_in_the_run_folder(tmp_path: Path) -> None:
    config = make_config(tmp_path / "run")
    config.callbacks = {"oom_observer": {"max_entries": 7}}
    (observer,) = build_callbacks(config.callbacks, config.run_folder)
    assert vars(observer)["folder"] == f"{tmp_path}/run/out_of_memory"
    assert vars(observer)["max_entries"] == 7 and vars(observer)["remote_file_name"] is None


def test_a_run_folder_is_one_run_of_wandb_and_tensorboard(tmp_path: Path) -> None:
    def ids(folder: str) -> tuple[str, str | None]:
        tensorboard, wandb = build_loggers({"tensorboard": {}, "wandb": {}}, str(tmp_path / folder))
        assert isinstance(tensorboard, GuardedTensorboardLogger)
        return vars(wandb)["_init_kwargs"]["id"], tensorboard.folder_name

    assert ids("a") == ids("a") and ids("a")[1] == "a"
    assert ids("a")[0] != ids("b")[0]
    (given,) = build_loggers({"wandb": {"init_kwargs": {"id": "mine"}}}, str(tmp_path / "a"))
    assert vars(given)["_init_kwargs"]["id"] == "mine"
