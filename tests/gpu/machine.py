"""Report the card and its libraries, and run the tests that need a GPU."""

import pytest
import torch
import transformers
from torch import distributed

from recipe.models.attention import describe_attention
from tests.gpu.measure import ROOT
from tests.gpu.session import Session, rounded

SIDE = {"cuda": 8192, "cpu": 256}


def machine(session: Session) -> None:
    """Report card, versions, attention and the speed of a large matrix product in bfloat16."""
    card, memory, gpus = "cpu", None, 0
    if session.is_cuda:
        found = torch.cuda.get_device_properties(0)
        card, memory, gpus = found.name, rounded(found.total_memory / 2**30, 4), torch.cuda.device_count()
    session.report(
        "machine",
        card=card,
        memory_gib=memory,
        gpus=gpus,
        torch=torch.__version__,
        cuda=torch.version.cuda,  # pyright: ignore[reportAttributeAccessIssue] - it is there
        transformers=transformers.__version__,
        nccl=session.is_cuda and distributed.is_nccl_available(),
        attention=describe_attention("auto"),
    )
    side = SIDE[session.device]
    left, right = (torch.randn(side, side, device=session.device, dtype=torch.bfloat16) for _ in range(2))
    seconds = session.seconds(lambda: left @ right, repeats=10)
    session.report("matrix_product", side=side, tflops_per_s=rounded(2 * side**3 / seconds / 1e12))
    session.not_run("several_gpus", "these measurements use one GPU")


class Outcomes:
    """Counts tests, for pytest."""

    def __init__(self):
        self.passed: list[str] = []
        self.failed: list[str] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Count a test's set-up, call or end."""
        if report.failed:
            self.failed.append(report.nodeid)
        elif report.when == "call" and report.passed:
            self.passed.append(report.nodeid)


def gpu_tests(session: Session) -> None:
    """Run the tests that are marked `gpu`."""
    if not session.is_cuda:
        session.not_run("tests", "they need CUDA")
        return
    outcomes = Outcomes()
    tests = [str(ROOT / "tests" / "gpu"), "-m", "gpu", "-p", "no:cacheprovider", "--tb=short", "--rootdir", str(ROOT)]
    status = pytest.main(tests, plugins=[outcomes])
    session.report("tests", passed=len(outcomes.passed), failed=outcomes.failed)
    if status:
        raise SystemExit(int(status))
