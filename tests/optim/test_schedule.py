"""Learning rates over time, worked by hand; when stages begin; what a yaml may say of them."""

import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from composer import Time, Timestamp, TimeUnit

from recipe.build import answer_schedule
from recipe.config import (
    GROUPS,
    ConfigError,
    CurveConfig,
    OptimizerConfig,
    RecipeConfig,
    SchedulerConfig,
    StagedFreezingConfig,
    StageEntry,
)
from recipe.configure import load_config
from recipe.optim.groups import GROUP_PATTERNS
from recipe.optim.schedule import (
    RunStage,
    Schedule,
    build_curve,
    build_schedule,
    long_warmups,
    lr_factor,
    run_stages,
    stage_factor,
    trunk_learns,
)
from recipe.rules import check_config, check_fields, check_stages, parse_stages

JOINT = str(Path(__file__).resolve().parents[2] / "yamls" / "joint.yaml")
SEED_SCHEDULE = {
    "llm": [{"from": "0ep", "lr": "frozen"}, {"from": "1ep", "lr": 1.0}, {"from": "0.75dur", "lr": 0.1}],
    "adapter": [{"from": "0ep", "lr": "frozen"}, {"from": "1ep", "lr": 1.0}],
}


def at(epoch: int = 0, batch: int = 0, in_epoch: int = 0, length: int = 10, duration: str = "4ep", **times: Any) -> Any:
    """A training state when a batch starts."""
    timestamp = Timestamp(epoch=epoch, batch=batch, batch_in_epoch=in_epoch, **times)
    return SimpleNamespace(
        timestamp=timestamp, max_duration=Time.from_timestring(duration), dataloader_len=Time.from_batch(length)
    )


def config_of(groups: dict[str, Any], duration: str = "4ep", epochs: int | None = None, **rates: Any) -> RecipeConfig:
    return replace(
        RecipeConfig(),
        optimizer=OptimizerConfig(**rates),
        staged_freezing=StagedFreezingConfig(groups, epochs),
        trainer={"max_duration": duration},
    )


def factor(entries: list[dict[str, Any]], state: Any, duration: str = "4ep") -> float | None:
    config = config_of({"llm": entries}, duration)
    return stage_factor(schedule_of(config).stages["llm"], state)


def schedule_of(config: RecipeConfig) -> Schedule:
    return build_schedule(config.scheduler, config.staged_freezing, config.optimizer)


def stages_of(config: RecipeConfig) -> dict[str, list[StageEntry]]:
    return parse_stages(config.staged_freezing, config.optimizer)


def test_the_groups_are_those_of_the_optimizer():
    assert tuple(GROUP_PATTERNS) == GROUPS


@pytest.mark.parametrize(
    ("name", "batch", "expected"),
    [
        # Two batches of warm-up; then from 1 down to 0.2 in eight.
        ("cosine", 0, 0.0),
        ("cosine", 1, 0.5),
        ("cosine", 2, 1.0),
        ("cosine", 4, 0.2 + 0.8 * (1 + math.cos(math.pi / 4)) / 2),
        ("cosine", 10, 0.2),
        ("linear", 1, 0.5),
        ("linear", 2, 1.0),
        ("linear", 6, 0.6),
        ("linear", 10, 0.2),
        ("constant", 1, 0.5),
        ("constant", 9, 1.0),
    ],
)
def test_curves_with_warm_up_and_floor(name: str, batch: int, expected: float):
    config = replace(config_of({}, "10ba"), scheduler=SchedulerConfig(name, "2ba", 0.2))
    state = at(batch=batch, duration="10ba")
    assert lr_factor(schedule_of(config), "vision", state) == pytest.approx(expected, abs=1e-12)


def test_a_group_has_its_own_curve_and_stages_on_top():
    scheduler = SchedulerConfig("linear", groups={"llm": CurveConfig("constant", "4ba")})
    config = replace(config_of({"llm": [{"from": "6ba", "lr": 0.1}]}, "10ba"), scheduler=scheduler)
    schedule = schedule_of(config)

    def factors(batch: int) -> tuple[float, float]:
        state = at(batch=batch, duration="10ba")
        return lr_factor(schedule, "llm", state), lr_factor(schedule, "merger", state)

    assert factors(2) == pytest.approx((0.5, 0.8))
    assert factors(5) == pytest.approx((1.0, 0.5))
    assert factors(6) == pytest.approx((0.1, 0.4))


