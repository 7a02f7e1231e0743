"""The memory of the loss in chunks, measured at a size that takes seconds: at most an eighth of full logits."""

import pytest

from tests.benchmarks.lm_loss import lm_loss


def test_an_eighth_of_the_memory(capsys: pytest.CaptureFixture[str]):
    found = lm_loss(4096, 16, 20_000, cases=("float32 trained",))
    # measured: 0.06 to 0.08; the time is not judged at this size
    assert 0 < found["lm_loss_memory_ratio"] <= 1 / 8  # pyright: ignore[reportOperatorIssue]
    assert len(capsys.readouterr().out.splitlines()) == 2
