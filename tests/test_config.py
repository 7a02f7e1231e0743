"""Configuration: what is merged, what is saved, and that every mistake is one clear line."""

import json
import shutil
import socket
from collections.abc import Iterator
from contextlib import closing, nullcontext
from dataclasses import asdict, fields, is_dataclass, replace
from pathlib import Path
from tempfile import gettempdir
from typing import Any

import pytest
import yaml

from convert.write import write_split
from recipe.checks import check_adapters, check_libraries, check_machine
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
from recipe.configure import expand_home, from_command_line, load_config, one_line_errors, parser_of, save_config
from recipe.redact import redact
from recipe.rules import check_config, parse_stages
from recipe.schema import Sample

SPLITS = (("train", "train"), ("eval", "val"))
YAMLS = Path(__file__).resolve().parents[1] / "yamls"
MINIMAL: dict[str, Any] = {
    "run_folder": "runs/test",
    "model": {"pretrained_model_name_or_path": "tiny"},
    "train_loader": {"streams": {"main": {"local": "data/train"}}, "global_batch_size": 8},
    "eval_loader": {"streams": {"main": {"local": "data/eval"}}, "global_batch_size": 8},
    "trainer": {"max_duration": "2ep"},
}
# Of removed keys, not their defaults.
OTHER_VALUES = {
    "matcher.cost_caption": 0.5,
    "caption_decoder.tie_word_embeddings": False,
    "evaluation.num_beams": 4,
    "evaluation.length_penalty": 0.7,
}


@pytest.fixture(autouse=True)
def any_model(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Every name is a Qwen2.5-VL's, except `nosuch`."""
    folder = tmp_path_factory.mktemp("model")
    (folder / "config.json").write_text('{"model_type": "qwen2_5_vl"}')

    def find(name: str, file: str) -> str:
        if name == "nosuch":
            raise OSError("nosuch is not a local folder")
        return str(folder / file)

    monkeypatch.setattr("recipe.checks.cached_file", find)


@pytest.fixture
def minimal(tmp_path: Path) -> str:
    return write_yaml(tmp_path, MINIMAL)


def write_yaml(folder: Path, content: object) -> str:
    path = folder / "run.yaml"
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content), encoding="utf-8")
    return str(path)


def load_and_check(path: str, *overrides: str) -> RecipeConfig:
    config = load_config(path, overrides)
    check_config(config)
    check_libraries(config)
    return config


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


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("a: [1", "is not a yaml file"),
        ("a: 1\na: 2", "is not a yaml file"),
        ("- 1\n- 2", "must hold"),
        ("run_folder: x\nmodel: 3", "model in .*run.yaml is 3"),
        ("trainer:", "trainer in .*run.yaml is None"),
        ("loss: [1]", "loss in .*run.yaml"),
    ],
)
def test_bad_yaml(tmp_path: Path, content: str, expected: str) -> None:
    assert_one_line(write_yaml(tmp_path, content), [], expected)


def test_missing_yaml(tmp_path: Path) -> None:
    assert_one_line(str(tmp_path / "no.yaml"), [], "cannot read .*no.yaml: No such file")
    assert_one_line(str(tmp_path), [], "cannot read .*: Is a directory")


