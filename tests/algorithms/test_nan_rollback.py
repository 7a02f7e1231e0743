"""A batch that is not finite is no step; weights that are not are put back; bounds end the run."""

import json
import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from composer import Event, State
from composer.loggers import InMemoryLogger
from composer.optim import CosineAnnealingScheduler

from recipe.algorithms.nan_rollback import NaNRollback, TrainingDiverged
from recipe.algorithms.quarantine import AUDIT_FILE
from recipe.config import AnomalyConfig, NaNRollbackConfig, RatioWatchConfig, RunWatchConfig
from tests.algorithms.guarded_run import (
    Do,
    DoBefore,
    TinyBatch,
    assert_equal,
    make_batch,
    make_trainer,
    train,
    trained_state,
)

NAN = float("nan")


def poisoned(index: int) -> TinyBatch:
    """The loss of the second microbatch is NaN."""
    batch = make_batch(index)
    batch["x"][3, 1] = NAN
    return batch


def audit(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / AUDIT_FILE).read_text().splitlines()]


def spoil_gradient(state: State) -> None:
    next(state.model.parameters()).grad[0, 0] = float("inf")  # pyright: ignore[reportOptionalSubscript]


def spoil_weight(state: State) -> None:
    with torch.no_grad():
        next(state.model.parameters())[1, 1] = NAN


def test_a_clean_run_is_one_with_torchs_clipping(tmp_path: Path):
    """Norms of 0.1 to 10: some steps are clipped, some not."""
    batches = [make_batch(index, scale=0.02 * 3**index) for index in range(6)]
    norms: list[float] = []

    def clip(state: State) -> None:
        norms.append(float(torch.nn.utils.clip_grad_norm_(state.model.parameters(), 1.0)))

    guarded, guard = train(batches, tmp_path)
    plain, other = train(batches, tmp_path, clip_norm=None, extras=[Do(Event.AFTER_TRAIN_BATCH, range(6), clip)])
    assert min(norms) < 1 < max(norms)
    for name, value in trained_state(plain).items():
        torch.testing.assert_close(trained_state(guarded)[name], value, rtol=1e-12, atol=1e-14)
    assert guard.num_skipped == other.num_skipped == 0
    assert guard.gradient_norms["total"] == pytest.approx(norms[-1], rel=1e-6)


def test_group_norms(tmp_path: Path):
    """Also of a group that comes as two optimizer groups; before clipping."""
    expected: dict[str, float] = {}

    def note(state: State) -> None:
        parameters = dict(state.model.named_parameters())
        for group, layer in (("first", "model.0"), ("second", "model.2")):
            parts = [
                p.grad.flatten() for name, p in parameters.items() if name.startswith(layer) and p.grad is not None
            ]
            expected[group] = float(torch.cat(parts).norm())

    _, guard = train([make_batch(1)], tmp_path, clip_norm=1e-3, extras=[DoBefore(Event.AFTER_TRAIN_BATCH, [0], note)])
    expected["total"] = (expected["first"] ** 2 + expected["second"] ** 2) ** 0.5
    assert guard.gradient_norms == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("clip_norm", [1.0, None])
@pytest.mark.parametrize("kind", ["loss", "gradient of the loss", "gradient"])
def test_a_bad_batch_is_no_step(tmp_path: Path, kind: str, clip_norm: float | None):
    """Weights, moments, decay and step counts are those of a run whose data never held it."""
    good = [make_batch(index) for index in range(5)]
    bad = {"loss": poisoned(9), "gradient of the loss": make_batch(9, root=0.0), "gradient": make_batch(9)}[kind]
    extras = [DoBefore(Event.AFTER_TRAIN_BATCH, [2], spoil_gradient)] if kind == "gradient" else []
    clean, _ = train(good, tmp_path, clip_norm=clip_norm)
    trainer, guard = train([*good[:2], bad, *good[2:]], tmp_path, clip_norm=clip_norm, extras=extras)
    assert_equal(trained_state(trainer), trained_state(clean))
    assert (guard.num_skipped, guard.num_rollbacks, guard.clip_scale) == (1, 0, 1.0)
    (entry,) = audit(tmp_path)
    every_id = ["9-0", "9-1", "9-2", "9-3"]
    expected = {
        "loss": (["loss_fit", "loss_root", "total"], ["9-2", "9-3"]),
        "gradient of the loss": (["gradient"], every_id),
        "gradient": (["gradient"], every_id),
    }
    assert (entry["terms"], entry["ids"]) == expected[kind]
    assert (entry["batch"], entry["epoch"], entry["rank"], entry["action"]) == (2, 0, 0, "skip")


