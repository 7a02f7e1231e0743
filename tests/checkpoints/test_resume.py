"""`recipe.checkpoints.resume`: what a run starts from, and what it refuses to."""

import logging
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from recipe.checkpoints import resume
from recipe.checkpoints.check import Origin
from recipe.checkpoints.resume import EXCLUDED_ALGORITHMS, HOLDS_BASE
from recipe.config import NEW_RUN, ConfigError, RecipeConfig
from recipe.upstream.trainer_section import view_trainer
from tests.checkpoints.checkpoint_cases import ORIGIN, flip, train, truncate


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    """Of a run that has two checkpoints."""
    train(tmp_path / "run" / "checkpoints", 2)
    return tmp_path / "run"


def config(run_folder: Path, load_path: Path | None = None, autoresume: bool = True, **trainer: Any) -> RecipeConfig:
    path = None if load_path is None else str(load_path)
    return RecipeConfig(run_folder=str(run_folder), load_path=path, autoresume=autoresume, trainer=trainer)


def load_keywords(asked: RecipeConfig, origin: Origin) -> dict[str, Any]:
    return resume.load_keywords(view_trainer(asked), asked.load_path, asked.autoresume, origin)


def weights_keywords(asked: RecipeConfig, origin: Origin) -> dict[str, Any]:
    return resume.weights_keywords(view_trainer(asked), asked.load_path, origin)


def keywords(path: Path | str, weights_only: bool) -> dict[str, Any]:
    excluded = list(EXCLUDED_ALGORITHMS)
    kind = {"load_weights_only": weights_only, "load_exclude_algorithms": excluded, HOLDS_BASE: True}
    return {"load_path": str(path), **kind}


def test_a_first_run_loads_nothing(tmp_path: Path) -> None:
    assert load_keywords(config(tmp_path), ORIGIN) == {"load_path": None, HOLDS_BASE: False}
    assert load_keywords(config(tmp_path, save_folder=None), ORIGIN) == {"load_path": None, HOLDS_BASE: False}


def test_its_own_checkpoint_comes_before_load_path(run_folder: Path, tmp_path: Path) -> None:
    train(tmp_path / "other", 3)
    found = load_keywords(config(run_folder, tmp_path / "other" / "ba3.pt", load_ignore_keys=["rng"]), ORIGIN)
    own = run_folder / "checkpoints" / "ba2.pt"
    assert found == keywords(own, weights_only=False) | {"load_ignore_keys": None}


def test_load_path_of_a_run_of_ours_is_loaded_whole(run_folder: Path, tmp_path: Path) -> None:
    checkpoints = run_folder / "checkpoints"
    asked = config(tmp_path / "new", checkpoints / "latest-rank0.pt")
    assert load_keywords(asked, ORIGIN) == keywords(checkpoints / "ba2.pt", weights_only=False)
    asked = config(tmp_path / "new", checkpoints / "ba1.pt", load_weights_only=True)
    assert load_keywords(asked, ORIGIN) == keywords(checkpoints / "ba1.pt", weights_only=True)


def test_a_folder_that_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    (tmp_path / "exported").mkdir()
    with pytest.raises(ValueError, match=r"exported is a folder without manifest\.json.*pretrained_model_name_or_path"):
        load_keywords(config(tmp_path / "new", tmp_path / "exported"), ORIGIN)