def test_all_missing_values_are_named(tmp_path: Path) -> None:
    assert_one_line(
        write_yaml(tmp_path, {"trainer": {"max_duration": "1ep"}}),
        [],
        "missing eval_loader.global_batch_size, eval_loader.streams, model.pretrained_model_name_or_path, run_folder, "
        "train_loader.global_batch_size, train_loader.streams: set in",
    )


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        # unknown keys, at every depth
        ("sead=1", "unknown key sead in the command line: did you mean seed"),
        ("detection_head.num_querys=5", "unknown key detection_head.num_querys .*: did you mean num_queries"),
        ("num_queries=5", "unknown key num_queries .*: did you mean detection_head.num_queries"),
        ("loss.zzz=5", "unknown key loss.zzz .*: one of: focal_alpha, "),
        ("trainer.max_duratoin=1ep", "unknown key trainer.max_duratoin: did you mean max_duration"),
        ("train_loader.streams.main.locl=x", "unknown key train_loader.streams.main.locl: did you mean local"),
        ("train_loader.dataset.shufle=true", "unknown key train_loader.dataset.shufle: did you mean shuffle"),
        ("eval_loader.dataloader.num_worker=1", "unknown key eval_loader.dataloader.num_worker: did you mean num_work"),
        ("callbacks.lr_moniter={}", "unknown key callbacks.lr_moniter: did you mean lr_monitor"),
        ("callbacks.speed_monitor.window=3", "unknown key callbacks.speed_monitor.window: did you mean window_size"),
        ("callbacks.lr_monitor.x=3", "unknown key callbacks.lr_monitor.x: it takes none"),
        ("callbacks.memory_bounds={warn_share: 2}", "callbacks.memory_bounds: warn_share is 2 and release_share 0.95"),
        ("callbacks.nan_monitor={}", "callbacks.nan_monitor cannot be set: leave it out"),
        ("callbacks.early_stopper.monitor=x", "missing callbacks.early_stopper.dataloader_label"),
        ("loggers.wanb={}", "unknown key loggers.wanb: did you mean wandb"),
        ("loggers.json_lines.file=x", "unknown key loggers.json_lines.file"),
        ("loggers.wandb=3", "loggers.wandb is 3"),
        # a list where a mapping is expected, and the reverse
        ("optimizer.betas={b: 1}", "optimizer.betas in the command line is .*: give it a list"),
        ("optimizer.betas.0=0.8", "optimizer.betas in the command line is .*: give it a list"),
        ("prompt.candidate_phrases={a: cat}", "prompt.candidate_phrases in .*: give it a list"),
        ("eval_loader.streams=[a]", r"eval_loader.streams in the command line is \['a'\]: give it `key: value` lines"),
        ("scheduler.groups=[a]", "scheduler.groups in the command line"),
        ("train_loader.dataloader=[2]", "train_loader.dataloader in the command line"),
        (
            "callbacks.early_stopper={monitor: x, dataloader_label: test}",
            "dataloader_label is 'test': only eval has metrics",
        ),
        # metrics
        ("save_best.metric=metrics/eval/box_ap50", "save_best.metric is .*: did you mean eval/box_ap50"),
        ("save_best.metric=eval/box_ap_50", "save_best.metric is .*: did you mean eval/box_ap"),
        (
            "callbacks.early_stopper={monitor: eval/box_ap, dataloader_label: eval}",
            "monitor is .*: did you mean box_ap",
        ),
        # unreadable arguments
        ("seed", "cannot read the argument 'seed'"),
        ("--seed=1", "cannot read the argument '--seed=1'"),
        ("loss..x=1", "cannot read the argument"),
        ("trainer.x=[1", "cannot read the value of trainer.x: "),
        # wrong types
        ("seed=abc", "wrong value of seed in the command line: Value 'abc'"),
        ("detection_head.num_queries=2.5", "wrong value of detection_head.num_queries"),
        ("detection_head.aux_loss=perhaps", "wrong value of detection_head.aux_loss"),
        ("optimizer.betas=[0.9,x]", "wrong value of optimizer.betas"),
        ("train_loader.streams=null", "train_loader.streams is empty: name at least one"),
        ("val_fraction=1", "val_fraction is 1.0: it must be above 0 and below 1"),
        ("val_fraction=0.1", "val_fraction and eval_loader.streams both choose .*: set one of them to null"),
        ("train_loader.streams=abc", "wrong value of train_loader.streams"),
        ("run_folder=${oc.env:RECIPE_NO_SUCH_VARIABLE}", "run_folder: .*RECIPE_NO_SUCH_VARIABLE"),
        ("run_folder=${nothing}", "run_folder: .*nothing"),
        # values
        ("model.attn_implementation=flash", "model.attn_implementation is 'flash': it must be one of auto, "),
        ("model.dtype=fp16", "model.dtype is 'fp16'"),
        ("train_loader.collator=stacked", "train_loader.collator is 'stacked'"),
        ("prompt.box_coordinates=relative", "prompt.box_coordinates is 'relative'"),
        ("optimizer.lr_scaling=log", "optimizer.lr_scaling is 'log'"),
        ("scheduler.name=step", "scheduler.name is 'step'"),
        ("scheduler.t_warmup=5", "scheduler.t_warmup is '5'"),
        ("scheduler.t_warmup=500tok", "scheduler.t_warmup is '500tok', which does not compare with .*0.1dur"),
        ("scheduler.t_warmup=30sec", "scheduler.t_warmup is '30sec', which does not compare"),
        ("scheduler.groups.llm={name: linear, t_warmup: 9sp}", "scheduler.groups.llm.t_warmup is '9sp', which does"),
        ("prompt.candidate_phrases=[{a: cat}]", r"prompt.candidate_phrases is \[\{'a': 'cat'\}\]: .* plain list"),
        ("optimizer.betas=[[0.9], 0.9]", "optimizer.betas is .* plain list"),
        ("optimizer.lr_llm=-1e-5", "optimizer.lr_llm is -1e-05: it must be 0 or more"),
        ("optimizer.lr_llm=.nan", "optimizer.lr_llm is nan"),
        ("optimizer.lr_llm=.inf", "optimizer.lr_llm is inf"),
        ("optimizer.betas=[0.9]", "optimizer.betas is"),
        ("evaluation.score_threshold=1.5", "evaluation.score_threshold is 1.5: it must be between 0 and 1"),
        ("evaluation.score_scale=0", "evaluation.score_scale is 0.0: it must be above 0"),
        ("evaluation.score_scale=.inf", "evaluation.score_scale is inf: it must be above 0"),
        ("evaluation.score_shift=-.inf", "evaluation.score_shift is -inf: it must be a finite number"),
        ("evaluation.nms_iou=1.1", "evaluation.nms_iou is 1.1: it must be between 0 and 1"),
        ("teachers.teacher_ratio=-0.1", "teachers.teacher_ratio is -0.1"),
        ("train_loader.global_batch_size=0", "train_loader.global_batch_size is 0"),
        ("max_seq_len=0", "max_seq_len is 0"),
        # combinations
        ("teachers.num_teachers=2", "teachers.num_teachers is 2 but teachers.stream is null"),
        ("teachers.stream={local: x, spit: y}", "unknown key teachers.stream.spit: did you mean split"),
        ("optimizer.lr_scaling=linear", "optimizer.reference_tokens is missing"),
        ("detection_head.width=30", "detection_head.width 30 is not a multiple of detection_head.num_heads 8"),
        ("detection_head.box_noise=0", "detection_head.box_noise is 0.0: give above 0, or num_denoising_groups: 0"),
        (
            "detection_head.multi_scale=false",
            "detection_head.select_queries .* set select_queries=false, or ",
        ),
        ("image={min_pixels: 9, max_pixels: 4}", "image.min_pixels 9 is above image.max_pixels 4: "),
        ("load_path=no/such.pt", "load_path no/such.pt does not exist"),
        ("train_loader.streams.b={split: x}", "train_loader.streams.b has neither local nor remote"),
        ("train_loader.streams.b=null", "train_loader.streams.b is None"),
        # what the recipe owns
        ("trainer.device_train_microbatch_size=auto", "trainer.device_train_microbatch_size: auto breaks"),
        ("trainer.device_train_microbatch_size=0", "trainer.device_train_microbatch_size is 0"),
        ("trainer.max_epochs=4", "trainer.max_epochs cannot be set: set `max_duration`, such as 4ep"),
        ("trainer.max_steps=9", "trainer.max_steps cannot be set: set `max_duration` in batches"),
        # a part of a set that is read as a whole, and nothing at all
        ("eval_loader.streams.main.repeat=3", "eval_loader.streams.main.repeat is 3, but every sample is read once"),
        ("eval_loader.dataset.epoch_size=5", "eval_loader.dataset.epoch_size is 5, but .*eval_subset_num_batches"),
        ("teachers.stream={local: x, choose: 4}", "teachers.stream.choose is 4, but every sample is read once"),
        ("train_loader.streams.main.choose=0", "train_loader.streams.main.choose is 0, which leaves no samples"),
        ("train_loader.dataset.epoch_size=0", "train_loader.dataset.epoch_size is 0, which leaves no samples"),
        ("trainer.eval_subset_num_batches=0", "trainer.eval_subset_num_batches is 0: it must be 1 or more"),
        ("trainer.max_duration=0ep", "trainer.max_duration is '0ep': nothing would train"),
        ("trainer.seed=1", "trainer.seed cannot be set: set `seed`"),
        ("trainer.load_path=x", "trainer.load_path cannot be set: set `load_path`"),
        ("trainer.callbacks=x", "trainer.callbacks cannot be set: set the section `callbacks`"),
        ("trainer.accumulate_train_batch_on_tokens=true", "trainer.accumulate_train_batch_on_tokens cannot be set"),
        ("trainer.parallelism_config={fsdp2: {}}", "trainer.parallelism_config.fsdp2 is ignored by Composer"),
        ("trainer.parallelism_config={ddp: {}}", "a key of trainer.parallelism_config is 'ddp'"),
        ("trainer.parallelism_config=3", "trainer.parallelism_config is 3"),
        ("trainer.save_folder=runs/{run_name}", "trainer.save_folder.* gives 'runs/{run_name}': write the name out"),
        ("run_folder=runs/{run_name}", "or run_folder, gives 'runs/{run_name}/checkpoints': write the name out"),
        ("trainer.save_num_checkpoints_to_keep=0", "trainer.save_num_checkpoints_to_keep is 0: it must be 1 or more"),
        ("trainer.save_num_checkpoints_to_keep=two", "trainer.save_num_checkpoints_to_keep is 'two'"),
        ("trainer.save_ignore_keys=[state/optimizers]", "trainer.save_ignore_keys: a run cannot resume exactly"),
        ("trainer.precision=fp16", "trainer.precision is 'fp16'"),
        ("trainer.max_duration=soon", "trainer.max_duration is 'soon'"),
        ("trainer.save_interval=-1ba", "trainer.save_interval is '-1ba'"),
        ("trainer.max_duration='7'", "trainer.max_duration is '7'"),
        ("trainer.max_duration=true", "trainer.max_duration is True"),
        ("trainer.eval_interval=1xx", "trainer.eval_interval is '1xx'"),
        ("train_loader.dataset.batch_size=3", "train_loader.dataset.batch_size cannot be set: set `global_batch_size`"),
        ("train_loader.dataset.local=x", "train_loader.dataset.local cannot be set: set it in one of `streams`"),
        ("train_loader.dataloader.shuffle=true", "train_loader.dataloader.shuffle cannot be set"),
    ],
)
def test_every_mistake_is_one_clear_line(minimal: str, override: str, expected: str) -> None:
    assert_one_line(minimal, [override], expected)