def test_the_seed_schedule_at_every_boundary():
    schedule = schedule_of(config_of(SEED_SCHEDULE))
    expected = {(0, 9): (None, None), (1, 0): (1.0, 1.0), (2, 9): (1.0, 1.0), (3, 0): (0.1, 1.0), (3, 9): (0.1, 1.0)}
    for (epoch, in_epoch), factors in expected.items():
        state = at(epoch, epoch * 10 + in_epoch, in_epoch)
        assert (stage_factor(schedule.stages["llm"], state), stage_factor(schedule.stages["adapter"], state)) == factors
    assert lr_factor(schedule, "llm", at(0, 3, 3)) == 0.0
    assert schedule.freezes and not schedule_of(config_of({"llm": [{"from": "1ep", "lr": 0.5}]})).freezes


@pytest.mark.parametrize(
    ("start", "duration", "before", "first"),
    [
        ("3ba", "9ba", {"batch": 2}, {"batch": 3}),
        ("2ep", "4ep", {"epoch": 1, "in_epoch": 9}, {"epoch": 2}),
        ("100sp", "4ep", {"sample": 99}, {"sample": 100}),
        ("5000tok", "4ep", {"token": 4999}, {"token": 5003}),
        # Rounded down, as Composer does: 7.5 batches.
        ("0.75dur", "10ba", {"batch": 6}, {"batch": 7}),
        ("0.29dur", "100ba", {"batch": 28}, {"batch": 29}),
        ("0.5dur", "1000tok", {"token": 499}, {"token": 500}),
        # Whole and part epochs: by epochs and batches within one, however many the others have.
        ("0.75dur", "4ep", {"epoch": 2, "batch": 99, "in_epoch": 12, "length": 13}, {"epoch": 3, "batch": 7}),
        ("0.29dur", "100ep", {"epoch": 28, "in_epoch": 9}, {"epoch": 29}),
        ("0.25dur", "2ep", {"in_epoch": 6, "length": 14}, {"in_epoch": 7, "length": 14}),
        ("0.25dur", "2ep", {"in_epoch": 6, "length": 15}, {"in_epoch": 7, "length": 15}),
    ],
)
def test_when_a_stage_begins(start: str, duration: str, before: dict[str, Any], first: dict[str, Any]):
    entries = [{"from": start, "lr": 0.5}]
    assert factor(entries, at(duration=duration, **before), duration) == 1.0
    assert factor(entries, at(duration=duration, **first), duration) == 0.5


def test_the_last_entry_whose_time_has_come_holds():
    entries = [{"from": "2ba", "lr": 0.5}, {"from": "0ba", "lr": 0.25}]
    assert [factor(entries, at(batch=batch)) for batch in (0, 2)] == [0.25, 0.25]
    entries = [{"from": "0ba", "lr": 0.25}, {"from": "2ba", "lr": "frozen"}, {"from": "4ba", "lr": 2}]
    assert [factor(entries, at(batch=batch)) for batch in (0, 1, 2, 3, 4, 9)] == [0.25, 0.25, None, None, 2.0, 2.0]


def learns(entries: dict[str, Any], state: Any, **rates: Any) -> tuple[bool, bool]:
    """Whether the trunk learns, now and for an epoch that begins now."""
    schedule = answer_schedule(config_of(entries, "4ep", None, **rates))
    assert schedule is not None
    return trunk_learns(schedule, state), trunk_learns(schedule, state, whole_epochs=True)


