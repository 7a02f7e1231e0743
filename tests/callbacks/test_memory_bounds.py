"""Memory bounds and peaks, with the figures of a GPU that is not there."""

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import nn

from recipe.callbacks.memory import GIB, STEPS_BETWEEN, MemoryBounds, MemoryPeaks
from recipe.config import ConfigError

NO_LOGGER = cast(Any, None)


class Gpu:
    """80 GiB, of which `used` hold tensors and `cached` are the allocator's."""

    def __init__(self) -> None:
        self.used = self.cached = 0.0
        self.peak = (0.0, 0.0)
        self.num_releases = 0

    def install(self, monkeypatch: pytest.MonkeyPatch) -> "Gpu":
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (int((80 - self.used - self.cached) * GIB), 80 * GIB))
        monkeypatch.setattr(torch.cuda, "empty_cache", self.release)
        monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", self.reset)
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: int(self.peak[0] * GIB))
        monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda: int(self.peak[1] * GIB))
        return self

    def release(self) -> None:
        self.cached = 0.0
        self.num_releases += 1

    def reset(self) -> None:
        self.peak = (0.0, 0.0)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    return Gpu().install(monkeypatch)


def state_at(step: int, trained: tuple[str, ...] = ("head",), device: str = "gpu") -> Any:
    groups = []
    for name in ("llm", "head"):
        parameter = nn.Parameter(torch.zeros(1), requires_grad=name in trained)
        groups.append({"name": name, "params": [parameter]})
    device_ = SimpleNamespace(name=device, tensor_to_device=lambda tensor: tensor)
    optimizers = [SimpleNamespace(param_groups=groups)]
    return SimpleNamespace(device=device_, timestamp=SimpleNamespace(batch=step), optimizers=optimizers)


def test_a_warning_then_a_release(gpu: Gpu, caplog: pytest.LogCaptureFixture):
    bounds = MemoryBounds(warn_share=0.75, release_share=0.9)
    gpu.used, gpu.cached = 40.0, 19.0
    bounds.batch_end(state_at(1), NO_LOGGER)
    assert not caplog.records
    gpu.cached = 20.0  # just at the bound
    for step in (2, 3):
        bounds.batch_end(state_at(step), NO_LOGGER)
    (warning,) = [record.getMessage() for record in caplog.records]
    assert warning.startswith("GPU memory of rank 0 is 75 % full after step 2 (memory_bounds.warn_share 0.75): lower")
    assert gpu.num_releases == 0
    gpu.cached = 32.0
    bounds.batch_end(state_at(4), NO_LOGGER)
    assert gpu.num_releases == 1
    assert caplog.records[-1].getMessage() == (
        "GPU memory of rank 0 was 90 % full after step 4: released the allocator's cache, now 50 %"
    )


def test_releases_are_bounded(gpu: Gpu, caplog: pytest.LogCaptureFixture):
    bounds = MemoryBounds()
    gpu.used = 80.0  # nothing to give back
    for step in range(1, 2 * STEPS_BETWEEN + 1):
        bounds.batch_end(state_at(step), NO_LOGGER)
    assert gpu.num_releases == 2
    assert len(caplog.records) == 3


def test_without_a_gpu_nothing_is_judged(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture):
    monkeypatch.setattr(torch.cuda, "mem_get_info", None)
    MemoryBounds().batch_end(state_at(1, device="cpu"), NO_LOGGER)
    assert not caplog.records


@pytest.mark.parametrize("shares", [(0.0, 0.9), (0.95, 0.9), (0.9, 1.01), (float("nan"), 0.9)])
def test_shares_out_of_order(shares: tuple[float, float]):
    with pytest.raises(ConfigError, match=r"callbacks.memory_bounds: warn_share is .* and release_share"):
        MemoryBounds(*shares)


def test_each_stage_has_its_peak(gpu: Gpu):
    peaks = MemoryPeaks()
    for step, trained, peak in (
        (0, ("head",), (20.0, 24.0)),
        (1, ("head",), (21.0, 25.0)),
        (2, ("llm", "head"), (38.5, 41.0)),
        (3, ("llm",), (30.0, 41.0)),
    ):
        peaks.batch_start(state_at(step, trained))
        gpu.peak = (max(gpu.peak[0], peak[0]), max(gpu.peak[1], peak[1]))
    assert peaks.describe(peaks.largest(state_at(4))) == (
        "peak GiB per GPU, with the allocator's cache in brackets: 21 (25) from step 0, 38.5 (41) from step 2, "
        "30 (41) from step 3"
    )


def test_a_cpu_has_the_peak_of_the_process(monkeypatch: pytest.MonkeyPatch):
    usage = SimpleNamespace(ru_maxrss=3 * 2**20)  # KiB
    monkeypatch.setattr("recipe.callbacks.memory.resource.getrusage", lambda who: usage)
    monkeypatch.setattr("recipe.callbacks.memory.sys.platform", "linux")
    peaks = MemoryPeaks()
    peaks.batch_start(state_at(0, device="cpu"))
    assert peaks.describe(peaks.largest(state_at(1, device="cpu"))) == "peak 3 GiB per process"