def test_nothing_to_train(minimal: str) -> None:
    zero = [f"optimizer.lr_{name}=0" for name in ("vision", "merger", "llm", "adapter", "detection")]
    assert_one_line(minimal, zero, "optimizer.lr_\\*: all are 0")
    check_config(load_config(minimal, zero[1:]))
    weights = ("lm_teacher", "lm_student", "bbox", "giou", "objectness", "caption")
    assert_one_line(minimal, [f"loss.weight_{name}=0" for name in weights], "loss.weight_\\*: all are 0")


def test_max_duration_is_required(minimal: str) -> None:
    config = load_config(minimal)
    del config.trainer["max_duration"]
    with pytest.raises(ConfigError, match=r"missing trainer\.max_duration"):
        check_config(config)


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


def test_batch_is_shared_by_the_ranks(minimal: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert_one_line(minimal, [], "train_loader.global_batch_size 8 cannot be shared by 3 ranks")


def sections_of(section: Any) -> Iterator[Any]:
    yield section
    for entry in fields(section):
        if is_dataclass(value := getattr(section, entry.name)):
            yield from sections_of(value)


def test_every_default_obeys_the_rule_next_to_it(minimal: str) -> None:
    check_config(load_config(minimal))
    rules = [entry for section in sections_of(RecipeConfig()) for entry in fields(section) if entry.metadata]
    assert len(rules) > 70
    numbers = [
        entry for section in sections_of(RecipeConfig()) for entry in fields(section) if entry.type in (int, float)
    ]
    assert [entry.name for entry in numbers if not entry.metadata] == ["seed"]


@pytest.mark.parametrize("key", ["ema={half_life: 0ba}", "nan_rollback.detect_anomaly.batches=0"])
def test_sections_that_may_be_null_are_judged_too(minimal: str, key: str) -> None:
    assert_one_line(minimal, [key], key.split("=")[0])


def test_command_line_prints_one_line_and_exits_2(minimal: str, capsys: pytest.CaptureFixture[str]) -> None:
    parser = parser_of("x YAML", "what", "examples")
    assert from_command_line(parser, [minimal, "seed=5"])[0].seed == 5
    for arguments in ([], ["seed=1"], [minimal, "sead=1"], [minimal, "model.dtype=x"], [minimal, "--seed=1"]):
        with pytest.raises(SystemExit) as exit_info, one_line_errors():
            from_command_line(parser, arguments)
        assert exit_info.value.code == 2
        assert len(capsys.readouterr().err.strip().splitlines()) == 1
    with pytest.raises(SystemExit), one_line_errors():
        from_command_line(parser, [minimal], required=["load_path"])
    assert capsys.readouterr().err == "configuration error: missing load_path: add load_path=VALUE to the command\n"


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


CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
NO_HEAD = [f"loss.weight_{name}=0" for name in ("bbox", "giou", "objectness", "caption")]
NO_TRUNK = [f"optimizer.lr_{group}=0" for group in ("vision", "merger", "llm")]
TEACHERS = ["teachers.num_teachers=1", "teachers.stream={remote: s3://a/b}"]


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


def assert_one_line(path: str, overrides: list[str], expected: str) -> None:
    with pytest.raises(ConfigError, match=expected) as raised:
        load_and_check(path, *overrides)
    assert "\n" not in str(raised.value)


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


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("lora.llm.rnak=8", r"unknown key lora\.llm\.rnak .*: did you mean rank\?"),
        ("lora.text.rank=8", r"unknown key lora\.text"),
        ("lora.llm.rank=0", r"lora\.llm\.rank is 0: it must be 1 or more"),
        ("lora.llm.alpha=0", r"lora\.llm\.alpha is 0\.0: it must be above 0"),
        ("lora.vision.dropout=1", r"lora\.vision\.dropout is 1\.0: it must be"),
        ("lora.llm.targets=q_proj", r"lora\.llm.*targets"),
        ("lora=true", r"lora"),
    ],
)
def test_wrong_adapters_are_named(tmp_path: Path, override: str, expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        load_and_check(write_yaml(tmp_path, MINIMAL), override)


WORDS = ["on", "Off", "no", "yes", "y", "TRUE", "null", "~", "7", "1.50", "0x1F", "1_000", "2026-11-27", "a cat"]


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