def test_a_bad_weight_brings_the_snapshot_back(tmp_path: Path):
    """Hit before batch 4, with a snapshot of just then: goes on as if without it, at half the rate and clip norm."""
    batches = [make_batch(index) for index in range(6)]
    config = NaNRollbackConfig(snapshot_interval="2ba")
    hit, guard = train(batches, tmp_path, config=config, extras=[Do(Event.BATCH_START, [4], spoil_weight)])

    def cut(state: State) -> None:
        state.schedulers[0].base_lrs = [lr * 0.5 for lr in state.schedulers[0].base_lrs]
        for group in state.optimizers[0].param_groups:
            group["lr"] *= 0.5
        reference.clip_scale = 0.5

    trainer, reference = make_trainer(
        [*batches[:4], batches[5]], tmp_path / "reference", extras=[Do(Event.BATCH_START, [4], cut)]
    )
    trainer.fit()
    assert_equal(trained_state(hit), trained_state(trainer))
    assert (guard.num_skipped, guard.num_rollbacks, guard.clip_scale, guard.snapshot.batch) == (1, 1, 0.5, 6)
    (entry,) = audit(tmp_path)
    assert (entry["action"], entry["terms"][:2]) == ("rollback", ["weights", "loss_fit"])
    assert guard.quarantine.counts == {}  # not the samples' fault


def test_strikes_bring_the_snapshot_back(tmp_path: Path):
    """Three bad batches in a row after two steps since the snapshot: those are undone. The buffer goes back too."""
    batches = [make_batch(0), make_batch(1), *(poisoned(index) for index in range(10, 13))]
    config = NaNRollbackConfig(snapshot_interval="50ba")
    trainer, guard = train(batches, tmp_path, config=config)
    fresh, _ = make_trainer(batches, tmp_path)
    for name, parameter in fresh.state.model.named_parameters():
        torch.testing.assert_close(trainer.state.model.get_parameter(name), parameter, rtol=0, atol=0)
    assert not trainer.state.optimizers[0].state  # as a fresh one has none
    assert trainer.state.model.get_buffer("model.seen") == 0
    assert int(trainer.state.timestamp.batch) == 5  # time is not turned back
    assert [entry["action"] for entry in audit(tmp_path)] == ["skip", "skip", "rollback"]
    assert (guard.num_skipped, guard.num_rollbacks) == (3, 1)


def test_cuts_survive_the_schedule_and_a_resume_bit_for_bit(tmp_path: Path):
    batches = [make_batch(index) for index in range(8)]
    common: dict[str, Any] = {
        "config": NaNRollbackConfig(snapshot_interval="4ba", lr_factor=0.3, clip_factor=0.1),
        "schedulers": CosineAnnealingScheduler(),
        "save_interval": "3ba",
        "save_filename": "ba{batch}.pt",
        "max_duration": "8ba",
    }
    folder = tmp_path / "whole"
    whole, guard = train(
        batches, tmp_path, extras=[Do(Event.BATCH_START, [2, 6], spoil_weight)], save_folder=str(folder), **common
    )
    rates = [group["lr"] for group in whole.state.optimizers[0].param_groups]
    assert whole.state.schedulers[0].base_lrs == pytest.approx([0.05 * 0.3**2] * 3)
    # Hit at 6: restored is the checkpoint's state of batch 6, in both runs, not that of batch 4.
    resumed, other = train(
        batches,
        tmp_path,
        extras=[Do(Event.BATCH_START, [2, 6], spoil_weight)],
        load_path=str(folder / "ba6.pt"),
        save_folder=str(tmp_path / "part"),
        **common,
    )
    assert_equal(trained_state(resumed), trained_state(whole))
    assert [group["lr"] for group in resumed.state.optimizers[0].param_groups] == rates
    assert resumed.state.schedulers[0].base_lrs == whole.state.schedulers[0].base_lrs
    assert other.state_dict()["state"] == guard.state_dict()["state"]
    assert guard.clip_scale == pytest.approx(0.01) and guard.num_rollbacks == 2


def test_only_strikes_in_a_row_count(tmp_path: Path):
    """And no snapshot is taken between them: what a bad batch did to a buffer is not known."""
    batches = [make_batch(0), poisoned(1), poisoned(2), make_batch(3), poisoned(4), poisoned(5), make_batch(6)]
    _, guard = train(batches, tmp_path, config=NaNRollbackConfig(snapshot_interval="5ba", nan_ratio=None))
    assert (guard.num_skipped, guard.num_rollbacks, guard.snapshot.batch) == (4, 0, 0)


