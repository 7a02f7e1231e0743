"""glibc is told to give freed blocks back for a large model, not for a small one."""

import os
import subprocess
import sys

import pytest
from torch import nn

from recipe.upstream import heap

# In a process of its own: the setting cannot be read back or undone.
SET = """
from torch import nn
from recipe.upstream import heap
heap.LARGE = 8
assert heap.give_back_freed_blocks(nn.Linear(2, 1))
assert not heap.give_back_freed_blocks(nn.Linear(1, 1, bias=False))
"""


def test_a_small_model_changes_nothing() -> None:
    assert not heap.give_back_freed_blocks(nn.Linear(2, 2))


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's mallopt")
def test_blocks_are_mapped_for_a_large_one() -> None:
    without_gpu = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    subprocess.run([sys.executable, "-W", "ignore", "-c", SET], env=without_gpu, check=True)


def test_nothing_is_set_next_to_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heap, "LARGE", 8)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert not heap.give_back_freed_blocks(nn.Linear(2, 1))
