"""Whole runs with an average of the head: resumed, judged, loaded and exported."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from convert.shapes import iter_samples
from convert.write import write_split
from recipe.checkpoints.weights import answering_weights, export_model, read_weights
from recipe.config import EmaConfig, LoaderConfig, OptimizerConfig, RecipeConfig
from recipe.eval import main as evaluate
from recipe.train import main as train
from tests.support.tiny_cases import load_model

STEPS = 4


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = str(tmp_path_factory.mktemp("scenes"))
    for split, count, seed in (("train", 6, 1), ("val", 3, 2)):
        write_split(iter_samples(count, seed, image_size=84, max_objects=2), folder, split)
    return folder


@pytest.fixture(scope="module")
def make_run(tiny_config: Callable[..., RecipeConfig], data: str) -> Callable[..., RecipeConfig]:
    """`make_run(folder, **changes)`: a float32 run with dropout, evaluated every second batch and saved after each."""

    def make(folder: Path, **changes: object) -> RecipeConfig:
        train_stream, eval_stream = ({"shapes": {"local": data, "split": split}} for split in ("train", "val"))
        config = replace(
            tiny_config(model={"dtype": "float32"}, detection_head={"dropout": 0.1}),
            run_folder=str(folder),
            ema=EmaConfig(half_life="3ba"),
            optimizer=OptimizerConfig(lr_adapter=1e-2, lr_detection=1e-2),
            train_loader=LoaderConfig(
                streams=train_stream, global_batch_size=2, dataset={"shuffle": True, "num_canonical_nodes": 1}
            ),
            eval_loader=LoaderConfig(streams=eval_stream, global_batch_size=2),
            trainer={
                "max_duration": f"{STEPS}ba",
                "eval_interval": "2ba",
                "save_interval": "1ba",
                "save_filename": "ba{batch}.pt",
                "progress_bar": False,
            },
        )
        return replace(config, **changes)

    return make


@pytest.fixture(scope="module")
def run(
    make_run: Callable[..., RecipeConfig], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, float]]:
    """The folder of the checkpoints of a run, and what its last evaluation measured."""
    config = make_run(tmp_path_factory.mktemp("run"))
    trainer = train(config)
    measured = {name: float(value) for name, value in trainer.state.eval_metric_values.items()}
    trainer.close()
    return Path(config.run_folder, "checkpoints"), measured


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_checkpoint_holds_both(run: tuple[Path, dict[str, float]]) -> None:
    weights = read_weights(run[0] / "ba4.pt")
    averages = {name: value for name, value in weights.items() if name.startswith("model.average.")}
    trained = {name.replace("average.", ""): value for name, value in averages.items()}
    assert averages and trained.keys() < weights.keys()
    assert not any(torch.equal(weights[name], value) for name, value in trained.items() if value.ndim > 1)


def test_what_is_trained_is_that_of_a_run_without_it(
    run: tuple[Path, dict[str, float]], make_run: Callable[..., RecipeConfig], tmp_path: Path
) -> None:
    """Through the whole line, evaluations and dropout included."""
    train(make_run(tmp_path, ema=None)).close()
    plain = read_weights(tmp_path / "checkpoints" / "ba4.pt")
    found = read_weights(run[0] / "ba4.pt")
    assert same({name: found[name] for name in plain}, plain)


@pytest.mark.parametrize("interval", [pytest.param("1ba", marks=pytest.mark.slow), "2ba"])
def test_resumed_it_is_that_of_the_uninterrupted_run(
    make_run: Callable[..., RecipeConfig], tmp_path: Path, interval: str
) -> None:
    """From a batch between two updates too."""
    ema = EmaConfig(half_life="3ba", update_interval=interval)
    train(make_run(tmp_path / "whole", ema=ema)).close()
    expected = read_weights(tmp_path / "whole" / "checkpoints" / "ba4.pt")
    begun = str(tmp_path / "whole" / "checkpoints" / "ba3.pt")
    train(make_run(tmp_path / "part", ema=ema, load_path=begun)).close()
    assert same(read_weights(tmp_path / "part" / "checkpoints" / "ba4.pt"), expected)


def test_eval_gives_what_training_measured_and_it_is_of_the_average(
    run: tuple[Path, dict[str, float]], make_run: Callable[..., RecipeConfig], tmp_path: Path
) -> None:
    folder, measured = run
    asked = make_run(tmp_path / "judged", load_path=str(folder / "ba4.pt"))
    assert evaluate(asked) == pytest.approx(measured, abs=1e-6)
    weights = read_weights(folder / "ba4.pt")
    for name, parts in (("average", answering_weights(weights, "model.")), ("trained", weights)):
        parts = {key: value for key, value in parts.items() if ".average." not in key}
        torch.save({"state": {"model": parts}}, tmp_path / f"{name}.pt")
    plain = replace(asked, ema=None)
    scores = [evaluate(replace(plain, load_path=str(tmp_path / f"{name}.pt"))) for name in ("average", "trained")]
    assert scores[0] == pytest.approx(measured, abs=1e-6)
    assert scores[1]["loss_bbox"] != pytest.approx(measured["loss_bbox"], abs=1e-4)


def test_a_loaded_and_an_exported_model_is_the_average(run: tuple[Path, dict[str, float]], tmp_path: Path) -> None:
    weights = read_weights(run[0] / "ba4.pt")
    model, processor, config = load_model(run[0] / "ba4.pt")
    name = "detection_head.query_content.weight"
    assert torch.equal(model.state_dict()[f"model.{name}"], weights[f"model.average.{name}"])
    assert same(dict(model.state_dict()), answering_weights(weights, "model."))
    export_model(model.model, processor, config, tmp_path / "exported")
    again, _, _ = load_model(tmp_path / "exported")
    assert same(dict(again.state_dict()), dict(model.state_dict()))


def test_a_model_that_still_has_both_is_exported_as_the_average(
    run: tuple[Path, dict[str, float]], tmp_path: Path
) -> None:
    model, processor, config = load_model(run[0] / "ba4.pt")
    expected = {name: value.clone() for name, value in model.state_dict().items()}
    model.model.add_average()
    with torch.no_grad():
        for weight, _ in model.model.averaged_parameters():
            weight.zero_()
    export_model(model.model, processor, config, tmp_path / "exported")
    assert same(dict(load_model(tmp_path / "exported")[0].state_dict()), expected)


def test_a_checkpoint_that_has_it_where_the_run_has_not_or_the_other_way_round_is_refused(
    run: tuple[Path, dict[str, float]], make_run: Callable[..., RecipeConfig], tmp_path: Path
) -> None:
    asked = make_run(tmp_path / "new", ema=None, load_path=str(run[0] / "ba4.pt"))
    for main in (train, evaluate):
        with pytest.raises(ValueError, match=r"ba4.pt has averages .* set ema to .*'half_life': '3ba'"):
            main(asked)
    plain = make_run(tmp_path / "plain", ema=None)
    plain = replace(plain, trainer={**plain.trainer, "max_duration": "1ba"})
    train(plain).close()
    averaging = make_run(tmp_path / "new", load_path=str(tmp_path / "plain" / "checkpoints" / "ba1.pt"))
    with pytest.raises(ValueError, match=r"ba1.pt has no averages .*: set ema=null"):
        train(averaging)
    assert evaluate(averaging) == evaluate(replace(averaging, ema=None)), "averages begin as the weights"
