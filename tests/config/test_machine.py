"""Configuration: what this machine, the model and the data lack is said at the start."""

import json
import shutil
import socket
from contextlib import closing, nullcontext
from dataclasses import replace
from pathlib import Path
from tempfile import gettempdir
from typing import Any

import pytest
from config_cases import MINIMAL, write_yaml

from convert.write import write_split
from recipe.checks import check_adapters, check_machine
from recipe.config import ConfigError
from recipe.configure import load_config
from recipe.schema import Sample

SPLITS = (("train", "train"), ("eval", "val"))
CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
NO_HEAD = [f"loss.weight_{name}=0" for name in ("bbox", "giou", "objectness", "caption")]
NO_TRUNK = [f"optimizer.lr_{group}=0" for group in ("vision", "merger", "llm")]
TEACHERS = ["teachers.num_teachers=1", "teachers.stream={remote: s3://a/b}"]


def test_workers_need_a_short_temporary_folder(minimal: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The longest one that works is that for which a socket can be made as multiprocessing makes it."""
    monkeypatch.setattr("recipe.checks._folder_problems", lambda where, keywords: [])
    root = gettempdir()
    for length, is_short in ((75, True), (76, False)):
        folder = Path(root, "x" * (length - len(root) - 1))
        monkeypatch.setattr("recipe.checks.gettempdir", lambda folder=folder: str(folder))
        (folder / "pymp-12345678").mkdir(parents=True)
        path = folder / "pymp-12345678" / "listener-12345678"
        try:
            with closing(socket.socket(socket.AF_UNIX)) as one, nullcontext() if is_short else pytest.raises(OSError):
                one.bind(str(path))
        finally:
            shutil.rmtree(folder)
        with nullcontext() if is_short else pytest.raises(ConfigError, match=r"^train_loader\.dataloader\.num_workers"):
            check_machine(load_config(minimal, ["train_loader.dataloader={num_workers: 2}"]), ["train_loader"])
        check_machine(load_config(minimal, ["train_loader.dataloader={num_workers: 0}"]), ["train_loader"])


def test_what_this_machine_lacks_is_reported_together(minimal: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU, and the data: each with its remedy, before anything is built."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    fsdp = ["trainer.precision=amp_bf16", "trainer.parallelism_config={fsdp: {}}", "trainer.device=gpu"]
    with pytest.raises(ConfigError) as raised:
        check_machine(load_config(minimal, fsdp))
    header, *devices, train, evaluation = str(raised.value).split("\n")
    assert header == "5 settings do not fit this machine:"
    assert [line.rpartition("set ")[2].partition(",")[0] for line in devices] == [
        "trainer.device=cpu",
        "trainer.precision=fp32",
        "trainer.parallelism_config=null",
    ]
    assert "train_loader.streams.main.local: data/train does not exist: convert a data set into it" in train
    assert "eval_loader.streams.main.local: data/eval does not exist" in evaluation
    with pytest.raises(ConfigError, match=r"^eval_loader\.streams\.main\.local"):
        check_machine(load_config(minimal), ["eval_loader"])


@pytest.mark.parametrize(
    ("content", "overrides", "expected"),
    [
        (
            {"model_type": "qwen2"},
            [],
            "is of the model type qwen2: give a checkpoint of Qwen2-VL (qwen2_vl), Qwen2.5-VL",
        ),
        (
            {"model_type": "qwen3_vl_moe"},
            [],
            "qwen3_vl_moe (nothing here trains a router of experts): give a checkpoint",
        ),
        (
            {"model_type": "qwen3_5"},
            [],
            "qwen3_5 (its linear attention mixes the samples of a pack): give a checkpoint",
        ),
        ({"model_type": "of_2030"}, [], "is of the model type of_2030: give a checkpoint of Qwen2-VL (qwen2_vl)"),
        ({}, [], "is of the model type None: give a checkpoint of Qwen2-VL (qwen2_vl)"),
        (
            {"model_type": "qwen3_vl"},
            ["lora.vision.targets=[qkv,down_proj]", "optimizer.lr_vision=0"],
            "lora.vision.targets holds 'down_proj', which Qwen3-VL does not have: did you mean proj?",
        ),
    ],
)
def test_a_model_that_is_not_supported_is_refused_at_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: dict[str, str], overrides: list[str], expected: str
) -> None:
    """In one line, before anything is loaded."""
    (tmp_path / "config.json").write_text(json.dumps(content))
    monkeypatch.setattr("recipe.checks.cached_file", lambda name, file: str(tmp_path / file))
    path = write_yaml(tmp_path, MINIMAL)
    config = load_config(path, ["eval_loader.streams.main.remote=s3://a/b", *overrides])
    check_adapters(config)
    with pytest.raises(ConfigError) as raised:
        check_machine(config, ["eval_loader"])
    (line,) = [line for line in str(raised.value).splitlines() if "model" in line or "lora" in line]
    assert expected in line


def test_a_split_that_was_not_converted_is_named(minimal: str, tmp_path: Path) -> None:
    (tmp_path / "data" / "train").mkdir(parents=True)
    (tmp_path / "data" / "train" / "index.json").write_text("{}")
    (tmp_path / "data" / "val").mkdir()
    streams = [f"{name}_loader.streams.main={{local: {tmp_path}/data, split: {split}}}" for name, split in SPLITS]
    with pytest.raises(
        ConfigError, match=rf"^eval_loader\.streams\.main\.local: {tmp_path}/data/val has no index.json"
    ):
        check_machine(load_config(minimal, streams))
    with pytest.raises(ConfigError) as raised:
        mistakes = ["eval_loader.streams.main.split=trian", "model.pretrained_model_name_or_path=nosuch"]
        check_machine(load_config(minimal, [*streams, *mistakes]))
    first, model, split = str(raised.value).splitlines()
    assert first == "2 settings do not fit this machine:"
    assert "model.pretrained_model_name_or_path is 'nosuch', but neither a folder nor the hub has it" in model
    assert f"eval_loader.streams.main.split is 'trian', which {tmp_path}/data lacks: did you mean train?" in split
    check_machine(load_config(minimal, [*streams, "eval_loader.streams.main.split=train"]))
    check_machine(load_config(minimal, [streams[0], "eval_loader.streams.main.remote=s3://a/b"]))


@pytest.mark.parametrize(
    ("objects", "messages", "overrides", "is_taught"),
    [
        (None, None, [], False),
        (None, CHAT[:1], [], False),
        (None, CHAT, ["loss.weight_lm_student=0"], False),
        ((), None, [*NO_HEAD, "prompt.student_answer=false"], False),
        (None, None, TEACHERS, True),
        (None, None, [*TEACHERS, "loss.weight_lm_teacher=0"], False),
        (None, CHAT, [], True),
        ((), None, ["prompt.student_answer=false"], True),
        ((), None, NO_HEAD, True),
        ((), None, [*NO_HEAD, *NO_TRUNK], False),
        (None, CHAT, NO_TRUNK, False),
        ((), None, NO_TRUNK, True),
    ],
)
def test_a_set_that_teaches_nothing_is_refused(
    minimal: str, tmp_path: Path, objects: Any, messages: Any, overrides: list[str], is_taught: bool
) -> None:
    bare, image = [Sample(f"{number}", b"x", 30, 20, None) for number in range(3)], Sample("last", b"x", 30, 20, None)
    last = replace(image, objects=objects, messages=None if messages is None else tuple(messages))
    write_split([*bare, last], str(tmp_path / "data"), "train")
    streams = [f"{name}_loader.streams.main={{local: {tmp_path}/data, split: train}}" for name in ("train", "eval")]
    config = load_config(minimal, [*streams, "trainer.precision=fp32", "trainer.device=cpu", *overrides])
    if is_taught:
        check_machine(config)
    else:
        with pytest.raises(ConfigError, match=r"^train_loader\.streams: none of the 4 samples teaches anything"):
            check_machine(config)
        check_machine(config, ["eval_loader"])


def test_on_a_gpu_a_precision_is_required(minimal: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Composer's own default there is amp_fp16."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    with pytest.raises(ConfigError, match=r"missing trainer\.precision.*amp_bf16"):
        check_machine(load_config(minimal), [])
    check_machine(load_config(minimal, ["trainer.precision=fp32"]), [])
    check_machine(load_config(minimal, ["trainer.device=cpu"]), [])
    with pytest.raises(ConfigError, match=r"amp_bf16 needs a GPU, but trainer\.device is cpu"):
        check_machine(load_config(minimal, ["trainer.device=cpu", "trainer.precision=amp_bf16"]), [])
