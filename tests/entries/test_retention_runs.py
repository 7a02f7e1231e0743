"""`evaluation.retention` through training and `recipe/eval.py`: where its scores appear, and what is refused."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from convert.shapes import draw_scene
from convert.write import write_split
from recipe.callbacks.retention import RETENTION_SCORES
from recipe.checkpoints.weights import find_config
from recipe.checks import check_libraries, check_machine, check_metrics, check_retention
from recipe.config import ConfigError, LoraConfig, LoraPartConfig, RecipeConfig, RetentionConfig, SaveBestConfig
from recipe.configure import save_config
from recipe.eval import main as evaluate
from recipe.load import load_processor
from recipe.schema import Message, Sample
from tests.launches.launch import run_composer
from tests.support.tiny_cases import TEXT_CHAT
from tests.support.tiny_run import train_tiny_run

CHATS = 5
ADAPTERS: dict[str, Any] = {
    "model": {"dtype": "float64"},
    "lora": LoraConfig(llm=LoraPartConfig(rank=4, dropout=0.5)),
    "optimizer": {"lr_llm": 0.0, "lr_vision": 0.0, "lr_merger": 0.0, "lr_lora_llm": 1e-2},
}


def chat(answer: str) -> tuple[Message, ...]:
    return ({"role": "user", "content": "what is it?"}, {"role": "assistant", "content": answer})


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Five chats of several lengths: two about an image, one of two questions; and one without an answer."""
    folder = str(tmp_path_factory.mktemp("chats"))
    scenes = [replace(draw_scene(seed=1, index=index, image_size=56), objects=None) for index in range(2)]
    samples = [
        replace(scenes[0], id="0", messages=chat("a red star")),
        Sample("1", b"", 0, 0, None, TEXT_CHAT),
        replace(scenes[1], id="2", messages=chat("a small circle on the left of the image")),
        Sample("3", b"", 0, 0, None, (*TEXT_CHAT, *chat("the quick brown fox"))),
        Sample("4", b"", 0, 0, None, chat("x")),
    ]
    assert len(samples) == CHATS
    write_split(iter(samples), folder, "val")
    write_split(iter([Sample("5", b"", 0, 0, None, TEXT_CHAT[:1])]), folder, "asked")
    return folder


def retention(chats: str, split: str = "val", **keywords: Any) -> RetentionConfig:
    return RetentionConfig({"local": chats, "split": split}, **keywords)


