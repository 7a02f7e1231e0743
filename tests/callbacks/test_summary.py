"""`recipe.callbacks.summary`: the plan of a run, and its warnings."""

import logging
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import pytest
from composer.core import Precision, State, Time, Timestamp
from composer.loggers import Logger
from torch.utils.data import DataLoader

from recipe.callbacks.summary import Summary, describe_data, describe_epoch, describe_seen, describe_stages
from recipe.config import AugmentConfig, CropConfig, OptimizerConfig, SchedulerConfig, StagedFreezingConfig
from recipe.data.contents import EpochContents
from recipe.data.maker import ExampleMaker
from recipe.data.stream import PackStream
from recipe.optim.schedule import RunStage, build_schedule

CONTENTS = EpochContents(80, 40, 310, 160, 13, 52_100, 31_000, {"main": 2.0}, 2.0)


def test_the_data_and_its_epoch():
    assert describe_data(CONTENTS) == "40 images, 310 objects, 80 samples"
    assert describe_epoch(CONTENTS, True) == "160 samples in 13 packs, 52.1 k tokens (31 k in those without answers)"
    assert describe_epoch(CONTENTS, False) == "160 samples in 13 packs, 52.1 k tokens (31 k in those with answers)"
    unknown = EpochContents(80, None, None, 80, 80, None, None, {"main": 1.0})
    assert describe_data(unknown) == "80 samples"
    assert describe_epoch(unknown, True) == "80 samples, tokens unknown, as there are no records"


def test_how_often_an_image_is_seen():
    """Two samples have one image. Streams are named if they differ."""
    assert describe_seen({"main": 50.0}, CONTENTS) == "100 times"
    assert describe_seen({"main": 50.0, "other": 10.0}, CONTENTS) == "100 times in main, 20 times in other"


def test_stages_as_text():
    stages = [RunStage(0, 10, {}), RunStage(10, 5, {"llm": 0.1, "detection": 1.0})]
    assert describe_stages(stages) == "10 steps from 0: none; 5 steps from 10: llm x 0.1, detection"


def plan_of(
    contents: EpochContents,
    groups: dict[str, Any],
    duration: str,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    crop: CropConfig | None = None,
) -> tuple[str, list[str]]:
    """The first lines of a run with epochs of seven steps of two packs, and its warnings."""
    dataset = object.__new__(PackStream)
    dataset.with_answers = True
    augmentation = SimpleNamespace(config=AugmentConfig(crop=crop))
    dataset.maker = cast(ExampleMaker, SimpleNamespace(augmentation=augmentation if crop else None))
    schedule = build_schedule(SchedulerConfig(), StagedFreezingConfig(groups), OptimizerConfig())
    rates = [{"name": name, "initial_lr": 1e-4} for name in ("llm", "detection")]
    state = SimpleNamespace(
        train_dataloader=DataLoader(dataset, batch_size=2),
        max_duration=Time.from_timestring(duration),
        timestamp=Timestamp(),
        dataloader_len=Time.from_batch(7),
        optimizers=[SimpleNamespace(param_groups=rates)],
        device=SimpleNamespace(name="cpu"),
        precision=Precision.FP32,
    )
    monkeypatch.setattr("recipe.callbacks.summary.epoch_contents", lambda dataset, epoch: contents)
    monkeypatch.setattr("recipe.callbacks.summary.num_parameters", lambda state: ({"llm": 2000, "detection": 500}, 100))
    caplog.set_level(logging.INFO, logger="recipe")
    caplog.clear()
    summary = Summary("run", None, 1, SchedulerConfig(), replace(schedule, trunk=["llm"]))
    summary.fit_start(cast(State, state), cast(Logger, None))
    plan, *warnings = [record.getMessage() for record in caplog.records if record.name.endswith("summary")]
    return plan, warnings


FROZEN_FIRST = {"llm": [{"from": "0ep", "lr": "frozen"}, {"from": "2ep", "lr": 0.5}]}


def test_the_plan_of_a_run_with_stages(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch):
    """Both kinds of epoch are named where the run has both, and its steps are then not quite known."""
    plan, warnings = plan_of(CONTENTS, FROZEN_FIRST, "80ep", caplog, monkeypatch)
    assert "epoch       160 samples in 13 packs, 52.1 k tokens (31 k in those without answers), 7 steps" in plan
    assert "a step      2 packs, 8.02 k tokens" in plan
    assert "steps       80ep = about 560 steps, the head learns in about 560; evaluation every 1ep" in plan
    assert "seen        each image 320 times" in plan
    assert "stages      14 steps from 0: detection; 546 steps from 14: llm x 0.5, detection" in plan
    assert warnings == []


def test_a_plan_without_stages(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch):
    plan, _ = plan_of(CONTENTS, {}, "1000sp", caplog, monkeypatch)
    assert "52.1 k tokens, 7 steps" in plan and "stages" not in plan
    assert "steps       1000sp = 500 steps, the head learns in 500" in plan
    plan, _ = plan_of(CONTENTS, {}, "80200tok", caplog, monkeypatch)
    assert "steps       80200tok = 10 steps" in plan


def test_few_steps_and_many_passes_warn_with_the_key(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch):
    detection = {"detection": [{"from": "0ba", "lr": "frozen"}, {"from": "201ba", "lr": 1.0}]}
    _, warnings = plan_of(CONTENTS, detection, "700ba", caplog, monkeypatch)
    assert [text.split(":")[0] for text in warnings] == ["the head learns in 499 steps, a new one needs 500 or more"]
    _, warnings = plan_of(CONTENTS, {}, "700ba", caplog, monkeypatch)
    assert warnings == []  # each sample of `main` is seen 200 times
    _, warnings = plan_of(CONTENTS, {}, "721ba", caplog, monkeypatch)
    assert len(warnings) == 1 and warnings[0].startswith("each sample of train_loader.streams.main is seen 206 times")
    assert "lower trainer.max_duration or its repeat" in warnings[0]


@pytest.mark.parametrize(
    ("crop", "duration", "steps"),
    [
        (CropConfig(epochs=1), "3ep", "3ep = about 21 steps, the head learns in about 21"),
        (CropConfig(epochs=1), "21ba", "21ba = 21 steps, the head learns in 21"),
        (CropConfig(), "3ep", "3ep = 21 steps, the head learns in 21"),
    ],
)
def test_epochs_of_whole_images_have_other_lengths_than_those_of_parts(
    crop: CropConfig, duration: str, steps: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    plan, _ = plan_of(CONTENTS, {}, duration, caplog, monkeypatch, crop)
    assert f"steps       {steps};" in plan