def test_whether_the_trunk_learns():
    frozen, rates = SEED_SCHEDULE["llm"], {"lr_vision": 0, "lr_merger": 0}
    assert learns({}, None) == (True, True)
    assert learns({}, None, lr_llm=0, **rates) == (False, False)
    assert learns({"llm": frozen}, None) == (True, True)  # the vision tower
    assert learns({"llm": frozen}, None, **rates) == (False, False)
    assert learns({"llm": frozen}, at(epoch=0, in_epoch=9), **rates) == (False, False)
    assert learns({"llm": frozen}, at(epoch=1), **rates) == (True, True)
    both = {"llm": frozen, "vision": [{"from": "1ep", "lr": "frozen"}]}
    assert learns(both, at(epoch=0), lr_merger=0) == learns(both, at(epoch=1), lr_merger=0) == (True, True)
    # Epochs of three batches: 0.05 of four epochs begins with the first batch, whatever length the epoch will have.
    short = {"llm": [{"from": "0ba", "lr": "frozen"}, {"from": "0.05dur", "lr": 1.0}]}
    assert learns(short, at(length=3), **rates) == (True, False)
    assert learns(short, at(epoch=1), **rates) == (True, True)


def test_detection_freeze_epochs_is_short_for_two_lists():
    entries = [{"from": "0ep", "lr": "frozen"}, {"from": "2ep", "lr": 1.0}]
    assert stages_of(config_of({}, epochs=2)) == stages_of(config_of({"adapter": entries, "detection": entries}))
    assert stages_of(config_of({}, epochs=0)) == {}
    assert list(stages_of(config_of({}, epochs=2, lr_adapter=0))) == ["detection"]


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (config_of({"lmm": SEED_SCHEDULE["llm"]}), r"unknown key staged_freezing\.groups\.lmm: did you mean llm"),
        (config_of({"llm": "frozen"}), r"groups\.llm is 'frozen': give a list"),
        (config_of({"llm": []}), r"groups\.llm is \[\]: give a list"),
        (config_of({"llm": [{"from": "0ep"}]}), r"groups\.llm\[0\] is .*: give `from` and `lr`"),
        (config_of({"llm": [{"from": "1.5ep", "lr": 1}]}), r"groups\.llm\[0\]\.from is '1.5ep': .* share of the run"),
        (config_of({"llm": [{"from": "-1ba", "lr": 1}]}), r"llm\[0\]\.from is '-1ba'"),
        (config_of({"llm": [{"from": 3, "lr": 1}]}), r"llm\[0\]\.from is 3"),
        (config_of({"llm": [{"from": "20sec", "lr": 1}]}), r"llm\[0\]\.from is '20sec'"),
        (config_of({"llm": [{"from": "1ep", "lr": -0.1}]}), r"llm\[0\]\.lr is -0.1: it must be frozen, or a factor"),
        (config_of({"llm": [{"from": "1ep", "lr": math.nan}]}), r"llm\[0\]\.lr is nan"),
        (config_of({"llm": [{"from": "1ep", "lr": "Frozen"}]}), r"llm\[0\]\.lr is 'Frozen'"),
        (config_of({"llm": [{"from": "1ep", "lr": True}]}), r"llm\[0\]\.lr is True"),
        (config_of({"llm": [{"from": "0ba", "lr": "frozen"}]}), r"freezes it throughout: set optimizer\.lr_llm=0"),
        (config_of({"adapter": SEED_SCHEDULE["adapter"]}, "1ep"), r"groups\.adapter freezes it throughout"),
        (config_of({}, epochs=4), r"groups\.adapter freezes it throughout"),
        (
            config_of({"llm": [{"from": "1ep", "lr": 1.0, "warmup": "2ba"}]}),
            r"warmup is '2ba': .* unit of `from` \(ep\)",
        ),
        (
            config_of({"llm": [{"from": "1ep", "lr": 1.0, "warmup": "0ep"}]}),
            r"warmup is '0ep': it must be a time above 0",
        ),
        (config_of({"llm": [{"from": "1ep", "lr": "frozen", "warmup": "1ep"}]}), r"a frozen stage has none"),
        (config_of({"adapter": SEED_SCHEDULE["adapter"]}, epochs=1), r"both say when to freeze adapter"),
        (config_of(dict.fromkeys(GROUPS, SEED_SCHEDULE["llm"])), r"at the start, so nothing would train"),
        (config_of({}, epochs=1, lr_vision=0, lr_merger=0, lr_llm=0), r"freezes adapter, detection at the start"),
    ],
)
def test_mistakes_are_named(config: RecipeConfig, expected: str):
    with pytest.raises(ConfigError, match=expected):
        check_fields(config.staged_freezing, "staged_freezing.")
        check_stages(config, config.trainer["max_duration"])


