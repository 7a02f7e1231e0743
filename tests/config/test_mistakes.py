"""Configuration: every mistake is one clear line."""

from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest
from config_cases import MINIMAL, assert_one_line, load_and_check, write_yaml

from recipe.config import ConfigError, RecipeConfig
from recipe.configure import from_command_line, load_config, one_line_errors, parser_of
from recipe.rules import check_config


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
