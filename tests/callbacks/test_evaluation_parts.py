"""What each evaluation of a run computes: answers for some images, and everything at the last one."""

import json
import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from composer import Callback
from composer.core import State
from composer.loggers import Logger

from convert.shapes import iter_samples
from convert.write import write_split
from recipe.callbacks import table
from recipe.callbacks.evaluation_parts import PARTS
from recipe.callbacks.progress import describe_seconds
from recipe.checkpoints.check import parse_manifest, write_manifest
from recipe.checks import check_metrics
from recipe.config import AnswersConfig, ConfigError, EvaluationConfig, LoaderConfig, RecipeConfig, SaveBestConfig
from recipe.configure import load_config, save_config
from recipe.eval import main as evaluate
from recipe.joint import EvaluationScope
from recipe.train import main as train
from tests.support.tiny_cases import make_config

IMAGES = 6


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = str(tmp_path_factory.mktemp("scenes"))
    write_split(iter_samples(num_samples=IMAGES, seed=11, image_size=84), folder, "train")
    return folder


def config_of(checkpoint: str, data: str, folder: Path, evaluation: Mapping[str, Any], **trainer: Any) -> RecipeConfig:
    """Three steps an epoch."""
    stream = {"a": {"local": data, "split": "train"}}
    return replace(
        make_config(checkpoint, model={"dtype": "float32"}, evaluation=evaluation),
        run_folder=str(folder),
        train_loader=LoaderConfig(streams=stream, global_batch_size=2),
        eval_loader=LoaderConfig(streams=stream, global_batch_size=2),
        trainer={"max_duration": "3ba", "eval_interval": "1ba", "progress_bar": False, **trainer},
        loggers={"json_lines": {}},
    )


def evaluations(folder: Path) -> list[dict[str, float]]:
    """What each evaluation has logged, by short names."""
    found: list[dict[str, float]] = []
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        metrics = json.loads(line)["metrics"]
        scores = {name.removeprefix("metrics/eval/"): value for name, value in metrics.items() if "eval/" in name}
        if "box_ap" in scores:
            found.append(scores)
        elif scores:
            found[-1] |= scores
    return found


