"""`detection_head: null`: the language model alone, from the configuration to the prediction."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from convert.shapes import draw_scene, iter_samples
from convert.write import write_split
from recipe import Detector
from recipe.build import build_model
from recipe.checkpoints.weights import HEAD_FILE, read_weights
from recipe.checks import check_libraries
from recipe.config import ConfigError, EmaConfig, LoaderConfig, OptimizerConfig, PackingConfig, RecipeConfig
from recipe.configure import load_config, save_config
from recipe.estimate import build_on_meta, estimate
from recipe.eval import main as evaluate
from recipe.export import main as export
from recipe.export import parse as parse_export
from recipe.images import open_image
from recipe.load import load_processor
from recipe.optim.groups import build_optimizer
from recipe.predict import main as predict
from recipe.prediction.draw import draw_prediction
from recipe.prediction.options import parse
from recipe.schema import Example, Prediction
from recipe.train import main as train
from tests.launches.launch import run_composer
from tests.support.tiny_cases import gradient_error, losses_and_gradients, make_batches, make_model

Configure = Callable[..., RecipeConfig]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = str(tmp_path_factory.mktemp("data"))
    write_split(iter_samples(12, 1, image_size=84, max_objects=2), folder, "train")
    return folder


@pytest.fixture
def make_run(tiny_config: Configure, data: str, tmp_path: Path) -> Configure:
    """A float64 run of packs, a sixth of whose images are held out."""

    def make(name: str, max_duration: str, **changes: Any) -> RecipeConfig:
        trainer = {"max_duration": max_duration, "eval_interval": "3ba", "save_interval": "1ba", "progress_bar": False}
        return replace(
            tiny_config(),
            run_folder=str(tmp_path / name),
            detection_head=None,
            val_fraction=0.3,
            train_loader=LoaderConfig(
                streams={"shapes": {"local": data, "split": "train"}},
                global_batch_size=2,
                collator="packed",
                packing=PackingConfig(max_tokens=500),
                dataset={"shuffle": True, "num_canonical_nodes": 1},
            ),
            eval_loader=LoaderConfig(streams={}, global_batch_size=2),
            loggers={"json_lines": {}, "wandb": {}},
            callbacks={"loss_shares": {}, "group_metrics": {}, "throughput": {"interval": "1ba"}},
            trainer={**trainer, "save_filename": "ba{batch}.pt"},
            **changes,
        )

    return make


def logged(folder: str | Path) -> dict[str, list[float]]:
    """What metrics.jsonl holds, by name."""
    found: dict[str, list[float]] = {}
    for line in Path(folder, "metrics.jsonl").read_text().splitlines():
        for name, value in json.loads(line)["metrics"].items():
            found.setdefault(name, []).append(value)
    return found


def test_a_run_from_training_to_prediction(make_run: Configure, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    whole = make_run("whole", "3ba")
    train(whole).close()
    folder = Path(whole.run_folder)
    weights = read_weights(folder / "checkpoints" / "ba3.pt")
    assert all(name.startswith("model.vlm.") for name in weights)
    metrics = logged(folder)
    names = {name.split("/", 2)[-1] for name in metrics if name.startswith(("loss/train/", "metrics/eval/"))}
    assert {"loss_lm_student", "loss_lm_teacher", "total", "text_f1", "text_parse_failure_rate"} <= names
    assert not {name for name in names if "box" in name or "caption" in name or name == "recall" or "ap" in name}
    assert not {name for name in metrics if name.endswith(("/adapter", "/detection")) and not name.startswith("flops/")}
    assert set(metrics["flops/step/detection"]) == {0.0}
    assert (folder / "curves.png").is_file() and list((folder / "images").rglob("gallery.png"))

    part = replace(make_run("part", "3ba"), load_path=str(folder / "checkpoints" / "ba1.pt"))
    train(part).close()
    resumed = read_weights(Path(part.run_folder, "checkpoints", "ba3.pt"))
    assert weights.keys() == resumed.keys()
    assert all(torch.equal(value, resumed[name]) for name, value in weights.items())

    checkpoint = str(folder / "checkpoints" / "ba3.pt")
    scores = evaluate(
        replace(load_config(str(folder / "config.yaml")), load_path=checkpoint, run_folder=str(tmp_path / "e"))
    )
    assert scores["text_f1"] == metrics["metrics/eval/text_f1"][-1]
    assert scores["loss_lm_student"] == pytest.approx(metrics["metrics/eval/loss_lm_student"][-1], rel=1e-12)
    assert not (tmp_path / "e" / "calibration.yaml").exists()

    out = tmp_path / "exported"
    export(parse_export(["--checkpoint", checkpoint, "--out", str(out)]))
    assert load_file(out / HEAD_FILE) == {}
    (tmp_path / "scene.png").write_bytes(draw_scene(seed=4, index=1, image_size=84).image)
    answers = []
    for number, source in enumerate((checkpoint, str(out))):
        found = tmp_path / f"found-{number}"
        arguments = ["--checkpoint", source, "--out", str(found), "--max-new-tokens", "4", str(tmp_path / "scene.png")]
        assert predict(parse(arguments)) == 0
        (row,) = json.loads((found / "predictions.json").read_text())
        assert row["objects"] is None
        answers.append(row["answer"])
    assert answers[0] == answers[1] is not None
    detector = Detector.from_pretrained(out, dtype=torch.float32)
    assert detector(tmp_path / "scene.png").answer is not None
    with pytest.raises(ValueError, match=r"the model was trained with .* in Python answer='text'"):
        detector(tmp_path / "scene.png", answer="boxes")
    with pytest.raises(ValueError, match="tiles find objects of the head"):
        detector(tmp_path / "scene.png", tile=120)
    with pytest.raises(ValueError, match="was trained with detection_head: null: use --answer text"):
        predict(
            parse(
                [
                    "--checkpoint",
                    checkpoint,
                    "--out",
                    str(tmp_path / "none"),
                    "--answer",
                    "both",
                    str(tmp_path / "scene.png"),
                ]
            )
        )


@pytest.mark.slow
@pytest.mark.world_size(2)
def test_two_ranks_are_one(make_run: Configure, tmp_path: Path):
    for name, ranks in (("one", 1), ("two", 2)):
        save_config(make_run(name, "3ba"), tmp_path / f"{name}.yaml")
        run_composer(ranks, "recipe/train.py", str(tmp_path / f"{name}.yaml"))
    one, two = (logged(tmp_path / name) for name in ("one", "two"))
    names = ["loss/train/loss_lm_student", "gradient_norm/llm", "gradient_norm/vision", "metrics/eval/loss_lm_student"]
    for name in names:
        assert two[name] == pytest.approx(one[name], rel=1e-6), name


def test_losses_and_gradients_are_those_of_the_joint_model(tiny_config: Configure, tiny_examples: dict[str, Example]):
    """With the head's loss weights at 0, on batches with and without images and answers."""
    weights = {f"weight_{name}": 0.0 for name in ("bbox", "giou", "objectness", "caption")}
    config = tiny_config(loss=weights)
    joint = make_model(config)
    alone = build_model(
        replace(config, detection_head=None), load_processor(config.model.pretrained_model_name_or_path)
    )
    assert not alone.model.has_head
    build_optimizer(alone.train(), OptimizerConfig())
    for names in (list(tiny_examples), ["text"], ["empty", "one"]):
        for layout in ("packed", "standard"):
            batches = make_batches([tiny_examples[name] for name in names], layout, 2)
            losses, gradients = losses_and_gradients(alone, batches)
            expected, whole = losses_and_gradients(joint, batches)
            terms = {"loss_lm_teacher", "loss_lm_student", "total"}
            assert losses.keys() == expected.keys() & terms >= {"loss_lm_student", "total"}
            for name, value in losses.items():
                assert float(value) == pytest.approx(float(expected[name]), rel=1e-12)
            # measured: 0
            assert gradient_error(gradients, {name: whole[name] for name in gradients}) <= 1e-9


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ema": EmaConfig()}, "ema is about the detection head"),
        ({"callbacks": {"loss_gradients": {}}}, "callbacks.loss_gradients is about the detection head"),
        ({"optimizer": OptimizerConfig(lr_vision=0, lr_merger=0, lr_llm=0)}, "so nothing would train"),
        ({"save_best": replace(RecipeConfig().save_best, metric="eval/box_ap50")}, "which no evaluation measures"),
    ],
)
def test_what_needs_the_head_is_refused(tiny_config: Configure, changes: dict[str, Any], message: str):
    config = replace(
        tiny_config(),
        detection_head=None,
        train_loader=LoaderConfig(streams={}, global_batch_size=1),
        eval_loader=LoaderConfig(streams={}, global_batch_size=1),
        trainer={"max_duration": "1ba"},
    )
    check_libraries(config)
    with pytest.raises(ConfigError, match=message):
        check_libraries(replace(config, **changes))


def test_the_estimate_has_no_head(make_run: Configure):
    config = make_run("run", "1ba")
    alone = estimate(config, build_on_meta(config), 1)
    head = replace(config, detection_head=RecipeConfig().detection_head)
    assert alone.weights < estimate(head, build_on_meta(head), 1).weights


def test_a_drawing_has_no_panel_for_a_head_that_is_not_there():
    sample = draw_scene(seed=4, index=1, image_size=84)
    image = open_image(sample.image)
    sizes = [
        draw_prediction(image, Prediction(sample.id, 84, 84, (), "none", with_head=with_head), sample).size
        for with_head in (True, False)
    ]
    assert sizes[0] != sizes[1]  # one panel fewer