def test_a_rollback_starts_the_watchers_anew(tmp_path: Path):
    """Else a ratio of bad batches that was reached once would bring every one of the next batches back."""
    config = NaNRollbackConfig(strikes=9, nan_ratio=RatioWatchConfig("rollback", 4, 0.5))
    train([poisoned(0), poisoned(1), poisoned(2), make_batch(3)], tmp_path, config=config)
    assert [entry["action"] for entry in audit(tmp_path)] == ["skip", "rollback", "skip"]


def test_what_is_logged(tmp_path: Path):
    """Norms of each batch, what was done only where it was; the watched loss is the mean of the microbatches."""
    memory = InMemoryLogger()
    _, guard = train([make_batch(0), poisoned(1), make_batch(2)], tmp_path, loggers=[memory])
    logged = {name: [float(value) for _, value in rows] for name, rows in memory.data.items()}
    for name in ("first", "second", "total"):
        norms = logged[f"gradient_norm/{name}"]
        assert math.isnan(norms[1]) and norms[2] == guard.gradient_norms[name] > 0
    done = {name: logged[f"nan_rollback/{name}"] for name in ("skipped_batches", "rollbacks", "clip_scale")}
    assert done == {"skipped_batches": [1], "rollbacks": [0], "clip_scale": [1]}
    losses = [reading.loss for reading in guard.watch.readings]
    assert (losses[0], losses[2]) == pytest.approx((logged["loss/train/total"][0], logged["loss/train/total"][2]))


def test_too_many_rollbacks_end_the_run(tmp_path: Path):
    config = NaNRollbackConfig(snapshot_interval="1ba", max_rollbacks=1)
    batches = [make_batch(index) for index in range(8)]
    trainer, guard = make_trainer(
        batches, tmp_path, config=config, extras=[Do(Event.BATCH_START, [2, 5], spoil_weight)]
    )
    with pytest.raises(TrainingDiverged, match=r"batch 5: a rollback is due .*max_rollbacks.*quarantine\.jsonl"):
        trainer.fit()
    assert [entry["action"] for entry in audit(tmp_path)] == ["rollback", "stop"]
    assert guard.num_rollbacks == 1


def test_too_many_skipped_batches_end_the_run(tmp_path: Path):
    """Two in five are allowed, wherever; three are not."""
    config = NaNRollbackConfig(max_skipped=2, skipped_window=5, nan_ratio=None)
    bad = {0, 1, 5, 8, 9}
    batches = [poisoned(index) if index in bad else make_batch(index) for index in range(12)]
    trainer, _ = make_trainer(batches, tmp_path, config=config)
    with pytest.raises(TrainingDiverged, match="batch 9: 3 of the last 5 batches were bad"):
        trainer.fit()


def test_weights_that_are_bad_from_the_start_end_the_run(tmp_path: Path):
    trainer, _ = make_trainer([make_batch(0)], tmp_path)
    spoil_weight(trainer.state)
    with pytest.raises(TrainingDiverged, match="earlier checkpoint"):
        trainer.fit()


def test_a_step_that_spoils_a_weight_is_found_before_it_is_copied_or_saved(tmp_path: Path):
    folder = tmp_path / "checkpoints"
    trainer, guard = train(
        [make_batch(index) for index in range(4)],
        tmp_path,
        extras=[DoBefore(Event.BATCH_END, [2], spoil_weight)],
        save_folder=str(folder),
        save_interval="1ba",
        save_filename="ba{batch}.pt",
    )
    assert guard.num_rollbacks == 1
    assert all(torch.isfinite(value).all() for value in trained_state(trainer).values())
    saved = torch.load(folder / "ba2.pt", weights_only=False)["state"]["model"]
    assert all(torch.isfinite(value).all() for value in saved.values())


@pytest.mark.parametrize(
    ("action", "num_skipped", "num_rollbacks"), [("log", 0, 0), ("skip", 1, 0), ("rollback", 1, 1)]
)
def test_a_watcher_logs_skips_or_rolls_back(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, action: str, num_skipped: int, num_rollbacks: int
):
    config = NaNRollbackConfig(consecutive_zero_losses=RunWatchConfig(action, 2))
    batches = [make_batch(0), make_batch(1, scale=0.0), make_batch(2, scale=0.0), make_batch(3)]
    with caplog.at_level(logging.WARNING, "recipe"):
        _, guard = train(batches, tmp_path, config=config)
    assert f"consecutive_zero_losses ({action})" in caplog.text
    assert (guard.num_skipped, guard.num_rollbacks) == (num_skipped, num_rollbacks)
    if num_skipped:
        assert audit(tmp_path)[0]["terms"] == ["consecutive_zero_losses"]
    assert guard.quarantine.counts == {}


