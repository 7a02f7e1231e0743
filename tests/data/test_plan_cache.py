"""The node's cache of plans: made once, and never by other code than the one that reads it."""

import os
import time
from pathlib import Path

import numpy as np
import pytest

from recipe.data import plan as plan_cache
from recipe.data.plan import Plan, cached_plan, plan_samples


def make() -> Plan:
    return plan_samples(np.array([2, 0, 1]), np.arange(3) + 10, 1)


def fail() -> Plan:
    raise ValueError("made anew")


def test_made_once():
    assert cached_plan("key", make).digest() == make().digest()
    assert cached_plan("key", fail).digest() == make().digest()
    with pytest.raises(ValueError, match="made anew"):
        cached_plan("another", fail)
    assert cached_plan("another", make).digest() == make().digest()


def test_a_plan_of_other_code_is_not_read(monkeypatch: pytest.MonkeyPatch):
    cached_plan("key", make)
    monkeypatch.setattr(plan_cache, "_code_digest", lambda: "other")
    with pytest.raises(ValueError, match="made anew"):
        cached_plan("key", fail)


def test_old_plans_are_removed(tmp_path: Path):
    cached_plan("key", make)
    folder = Path(tmp_path, f"recipe-plans-{os.getuid()}")
    for path in folder.iterdir():
        os.utime(path, (0, time.time() - 25 * 3600))
    cached_plan("another", make)
    assert [path.name.split("-")[0] for path in folder.glob("*.npz")] == ["another"]


def test_a_damaged_plan_is_made_anew(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    cached_plan("key", make)
    (path,) = Path(tmp_path, f"recipe-plans-{os.getuid()}").glob("*.npz")
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[whole.index(make().samples.tobytes())] ^= 1
    for damaged in (b"", whole[:-30], flipped):
        path.write_bytes(damaged)
        assert cached_plan("key", make).digest() == make().digest()
        assert f"{path} is damaged" in caplog.text
        caplog.clear()
    assert cached_plan("key", fail).digest() == make().digest()


def test_a_full_disk_costs_memory(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture):
    def refuse(path: Path, arrays: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(plan_cache, "write_mapped", refuse)
    made = [cached_plan("full", make) for _ in range(2)]
    assert made[0] is not made[1] and made[0].digest() == made[1].digest() == make().digest()
    assert "the plan is not kept" in caplog.text and "No space left" in caplog.text