@pytest.mark.parametrize(
    ("entry", "state", "expected"),
    [
        ({"from": "4ba", "warmup": "4ba"}, {"batch": 3}, 0.0),  # frozen
        ({"from": "4ba", "warmup": "4ba"}, {"batch": 4}, 0.0),
        ({"from": "4ba", "warmup": "4ba"}, {"batch": 5}, 0.5 * 1 / 4),
        ({"from": "4ba", "warmup": "4ba"}, {"batch": 8}, 0.5),
        ({"from": "4ba", "warmup": "4ba"}, {"batch": 9}, 0.5),
        # A tenth of forty batches on, over a twentieth of them.
        ({"from": "0.1dur", "warmup": "0.05dur"}, {"batch": 5, "duration": "40ba"}, 0.5 * 1 / 2),
        ({"from": "0.1dur", "warmup": "0.05dur"}, {"batch": 6, "duration": "40ba"}, 0.5),
        # Half an epoch is half of its own batches; so is half of a run of one epoch.
        ({"from": "1ep", "warmup": "1ep"}, {"epoch": 1, "in_epoch": 5, "batch": 15}, 0.5 * 0.5),
        ({"from": "0.5dur", "warmup": "0.5dur"}, {"epoch": 3, "in_epoch": 5, "batch": 35}, 0.5 * 0.75),
    ],
)
def test_a_stage_warms_up(entry: dict[str, Any], state: dict[str, Any], expected: float):
    """Worked by hand; the rate of the curve is constant."""
    config = config_of({"llm": [{"from": "0ba", "lr": "frozen"}, {**entry, "lr": 0.5}]}, state.get("duration", "4ep"))
    config = replace(config, scheduler=SchedulerConfig("constant", "0ba"))
    assert lr_factor(schedule_of(config), "llm", at(**state)) == pytest.approx(expected, abs=1e-12)
    assert stage_factor(schedule_of(config).stages["llm"], at(**state)) in (None, 0.5), "the same stage all along"


@pytest.mark.parametrize(
    ("entries", "expected"),
    [
        ([], 40),
        ([("0dur", "frozen"), ("0.1dur", 1.0)], 36),
        ([("1ep", 0.5), ("2ep", 0)], 20),
        ([("0ba", "frozen"), ("7ba", 1.0), ("30ba", "frozen")], 23),
        ([("50ba", "frozen")], 40),
        ([("100sp", 1.0)], None),
    ],
)
def test_how_many_steps_a_group_learns(entries: list[tuple[str, Any]], expected: int | None):
    """Worked by hand, in four epochs of ten steps."""
    groups = {"llm": [{"from": start, "lr": lr} for start, lr in entries]} if entries else {}
    stages = run_stages(schedule_of(config_of(groups)), ["llm"], 40, {TimeUnit.BATCH: 1, TimeUnit.EPOCH: 10})
    assert (stages and sum(stage.steps for stage in stages if stage.factors.get("llm"))) == expected


def test_the_stages_of_all_groups_by_hand():
    """Two groups whose stages overlap; a step takes four packs. A stage beyond the end of the run has no steps."""
    groups = {
        "llm": [{"from": "0dur", "lr": "frozen"}, {"from": "0.25dur", "lr": 1.0}, {"from": "60ba", "lr": 0.1}],
        "detection": [{"from": "0sp", "lr": "frozen"}, {"from": "80sp", "lr": 1.0}],
    }
    lengths = {TimeUnit.BATCH: 1.0, TimeUnit.SAMPLE: 1 / 4}
    assert run_stages(schedule_of(config_of(groups)), ["llm", "adapter", "detection"], 40, lengths) == [
        RunStage(0, 10, {"adapter": 1.0}),
        RunStage(10, 10, {"llm": 1.0, "adapter": 1.0}),
        RunStage(20, 20, {"llm": 1.0, "adapter": 1.0, "detection": 1.0}),
    ]


