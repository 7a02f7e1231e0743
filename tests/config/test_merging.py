"""Configuration: what is merged from defaults, yaml and command line, and what is saved."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import yaml
from config_cases import MINIMAL, assert_one_line, load_and_check, write_yaml

from recipe.config import (
    DATA_CLASSES,
    GROUPS,
    REMOVED_KEYS,
    ConfigError,
    LoraConfig,
    LoraPartConfig,
    RecipeConfig,
    groups_of,
)
from recipe.configure import expand_home, load_config, save_config
from recipe.redact import redact
from recipe.rules import parse_stages

YAMLS = Path(__file__).resolve().parents[2] / "yamls"
# Of removed keys, not their defaults.
OTHER_VALUES = {
    "matcher.cost_caption": 0.5,
    "caption_decoder.tie_word_embeddings": False,
    "evaluation.num_beams": 4,
    "evaluation.length_penalty": 0.7,
}
WORDS = ["on", "Off", "no", "yes", "y", "TRUE", "null", "~", "7", "1.50", "0x1F", "1_000", "2026-11-27", "a cat"]


def test_defaults_then_yaml_then_command_line(tmp_path: Path) -> None:
    path = write_yaml(tmp_path, {**MINIMAL, "seed": 3, "loss": {"weight_bbox": 1.5, "weight_giou": 4}})
    config = load_and_check(path, "loss.weight_giou=0.5", "trainer.max_duration=2ba")
    assert isinstance(config, RecipeConfig)
    assert config.seed == 3
    assert (config.loss.weight_lm_student, config.loss.weight_bbox, config.loss.weight_giou) == (1.0, 1.5, 0.5)
    assert config.trainer == {"max_duration": "2ba"}


def test_overrides_of_every_kind(minimal: str) -> None:
    config = load_and_check(
        minimal,
        "detection_head.refine_boxes=false",
        "teachers.stream=null",
        "optimizer.lr_llm=1e-4",
        "prompt.candidate_phrases=[a cat,a dog]",
        "train_loader.streams.extra={local: x, proportion: 0.5}",
        "train_loader.streams.main.split=a=b",
        "trainer.save_overwrite=true",
        "loggers.wandb=null",
        "callbacks.lr_monitor={}",
    )
    assert config.detection_head is not None
    assert config.detection_head.refine_boxes is False
    assert config.teachers.stream is None
    assert config.optimizer.lr_llm == 1e-4
    assert config.prompt.candidate_phrases == ["a cat", "a dog"]
    assert config.train_loader.streams["extra"] == {"local": "x", "proportion": 0.5}
    assert config.train_loader.streams["main"] == {"local": "data/train", "split": "a=b"}
    assert config.trainer["save_overwrite"] is True
    assert config.loggers == {"wandb": None}
    assert config.callbacks == {"lr_monitor": {}}


@pytest.mark.parametrize("path", sorted(YAMLS.glob("*.yaml")), ids=lambda path: path.name)
def test_every_yaml_of_the_repository_is_right(path: Path) -> None:
    load_and_check(str(path))
    assert path.read_text(encoding="utf-8").startswith("#"), "say what it is for, how long it takes and what it reaches"


def test_interpolation_is_resolved(minimal: str) -> None:
    config = load_and_check(minimal, "load_path=s3://bucket/${run_folder}/latest.pt")
    assert config.load_path == "s3://bucket/runs/test/latest.pt"


def test_the_head_may_be_null_but_not_a_text(minimal: str) -> None:
    assert load_and_check(minimal, "detection_head=null").detection_head is None
    again = load_and_check(minimal, "detection_head=null", "detection_head.num_queries=7").detection_head
    assert again is not None and again.num_queries == 7
    assert_one_line(minimal, ["detection_head=none"], "detection_head in the command line is 'none': give it")
    assert_one_line(minimal, ["detection_head=null", "ema={}"], "ema is about the detection head")


def test_a_validation_split_needs_no_streams(minimal: str, tmp_path: Path) -> None:
    assert_one_line(minimal, ["eval_loader.streams=null"], "eval_loader.streams is empty")
    loaded = load_and_check(minimal, "val_fraction=0.1", "eval_loader.streams=null")
    assert loaded.eval_loader.streams == {}
    without = {**MINIMAL, "eval_loader": {"global_batch_size": 2}, "val_fraction": 0.1}
    assert load_and_check(write_yaml(tmp_path, without)).eval_loader.streams == {}


def staged(tmp_path: Path) -> str:
    stages = [{"from": "0ep", "lr": "frozen"}, {"from": "1ep", "lr": 1}]
    groups = {"staged_freezing": {"groups": {"llm": stages, "vision": stages}}, "callbacks": {"lr_monitor": {}}}
    return write_yaml(tmp_path, {**MINIMAL, **groups})


@pytest.mark.parametrize("text", ["{}", "null"])
def test_an_empty_mapping_on_the_command_line_clears_the_yamls(tmp_path: Path, text: str) -> None:
    config = load_and_check(staged(tmp_path), f"staged_freezing.groups={text}", "callbacks={}")
    assert config.staged_freezing.groups == {} and config.callbacks == {}
    config = load_and_check(staged(tmp_path), f"staged_freezing.groups={text}", "staged_freezing.groups.llm=null")
    assert list(config.staged_freezing.groups) == ["llm"]


def test_a_rate_of_zero_wins_over_stages(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    config = load_and_check(staged(tmp_path), "optimizer.lr_vision=0")
    assert list(parse_stages(config.staged_freezing, config.optimizer)) == ["llm"]
    assert caplog.text.count("optimizer.lr_vision is 0") == 1


def test_adapters_on_the_command_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Of one part, with its other keys at their defaults; null takes them away, and then their stages do nothing."""
    path = write_yaml(tmp_path, MINIMAL)
    stage = "staged_freezing.groups.lora_llm=[{from: 0ep, lr: frozen}, {from: 1ep, lr: 1}]"
    trunk = ["optimizer.lr_vision=0", "optimizer.lr_llm=0"]
    frozen = [*trunk, "optimizer.lr_merger=0", "optimizer.lr_adapter=0", "optimizer.lr_detection=0"]
    config = load_and_check(path, *trunk, "lora.llm={}", "lora.vision.rank=8", "lora.vision.targets=[qkv]", stage)
    assert config.lora == LoraConfig(llm=LoraPartConfig(), vision=LoraPartConfig(rank=8, targets=["qkv"]))
    assert set(groups_of(config)) == set(GROUPS)
    caplog.set_level("INFO")
    config = load_and_check(path, "lora.llm={}", stage, "lora=null")
    assert config.lora is None and groups_of(config) == [group for group in GROUPS if not group.startswith("lora")]
    assert "lora is not set for the group lora_llm: staged_freezing.groups.lora_llm has no effect" in caplog.text
    with pytest.raises(ConfigError, match=r"optimizer\.lr_\*: all are 0, so nothing would train"):
        load_and_check(path, *frozen)
    load_and_check(path, *frozen, "lora.llm={}")
    with pytest.raises(ConfigError, match=r"freezes lora_llm at the start, so nothing would train"):
        load_and_check(path, *frozen, "lora.llm={}", stage)