@pytest.fixture(scope="module")
def checkpoint(tiny_checkpoint: str, chats: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two steps of adapters, each with an evaluation."""
    folder = tmp_path_factory.mktemp("run")
    loggers = {"json_lines": {}, "tensorboard": {}, "wandb": {}}
    evaluation = {"retention": retention(chats)}
    return train_tiny_run(tiny_checkpoint, folder, **ADAPTERS, evaluation=evaluation, loggers=loggers)


def scores_of(found: dict[str, float]) -> dict[str, float]:
    return {name: found[name] for name in RETENTION_SCORES}


def config_of(checkpoint: Path, folder: Path, **changes: Any) -> RecipeConfig:
    """Of an evaluation of the chats by batches of `global_batch_size`."""
    config = find_config(checkpoint)
    loader = {key: changes.pop(key) for key in ("global_batch_size", "on_bad_sample", "collator") if key in changes}
    return replace(
        config,
        load_path=str(checkpoint),
        run_folder=str(folder),
        loggers={},
        eval_loader=replace(config.eval_loader, **loader),
        evaluation=replace(config.evaluation, **{"answers": None, **changes}),
    )


def test_a_run_logs_it_beside_the_scores_of_boxes(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run = checkpoint.parents[1]
    rows = [json.loads(line)["metrics"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    logged = [row for row in rows if "metrics/eval/retention_kl" in row]
    assert len(logged) == 2
    first, last = ({name: row[f"metrics/eval/{name}"] for name in RETENTION_SCORES} for row in logged)
    assert 0 < first["retention_kl"] < last["retention_kl"] < math.inf
    assert first["retention_base_loss"] == last["retention_base_loss"] != last["retention_loss"]
    assert all(row["eval/seconds/retention"] > 0 for row in rows if "eval/seconds/forward" in row)
    manifest = json.loads(next(run.glob("checkpoints/ep*.manifest.json")).read_text())
    assert scores_of(manifest["scores"]) == pytest.approx(last, rel=1e-6)
    # What eval.py computes from the checkpoint, in other batches.
    found = evaluate(config_of(checkpoint, tmp_path / "eval", global_batch_size=1))
    assert scores_of(found) == pytest.approx(last, rel=1e-9)
    assert scores_of(json.loads((tmp_path / "eval/eval.json").read_text())) == scores_of(found)
    printed = capsys.readouterr().out
    assert "KL to the base 0." in printed and "  retention_base_loss" in printed and "  box_ap " in printed
    packed = evaluate(config_of(checkpoint, tmp_path / "packed", global_batch_size=3, collator="packed"))
    assert scores_of(packed) == pytest.approx(last, rel=1e-9)


def test_the_first_samples_alone(checkpoint: Path, chats: str, tmp_path: Path):
    found = evaluate(config_of(checkpoint, tmp_path, retention=retention(chats, max_samples=1)))
    tokenizer = load_processor(find_config(checkpoint).model.pretrained_model_name_or_path).tokenizer
    assert found["retention_tokens"] == len(tokenizer("a red star<|im_end|>")["input_ids"])


@pytest.mark.slow
@pytest.mark.world_size(2)
def test_two_ranks_are_one(checkpoint: Path, tmp_path: Path):
    """Five chats: the last batch of the second rank is filled with an inert one."""
    expected = evaluate(config_of(checkpoint, tmp_path / "1"))
    save_config(config_of(checkpoint, tmp_path / "2", global_batch_size=2), tmp_path / "given.yaml")
    run_composer(2, "recipe/eval.py", str(tmp_path / "given.yaml"))
    found = json.loads((tmp_path / "2/eval.json").read_text())
    # In another process transformers computes parts in float32; measured: 9.4e-9.
    assert scores_of(found) == pytest.approx(scores_of(expected), rel=1e-6)


@pytest.mark.slow
@pytest.mark.world_size(2)
@pytest.mark.parametrize("version", [1, 2])
def test_a_sharded_model_is_compared_with_a_whole_base(
    version: int, tiny_checkpoint: str, chats: str, tmp_path: Path
) -> None:
    trained = train_tiny_run(tiny_checkpoint, tmp_path / "trained", model={"dtype": "float64"})
    config = config_of(trained, tmp_path / "1", retention=retention(chats))
    expected = evaluate(config)
    assert expected["retention_kl"] > 1e-6
    trainer = {**config.trainer, "parallelism_config": {"fsdp": {"mixed_precision": "FULL"}}}
    sharded = replace(config, run_folder=str(tmp_path / "2"), trainer=trainer, fsdp_version=version)
    save_config(sharded, tmp_path / "given.yaml")
    run_composer(2, "tests/distributed/eval_run.py", str(tmp_path / "given.yaml"))
    found = json.loads((tmp_path / "2/eval.json").read_text())
    # In another process transformers computes parts in float32; measured: 1.2e-10 of a divergence of 1.2e-5.
    assert scores_of(found) == pytest.approx(scores_of(expected), rel=1e-8, abs=1e-9)


def test_of_trained_weights_eval_reads_the_base(
    trained_checkpoint: Path, chats: str, tmp_path: Path, tiny_checkpoint: str
):
    """Training cannot, and says so; weights that are the base's have moved by nothing."""
    config = config_of(trained_checkpoint, tmp_path / "eval", retention=retention(chats))
    with pytest.raises(ConfigError, match=r"lr_vision=0 optimizer.lr_merger=0 optimizer.lr_llm=0 .*recipe/eval.py"):
        check_retention(config)
    found = evaluate(config)
    assert 0 < found["retention_kl"] < 1e-2 and found["retention_loss"] != found["retention_base_loss"]
    base = evaluate(replace(config, load_path=None, run_folder=str(tmp_path / "base")))
    assert base["retention_kl"] == 0 and base["retention_loss"] == base["retention_base_loss"]
    assert base["retention_base_loss"] == found["retention_base_loss"]


def test_a_training_that_moves_nothing_or_more_is_refused(checkpoint: Path):
    config = find_config(checkpoint)
    check_retention(config)
    check_retention(replace(config, evaluation=replace(config.evaluation, retention=None)))
    with pytest.raises(ConfigError, match="stays the base's: set"):
        check_retention(replace(config, optimizer=replace(config.optimizer, lr_lora_llm=0.0)))
    with pytest.raises(ConfigError, match=r"\(merger\): set optimizer.lr_merger=0 and"):
        check_retention(replace(config, optimizer=replace(config.optimizer, lr_merger=1e-5)))


@pytest.mark.parametrize(
    ("stream", "expected"),
    [
        ({"locl": "x"}, "has neither local nor remote"),
        ({"local": "x", "splt": "val"}, r"unknown key evaluation.retention.stream.splt: did you mean split"),
        ({"local": "x", "proportion": 0.2}, "evaluation.retention.stream.proportion is 0.2, but every sample is read"),
        ("x", "evaluation.retention.stream is 'x': it takes the keywords"),
    ],
)
def test_a_wrong_stream_is_refused(checkpoint: Path, stream: Any, expected: str):
    config = find_config(checkpoint)
    config = replace(config, evaluation=replace(config.evaluation, retention=RetentionConfig(stream)))
    with pytest.raises(ConfigError, match=expected):
        check_libraries(config)


def test_data_that_is_missing_or_holds_no_answer_is_refused(checkpoint: Path, chats: str, tmp_path: Path):
    with pytest.raises(ConfigError, match=r"evaluation.retention.stream.split is 'vall', .*: did you mean val\?"):
        check_machine(config_of(checkpoint, tmp_path, retention=retention(chats, "vall")), ("eval_loader",))
    with pytest.raises(ConfigError, match=r"evaluation.retention.stream: none of its 1 samples has an answer"):
        evaluate(config_of(checkpoint, tmp_path, retention=retention(chats, "asked")))


def test_it_can_choose_the_best_checkpoint(checkpoint: Path):
    config = replace(find_config(checkpoint), save_best=SaveBestConfig("eval/retention_kl", "min"))
    check_metrics(config)
    with pytest.raises(ConfigError, match="no evaluation measures"):
        check_metrics(replace(config, evaluation=replace(config.evaluation, retention=None)))
