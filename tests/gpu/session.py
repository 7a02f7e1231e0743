"""Hold what every part of the measurements shares: device, size, folders, the clock, and where figures go."""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from composer.devices import Device
from composer.utils import get_device


@dataclass(frozen=True)
class Session:
    """Where a part runs.

    Attributes:
        device: cuda or cpu.
        size: 3b, 7b or tiny.
        inputs: Holds `tokenizer` and `images`, if wheels.sh found them.
        folder: Shared by all parts of one run, removed at its end.
    """

    device: str
    size: str
    inputs: Path
    folder: Path

    @property
    def is_cuda(self) -> bool:
        """Return whether the part runs on a GPU."""
        return self.device == "cuda"

    @property
    def precision(self) -> str:
        """Return the precision of the computation, as Composer names it."""
        return "amp_bf16" if self.is_cuda else "fp32"

    def composer_device(self) -> Device:
        """Return Composer's device, which moves modules and batches."""
        return get_device("gpu" if self.is_cuda else "cpu")

    def report(self, name: str, **figures: Any) -> None:
        """Print a line of figures and keep them for the report; a name that comes again replaces the earlier."""
        print(f"  {name}: {', '.join(f'{key} {value}' for key, value in figures.items())}", flush=True)
        with (self.folder / "figures.jsonl").open("a") as file:
            print(json.dumps({name: figures}), file=file)

    def not_run(self, name: str, reason: str) -> None:
        """Report why something was not measured."""
        self.report(name, not_run=reason)

    def now(self) -> float:
        """Return seconds of the wall clock, after the GPU has done all its work."""
        if self.is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    def seconds(self, work: Callable[[], Any], repeats: int = 5, warm_up: int = 2) -> float:
        """Return the median seconds of `work`; on a CPU, where only the code is tested, those of one repeat."""
        if not self.is_cuda:
            repeats, warm_up = 1, min(1, warm_up)
        for _ in range(warm_up):
            work()
        found: list[float] = []
        for _ in range(repeats):
            start = self.now()
            work()
            found.append(self.now() - start)
        return median(found)

    def peak_bytes(self, work: Callable[[], Any]) -> int | None:
        """Return the bytes that `work` needs at its peak beyond what is there; None on a CPU."""
        if not self.is_cuda:
            work()
            return None
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before


def rounded(value: float | None, digits: int = 3) -> float | None:
    """Return a figure of at most `digits` significant digits."""
    return None if value is None else float(f"{value:.{digits}g}")