@pytest.mark.parametrize("in_yaml", [False, True])
def test_words_stay_as_they_are_written(tmp_path: Path, minimal: str, in_yaml: bool) -> None:
    """YAML reads some of them as booleans, numbers or nothing."""
    written = {
        "prompt.candidate_phrases": f"[{', '.join(WORDS)}]",
        "prompt.system": "no",
        "run_folder": "2026_11",
        "trainer.run_name": "20261127",
        "loggers.wandb": "{project: 007, tags: [off, 3], init_kwargs: {id: 1e3}}",
        "eval_loader.streams.main.split": "2017",
        "loss.weight_bbox": "1_0",
        "prompt.student_answer": "no",
    }
    if in_yaml:
        lines = "".join(
            f"  {key.split('.')[1]}: {text}\n" for key, text in written.items() if key.startswith("prompt.")
        )
        (tmp_path / "words.yaml").write_text(
            f"prompt:\n{lines}run_folder: 2026_11\nloss: {{weight_bbox: 1_0}}\n"
            f"trainer: {{run_name: 20261127}}\nloggers:\n  wandb: {written['loggers.wandb']}\n"
            "model: {pretrained_model_name_or_path: x}\n"
            "train_loader: {streams: {main: {local: x}}, global_batch_size: 1}\n"
            "eval_loader: {streams: {main: {local: x, split: 2017}}, global_batch_size: 1}\n"
        )
        config = load_config(str(tmp_path / "words.yaml"))
    else:
        config = load_config(minimal, [f"{key}={text}" for key, text in written.items()])
    assert config.prompt.candidate_phrases == WORDS
    assert config.prompt.system == "no" and config.run_folder == "2026_11" and config.prompt.student_answer is False
    assert config.trainer["run_name"] == "20261127" and config.eval_loader.streams["main"]["split"] == "2017"
    assert config.loggers["wandb"] == {"project": "007", "tags": ["off", "3"], "init_kwargs": {"id": "1e3"}}
    assert config.loss.weight_bbox == 10
    save_config(config, tmp_path / "saved.yaml")
    assert load_config(str(tmp_path / "saved.yaml")) == config