@pytest.fixture(scope="module")
def run(tiny_checkpoint: str, data: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run with three evaluations."""
    folder = tmp_path_factory.mktemp("run")
    config = config_of(tiny_checkpoint, data, folder, {"answers": AnswersConfig(images=2)})
    save_config(config, folder / "given.yaml")
    train(config).close()
    return folder


def test_the_last_one_has_everything(run: Path) -> None:
    first, second, last = evaluations(run)
    assert [found["text_answers"] for found in (first, second, last)] == [2, 2, IMAGES]
    more = {name for name in last if name.startswith("category_")}
    assert "category_ap50" in more and set(first) == set(second) == set(last) - more
    for found in (first, second, last):
        seconds = {name.removeprefix("eval/seconds/") for name in found if name.startswith("eval/seconds/")}
        assert seconds == set(PARTS) - {"classes", "retention"}
        assert all(found[f"eval/seconds/{part}"] > 0 for part in seconds)


def test_it_is_what_eval_computes(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = run / "checkpoints" / "latest-rank0.pt"
    found = evaluate(load_config(str(run / "given.yaml"), [f"load_path={checkpoint}", f"run_folder={tmp_path}"]))
    last = evaluations(run)[-1]
    assert found == pytest.approx({name: value for name, value in last.items() if "seconds" not in name}, abs=1e-6)
    assert "\ntook " in capsys.readouterr().out
    drawn = [sorted(path.name for path in folder.glob("images/*/*.png")) for folder in (run, tmp_path)]
    assert sorted(set(drawn[0])) == drawn[1]  # of the same images


class Spy(Callback):
    """Notes which samples each evaluation answers."""

    def __init__(self) -> None:
        self.answered: list[set[str]] = []

    def eval_start(self, state: State, logger: Logger) -> None:
        """One more."""
        self.answered.append(set())

    def eval_after_forward(self, state: State, logger: Logger) -> None:
        """Some of its samples."""
        outputs: Any = state.outputs
        self.answered[-1] |= {item.id for item in outputs.predictions if item.answer is not None}


def answered_by(config: RecipeConfig, monkeypatch: pytest.MonkeyPatch) -> list[set[str]]:
    """Which samples each evaluation of a run answers."""
    spy = Spy()
    monkeypatch.setattr(table, "CALLBACKS", {**table.CALLBACKS, "spy": lambda: spy})
    train(replace(config, callbacks={**config.callbacks, "spy": {}})).close()
    return spy.answered


def forget(folder: Path, batch: int) -> None:
    """Leave what a run has that was killed in the evaluation of a batch: checkpoints up to it, no scores of it."""
    for path in (folder / "checkpoints").glob("*-ba*.pt*"):
        if int(path.name.split("-ba")[1].split("-")[0]) > batch:
            path.unlink()
    (path,) = (folder / "checkpoints").glob(f"*-ba{batch}-*.manifest.json")
    write_manifest(replace(parse_manifest(path.read_text()), scores=None), path)


@pytest.mark.slow
def test_a_repeated_evaluation_answers_the_same(
    tiny_checkpoint: str, data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(tiny_checkpoint, data, tmp_path, {"answers": AnswersConfig(images=2)}, save_interval="1ba")
    first = answered_by(config, monkeypatch)
    assert [len(answered) for answered in first] == [2, 2, IMAGES] and first[0] == first[1]
    forget(tmp_path, 1)
    assert answered_by(config, monkeypatch) == first
    forget(tmp_path, 3)
    assert answered_by(config, monkeypatch) == first[2:]
    forget(tmp_path, 3)
    longer = replace(config, trainer={**config.trainer, "max_duration": "4ba"})
    assert answered_by(longer, monkeypatch) == [first[0], first[2]]  # what was the last one is so no longer


@pytest.mark.slow
@pytest.mark.parametrize("eval_interval", ["6ba", "4ba"])
def test_the_end_of_an_epoch_may_be_that_of_the_run(
    eval_interval: str, tiny_checkpoint: str, data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two epochs of three steps: at the evaluation of the sixth step the clock is still in the second epoch."""
    evaluation = {"answers": AnswersConfig(images=2)}
    saved = {"save_interval": "1ba"} if eval_interval == "6ba" else {}
    config = config_of(
        tiny_checkpoint, data, tmp_path, evaluation, max_duration="2ep", eval_interval=eval_interval, **saved
    )
    expected = {"6ba": [IMAGES], "4ba": [2, IMAGES]}[eval_interval]
    assert [len(answered) for answered in answered_by(config, monkeypatch)] == expected
    if saved:
        forget(tmp_path, 6)
        # Composer, whose loop has not seen the repeated one, evaluates the end of the run again.
        assert [len(answered) for answered in answered_by(config, monkeypatch)] == [IMAGES, IMAGES]


def test_a_stopped_run_says_what_its_last_lacks(
    tiny_checkpoint: str, data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    config = config_of(tiny_checkpoint, data, tmp_path, {"answers": AnswersConfig(images=2)})
    config.callbacks = {"threshold_stopper": {"monitor": "box_ap", "dataloader_label": "eval", "threshold": -1.0}}
    with caplog.at_level(logging.INFO, logger="recipe"):
        assert [len(answered) for answered in answered_by(config, monkeypatch)] == [2]
    assert "the run was stopped: its last evaluation answered not all images" in caplog.text


def test_every_class_at_every_evaluation(
    tiny_checkpoint: str, data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tables: list[tuple[str, int]] = []
    monkeypatch.setattr(
        "composer.loggers.Logger.log_table",
        lambda self, columns, rows, name, step=None: tables.append((name, len(columns))),
    )
    for every_class, expected in ((True, 2), (False, 1)):
        tables.clear()
        folder = tmp_path / str(every_class)
        evaluation = {"every_class": every_class, "answers": None}
        train(config_of(tiny_checkpoint, data, folder, evaluation, max_duration="2ba")).close()
        of_classes = [found for found in tables if found[0].startswith("eval/")]
        assert of_classes == [("eval/categories", 5), ("eval/confusion", 3)] * expected
        found = evaluations(folder)
        assert ["category_ap" in scores for scores in found] == [every_class, True]
        assert all("text_f1" not in scores and "eval/seconds/answers" not in scores for scores in found)


def test_with_classes_they_are_scored_every_time(tiny_checkpoint: str, data: str, tmp_path: Path) -> None:
    evaluation = {"classes": ["red circle", "blue star"], "answers": None}
    train(config_of(tiny_checkpoint, data, tmp_path, evaluation, max_duration="2ba")).close()
    for found in evaluations(tmp_path):
        assert "category_ap" in found and "eval/seconds/classes" in found and "eval/seconds/captions" not in found


@pytest.mark.parametrize("metric", ["eval/category_ap50", "category_ap50"])
def test_what_only_the_last_one_measures_chooses_no_checkpoint(
    metric: str, tiny_checkpoint: str, tmp_path: Path
) -> None:
    def config(**evaluation: Any) -> RecipeConfig:
        config = make_config(tiny_checkpoint, evaluation=evaluation)
        if metric.startswith("eval/"):
            return replace(config, save_best=SaveBestConfig(metric=metric))
        return replace(config, callbacks={"early_stopper": {"monitor": metric, "dataloader_label": "eval"}})

    with pytest.raises(ConfigError, match=r"set evaluation\.every_class=true, or choose another, such as"):
        check_metrics(config())
    check_metrics(config(every_class=True))
    check_metrics(config(classes=["a", "b"]))


def test_the_old_key_of_checkpoints_and_yamls_is_read_as_the_new_one(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "run.yaml"
    whole = (
        "{{run_folder: a, model: {{pretrained_model_name_or_path: b}}, "
        "train_loader: {{streams: {{}}, global_batch_size: 1}}, "
        "eval_loader: {{streams: {{}}, global_batch_size: 1}}, evaluation: {{{0}}}}}\n"
    )

    def answers(evaluation: str, *overrides: str) -> AnswersConfig | None:
        path.write_text(whole.format(evaluation))
        return load_config(str(path), overrides).evaluation.answers

    assert answers("generate_answer: true") == AnswersConfig()
    assert answers("generate_answer: false") is None
    assert "generate_answer in " in caplog.text and "read as evaluation.answers: null" in caplog.text
    assert answers("generate_answer: true", "evaluation.generate_answer=false") is None
    assert answers("answers: null", "evaluation.generate_answer=true") == AnswersConfig()
    for wrong in ("generate_answer: maybe", "generate_answer: true, answers: {images: 5}"):
        with pytest.raises(ConfigError, match=r"generate_answer in .*run\.yaml.* write evaluation\.answers"):
            answers(wrong)


def test_the_new_key_on_the_command_line(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("{run_folder: a, model: {pretrained_model_name_or_path: b}, train_loader: {streams: {}}}\n")
    loaders = [
        f"{name}.{key}" for name in ("train_loader", "eval_loader") for key in ("global_batch_size=1", "streams={}")
    ]

    def answers(*overrides: str) -> AnswersConfig | None:
        return load_config(str(path), [*loaders, *overrides]).evaluation.answers

    assert answers() == EvaluationConfig().answers == AnswersConfig(images=64)
    assert answers("evaluation.answers=null") is None
    assert answers("evaluation.answers.images=5") == answers("evaluation.answers={images: 5}") == AnswersConfig(5)


def test_seconds_in_short() -> None:
    seconds = {"data": 0.5, "forward": 3.25, "captions": 1.0, "answers": 20.0, "scoring": 0.25}
    assert describe_seconds(seconds) == "25 s (answers 20, forward 3.25, captions 1)"


def test_no_step_of_training_waits_for_the_clock(
    tiny_checkpoint: str, data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    laps: list[str] = []
    monkeypatch.setattr(EvaluationScope, "lap", lambda self, part: laps.append(part))
    train(config_of(tiny_checkpoint, data, tmp_path, {}, max_duration="1ba", eval_interval="0ba")).close()
    assert laps == []