def test_of_a_foreign_one_only_weights(run_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    foreign = tmp_path / "foreign.pt"
    shutil.copy(run_folder / "checkpoints" / "ba1.pt", foreign)
    assert load_keywords(config(tmp_path / "new", foreign), ORIGIN) == keywords(foreign, weights_only=True)
    assert f"{foreign} has no manifest, as one of this recipe would: only its weights are loaded" in caplog.text


def test_an_evaluation_reads_weights_only(run_folder: Path) -> None:
    asked = config(run_folder, run_folder / "checkpoints" / "latest-rank0.pt")
    assert weights_keywords(asked, ORIGIN) == keywords(run_folder / "checkpoints" / "ba2.pt", weights_only=True)


def test_a_broken_load_path_is_refused(run_folder: Path, tmp_path: Path) -> None:
    flip(run_folder / "checkpoints" / "ba1.pt")
    with pytest.raises(ValueError, match=r"load_path .*ba1.pt is broken: .*SHA-256.*: give another checkpoint"):
        weights_keywords(config(run_folder, run_folder / "checkpoints" / "ba1.pt"), ORIGIN)
    with pytest.raises(ValueError, match=r"load_path .*ba1.pt is broken: .*SHA-256.*: give another checkpoint"):
        load_keywords(config(tmp_path / "new", run_folder / "checkpoints" / "ba1.pt"), ORIGIN)


def test_never_from_nothing_where_checkpoints_are(run_folder: Path) -> None:
    for batch in (1, 2):
        truncate(run_folder / "checkpoints" / f"ba{batch}.pt")
    for asked in (config(run_folder), config(run_folder, save_overwrite=True)):
        with pytest.raises(
            ValueError, match=r"holds checkpoints but none to resume from \(ba1.pt, ba2.pt\).*start over with"
        ):
            load_keywords(asked, ORIGIN)
    asked = config(run_folder, autoresume=False, save_overwrite=True)
    assert load_keywords(asked, ORIGIN) == {"load_path": None, HOLDS_BASE: False}


def test_without_autoresume_checkpoints_are_in_the_way(run_folder: Path) -> None:
    with pytest.raises(ValueError, match=r"holds checkpoints \(ba1.pt, ba2.pt\) and autoresume is false: set"):
        load_keywords(config(run_folder, autoresume=False), ORIGIN)


@pytest.mark.parametrize(("then", "now"), [(0.1, 0.0), (0.0, 0.1), (0, 1e-5)])
def test_a_group_frozen_or_thawed_is_refused_and_the_remedies_work(
    run_folder: Path, tmp_path: Path, then: float, now: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = replace(ORIGIN, config={"optimizer": {"lr_llm": then, "lr_vision": 1.0}})
    after = replace(ORIGIN, config={"optimizer": {"lr_llm": now, "lr_vision": 0.5}})
    monkeypatch.setattr("tests.checkpoints.checkpoint_cases.ORIGIN", before)
    train(tmp_path / "frozen" / "checkpoints", 2)
    own = tmp_path / "frozen" / "checkpoints" / "ba2.pt"
    for asked in (config(tmp_path / "frozen"), config(tmp_path / "new", own)):
        with pytest.raises(ConfigError, match=rf"optimizer\.lr_llm is .*set optimizer.lr_llm={then}.*{NEW_RUN}"):
            load_keywords(asked, after)
    load_keywords(config(tmp_path / "frozen"), before)
    assert load_keywords(config(tmp_path / "new", own, load_weights_only=True), after) == keywords(own, True)


def test_the_rate_of_adapters_counts_only_if_there_are_any(
    run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also against a checkpoint that was saved before there was such a rate."""
    old, rate = {"optimizer": {"lr_llm": 0.0}}, {"lr_llm": 0.0, "lr_lora_llm": 0.0}
    monkeypatch.setattr("tests.checkpoints.checkpoint_cases.ORIGIN", replace(ORIGIN, config=old))
    train(tmp_path / "run" / "checkpoints", 2)
    asked = config(tmp_path / "run")
    for lora in (None, {"llm": None, "vision": {"rank": 4}}):
        load_keywords(asked, replace(ORIGIN, config={"optimizer": rate, "lora": lora}))
    with pytest.raises(ConfigError, match=r"optimizer\.lr_lora_llm is 0, but .* was saved with the group trained"):
        load_keywords(asked, replace(ORIGIN, config={"optimizer": rate, "lora": {"llm": {"rank": 4}}}))


def test_changed_keys_are_told(run_folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    changed = replace(ORIGIN, config={"seed": 1, "optimizer": {"lr": 0.2}})
    with caplog.at_level(logging.INFO):
        load_keywords(config(run_folder), changed)
    assert "the configuration differs from that of ba2.pt in optimizer.lr: 0.1 -> 0.2" in caplog.text


@pytest.mark.parametrize("what", ["tokenizer", "model"])
def test_another_tokenizer_or_model_is_refused(run_folder: Path, what: str) -> None:
    changed = replace(ORIGIN, **{what: "other"}, config={"seed": 2, "optimizer": {"lr": 0.1}})
    with pytest.raises(ValueError, match=rf"another {what}.*differ in seed: 1 -> 2: give the {what}"):
        load_keywords(config(run_folder), changed)


def test_the_other_layout_is_refused(run_folder: Path) -> None:
    sharded = {"fsdp": {"state_dict_type": "sharded"}}
    with pytest.raises(ValueError, match=r"ba2.pt is a whole checkpoint .*state_dict_type: full"):
        load_keywords(config(run_folder, parallelism_config=sharded), ORIGIN)


def test_a_resumed_run_may_write_over_what_was_passed_over(run_folder: Path) -> None:
    folder = run_folder / "checkpoints"
    train(folder, 3)
    expected = torch.load(folder / "ba3.pt", weights_only=False)["state"]["model"]
    for batch in (2, 3):
        truncate(folder / f"ba{batch}.pt")
    start = load_keywords(config(run_folder), ORIGIN)
    assert start["load_path"] == str(folder / "ba1.pt")
    train(folder, 3, start["load_path"])
    found = torch.load(folder / "ba3.pt", weights_only=False)["state"]["model"]
    assert all(torch.equal(found[name], value) for name, value in expected.items())