def test_one_text_is_a_list_of_one(minimal: str, tmp_path: Path) -> None:
    """So `evaluation.classes: data` needs no brackets; what follows in other libraries' sections stays text."""
    config = load_config(minimal, ["evaluation.classes=data", "prompt.candidate_phrases=no", "trainer.run_name=a"])
    assert config.evaluation.classes == DATA_CLASSES == ["data"]
    assert config.prompt.candidate_phrases == ["no"] and config.trainer["run_name"] == "a"
    save_config(config, tmp_path / "saved.yaml")
    assert load_config(str(tmp_path / "saved.yaml")) == config
    save_config(config, tmp_path / "saved.yaml", classes=["on", "off"])
    assert load_config(str(tmp_path / "saved.yaml")).evaluation.classes == ["on", "off"]
    text = Path(minimal).read_text() + "evaluation: {classes: data}\nprompt: {candidate_phrases: '${run_folder}s'}\n"
    (tmp_path / "text.yaml").write_text(text)
    assert load_config(str(tmp_path / "text.yaml"), ["prompt.candidate_phrases=[]"]).evaluation.classes == ["data"]


def test_home_is_expanded_in_every_path(minimal: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/me")
    paths = ("run_folder", "load_path", "model.pretrained_model_name_or_path", "trainer.save_folder")
    paths += ("eval_loader.streams.main.local", "eval_loader.streams.main.remote", "loggers.wandb.init_kwargs.dir")
    config = load_config(minimal, [*(f"{path}=~/a b/x" for path in paths), "prompt.detect=~/a", "trainer.run_name=a~b"])
    found: Any = asdict(config)
    for path in paths:
        value = found
        for name in path.split("."):
            value = value[name]
        assert value == "/me/a b/x", path
    assert config.prompt.detect == "~/a" and config.trainer["run_name"] == "a~b"
    arguments = ["--out=~/x", "~/*.jpg", "--prompt=see ~/x", "a/~/b"]
    assert [expand_home(text) for text in arguments] == ["--out=/me/x", "/me/*.jpg", *arguments[2:]]


def test_saved_config_loads_again(minimal: str, tmp_path: Path) -> None:
    config = load_and_check(minimal, "trainer.eval_interval=3ba", "teachers.stream={remote: s3://b/pool}")
    save_config(config, tmp_path / "new" / "config.yaml")
    assert load_config(str(tmp_path / "new" / "config.yaml")) == config


@pytest.mark.parametrize("key", REMOVED_KEYS)
def test_a_key_that_was_removed(minimal: str, tmp_path: Path, key: str) -> None:
    """A config that an older run saved loads if the key held its default; any other value is refused by name."""
    config, path, other = load_config(minimal), tmp_path / "config.yaml", OTHER_VALUES[key]
    save_config(config, path)
    saved = yaml.safe_load(path.read_text())
    section, name = key.split(".")
    assert name not in saved[section]
    saved[section][name] = REMOVED_KEYS[key]
    path.write_text(yaml.safe_dump(saved))
    assert load_config(str(path)) == config
    saved[section][name] = other
    path.write_text(yaml.safe_dump(saved))
    assert_one_line(str(path), [], rf"{key} in .*config.yaml is {other}: this key was removed; delete it")
    assert_one_line(minimal, [f"{key}={other}"], rf"{key} in the command line is {other}: this key was removed")


def test_the_head_of_an_older_version(minimal: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Such a configuration holds two switches: both off are the head without pyramid, on they have no equal."""
    path = tmp_path / "config.yaml"

    def older(**switches: bool) -> str:
        save_config(load_config(minimal), path)
        saved = yaml.safe_load(path.read_text())
        del saved["detection_head"]["multi_scale"]
        saved["detection_head"] |= switches
        path.write_text(yaml.safe_dump(saved))
        return str(path)

    found = load_and_check(older(patch_features=False, select_queries=False))
    assert found == load_config(minimal, ["detection_head.multi_scale=false", "detection_head.select_queries=false"])
    assert "patch_features in " in caplog.text and "read as detection_head.multi_scale: false" in caplog.text
    assert_one_line(
        older(patch_features=False, select_queries=True),
        [],
        r"select_queries chooses from the maps of multi_scale, which is false \(in older versions: from vision t",
    )
    for select_queries in (False, True):
        older(patch_features=True, select_queries=select_queries)
        assert_one_line(str(path), [], r"patch_features in .* is True: .* replaced; write detection_head.multi_scale")


def test_a_value_that_was_removed(tmp_path: Path) -> None:
    path = write_yaml(tmp_path, {**MINIMAL, "loss": {"objectness": "varifocal"}})
    assert_one_line(path, [], r"loss.objectness in .*run.yaml is 'varifocal': this value was removed; delete the key")


def test_no_secret_is_saved(minimal: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_STORE_SECRET", "hunter2hunter2")
    monkeypatch.setenv("RECIPE_FOLDER", "not-hidden")
    monkeypatch.setenv("PWD", "/data/somebody")  # of every shell; no password
    monkeypatch.setenv("MYSQL_PWD", "hunter2hunter2too")
    config = load_config(
        minimal,
        [
            "train_loader.streams.main.remote=s3://hunter2hunter2/a",
            "eval_loader.streams.main.remote=https://user:letmein@host/a?X-Amz-Signature=abcdef&part=2",
            "loggers.wandb.init_kwargs={settings: {api_key: sesame}, notes: hunter2hunter2}",
            "run_folder=${oc.env:RECIPE_FOLDER}",
            "model.pretrained_model_name_or_path=/data/somebody/base",
            "load_path=hunter2hunter2too.pt",
        ],
    )
    save_config(config, tmp_path / "config.yaml")
    text = (tmp_path / "config.yaml").read_text()
    for secret in ("hunter2", "letmein", "abcdef", "sesame"):
        assert secret not in text
    saved = yaml.safe_load(text)
    assert saved["train_loader"]["streams"]["main"]["remote"] == "s3://<redacted>/a"
    assert saved["eval_loader"]["streams"]["main"]["remote"] == (
        "https://<redacted>@host/a?X-Amz-Signature=<redacted>&part=2"
    )
    assert saved["run_folder"] == "not-hidden"
    assert saved["model"]["pretrained_model_name_or_path"] == "/data/somebody/base"


def test_only_secret_names_are_redacted() -> None:
    kept = {"max_new_tokens": 5, "memory_keys": {"a": "b"}, "hotkeys": "x", "token": None, "monkey": "y"}
    assert redact(kept) == kept
    hidden = redact({"apiKey": "x", "HF_TOKEN": 3, "nested": [{"password": {"a": 1}}]})
    assert hidden == {"apiKey": "<redacted>", "HF_TOKEN": "<redacted>", "nested": [{"password": "<redacted>"}]}


def test_a_section_that_refers_to_another_leaves_it_alone(tmp_path: Path) -> None:
    path = write_yaml(tmp_path, {**MINIMAL, "eval_loader": "${train_loader}"})
    loaded = load_and_check(path, "eval_loader.global_batch_size=7")
    assert loaded.eval_loader.global_batch_size == 7
    assert loaded.train_loader.global_batch_size == load_and_check(path).train_loader.global_batch_size != 7