def test_joint_yaml_thaws_head_and_language_model_with_a_warm_up():
    config = load_config(JOINT)
    thawed = {"from": "0.05dur", "lr": 1.0, "warmup": "0.05dur"}
    frozen = {"from": "0dur", "lr": "frozen"}
    groups = {"llm": [frozen, thawed, {"from": "0.75dur", "lr": 0.1}], "adapter": [frozen, thawed]}
    assert stages_of(config) == stages_of(config_of({**groups, "detection": groups["adapter"]}, "2000ba"))


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["staged_freezing.groups.llm=frozen"], r"staged_freezing\.groups\.llm is 'frozen'"),
        (["staged_freezing.detection_freeze_epochs=-1"], r"detection_freeze_epochs is -1"),
        (["staged_freezing.detection_freeze_epochs=2"], r"both say when to freeze adapter"),
        (["scheduler.groups.lmm.name=linear"], r"unknown key scheduler\.groups\.lmm: did you mean llm"),
        (["scheduler.groups.llm.name=square"], r"scheduler\.groups\.llm\.name is 'square'"),
        (["scheduler.groups.llm.t_warmup=3"], r"scheduler\.groups\.llm\.t_warmup"),
        (["scheduler.groups.llm.alpha_f=-1"], r"scheduler\.groups\.llm\.alpha_f is -1"),
        (["scheduler.groups.llm.warmup=3ba"], r"unknown key scheduler\.groups\.llm\.warmup .*t_warmup"),
    ],
)
def test_mistakes_on_the_command_line(overrides: list[str], expected: str):
    with pytest.raises(ConfigError, match=expected):
        check_config(load_config(JOINT, overrides))


def test_a_group_may_be_given_on_the_command_line():
    config = load_config(
        JOINT,
        [
            "scheduler.groups.llm={name: constant, t_warmup: 5ba}",
            "staged_freezing.groups.vision=[{from: 2ep, lr: 0.5}]",
        ],
    )
    check_config(config)
    assert config.scheduler.groups == {"llm": CurveConfig("constant", "5ba")}
    assert stages_of(config)["vision"][0].factor == 0.5


def test_null_drops_the_stages_of_a_group():
    overrides = ["optimizer.lr_llm=0", "staged_freezing.groups.llm=null"]
    config = load_config(JOINT, overrides)
    check_config(config)
    assert "llm" not in stages_of(config) and "llm" not in schedule_of(config).stages
    config = load_config(JOINT, overrides[:1])  # a rate of 0 drops them too
    check_config(config)
    assert "llm" not in stages_of(config)


@pytest.mark.parametrize("name", ["cosine", "linear", "constant"])
def test_no_warm_up_fits_a_run_in_any_unit(name: str):
    """Composer compares the units even of a warm-up of nothing."""
    for duration in ("100tok", "100sp", "10ba", "2ep"):
        assert build_curve(CurveConfig(name, "0ba"))(at(duration=duration)) == 1.0


@pytest.mark.parametrize(
    ("t_warmup", "duration", "is_long"),
    [
        *[("9ba", "8ba", True), ("8ba", "8ba", False), ("21ba", "2ep", True), ("1ep", "9ba", True)],
        *[("1ep", "10ba", False), ("1.5dur", "9tok", True), ("1dur", "9tok", False), ("9tok", "8tok", True)],
    ],
)
def test_a_warm_up_longer_than_the_run_is_reported(t_warmup: str, duration: str, is_long: bool):
    config = SchedulerConfig("cosine", "0ba", groups={"llm": CurveConfig("cosine", t_warmup)})
    expected = [f"scheduler.groups.llm.t_warmup {t_warmup}"] if is_long else []
    assert long_warmups(config, Time.from_timestring(duration), batches_per_epoch=10) == expected