def test_a_sample_that_comes_back_bad_is_quarantined_from_the_next_epoch(tmp_path: Path):
    """Its companions of the microbatch come back with it here, so they go too; the other microbatch stays."""
    batches = [make_batch(0), poisoned(1), make_batch(2)]
    actives: list[list[str]] = []
    trainer, guard = make_trainer(batches, tmp_path, max_duration="3ep")
    trainer.state.callbacks.append(Do(Event.EPOCH_START, range(99), lambda _: actives.append(guard.quarantine.active)))
    trainer.fit()
    assert actives == [[], [], ["1-2", "1-3"]]
    assert guard.quarantine.counts == {"1-2": 3, "1-3": 3}
    again = NaNRollback(NaNRollbackConfig(), None, tmp_path)
    again.load_state_dict(guard.state_dict())
    assert again.quarantine.counts == guard.quarantine.counts
    assert again.quarantine.active == guard.quarantine.active


def test_anomaly_mode_is_on_for_its_window_only(tmp_path: Path):
    seen: list[bool] = []
    note = Do(Event.BEFORE_FORWARD, range(9), lambda _: seen.append(torch.is_anomaly_enabled()))
    config = NaNRollbackConfig(detect_anomaly=AnomalyConfig("1ba", 2))
    train([make_batch(index) for index in range(4)], tmp_path, config=config, extras=[note])
    assert seen == [False, False, True, True, True, True, False, False]
    assert not torch.is_anomaly_enabled()


def test_an_audit_that_cannot_be_written_stops_nobody(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    """Rank 0 alone writes it: the others would wait for ever."""
    (tmp_path / "file").touch()
    with caplog.at_level(logging.WARNING, "recipe"):
        _, guard = train([make_batch(0), poisoned(1), make_batch(2)], tmp_path / "file")
    assert "audit of bad batches could not be written" in caplog.text
    assert "batch 1: skip, because of loss_fit" in caplog.text and guard.num_skipped == 1


def test_a_bad_weight_that_never_trains_ends_the_run(tmp_path: Path):
    """Of a group with rate 0, which is not in the optimizer, and so neither in the snapshot nor in checkpoints."""
    trainer, guard = make_trainer([make_batch(index) for index in range(4)], tmp_path)
    frozen = trainer.state.optimizers[0].param_groups.pop(0)["params"][0]
    scheduler: Any = trainer.state.schedulers[0]
    del scheduler.lr_lambdas[0], scheduler.base_lrs[0]
    trainer.state.callbacks.append(Do(Event.BATCH_START, [2], spoil_weight))
    with pytest.raises(TrainingDiverged, match="never trained are not finite at batch 2"):
        trainer.fit()
    assert not torch.isfinite(frozen).all() and guard.num_rollbacks == 0


def test_a_snapshot_on_disk_is_the_one_in_memory(tmp_path: Path):
    """The same weights and moments after a rollback, bit for bit; its file is gone at the end."""
    ends = []
    for where in ("memory", "disk"):
        config = NaNRollbackConfig(snapshot=where, snapshot_interval="2ba")
        batches = [make_batch(index) for index in range(6)]
        trainer, guard = make_trainer(
            batches, tmp_path / where, config, extras=[Do(Event.BATCH_START, [3], spoil_weight)]
        )
        trainer.fit()
        assert guard.num_rollbacks == 1 and guard.snapshot.batch == 6
        ends.append(trained_state(trainer))
    assert_equal(*ends)
    assert not list((tmp_path / "disk").glob(".snapshot*"))


def test_without_snapshots_a_rollback_ends_the_run(tmp_path: Path):
    config = NaNRollbackConfig(snapshot="off")
    trainer, _ = make_trainer(
        [make_batch(index) for index in range(4)], tmp_path, config, extras=[Do(Event.BATCH_START, [2], spoil_weight)]
    )
    with pytest.raises(TrainingDiverged, match="snapshot is off"):
        trainer.fit()


def test_a_snapshot_that_cannot_be_written_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(*args: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr("recipe.algorithms.snapshot.torch.save", full)
    with pytest.raises(OSError, match=r"\.snapshot-rank0\.pt cannot be written \(No space left.*snapshot=off"):
        train([make_batch(0)], tmp_path, config=NaNRollbackConfig(snapshot="disk"))
    assert not list(tmp_path.glob("*.pt*"))
