"""What is not finite on one of several ranks: all act together, and end as if the batch had never been."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from convert.shapes import iter_samples
from convert.write import write_split
from recipe.algorithms.nan_rollback import DIVERGED
from tests.distributed.legs import with_drills
from tests.distributed.nan_run import CASES, HIT
from tests.launches.launch import run_composer

MODES = {"ddp": 2, "fsdp1": 2, "fsdp2": 2, "ddp_lora": 2, "fsdp2_lora": 2, "hybrid1": 4, "hybrid2": 4}  # ranks of each
DRILLS = ("fsdp2", "ddp_lora", "hybrid1")
SKIPPED = [name for name in CASES if name not in ("weight", "given_up")]
Records = dict[str, list[dict[str, Any]]]


@pytest.fixture(scope="module", params=with_drills(MODES, DRILLS))
def run(request: pytest.FixtureRequest, tiny_checkpoint: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What all ranks wrote, of each case; a rank that waits for another runs into the time limit."""
    out, mode = tmp_path_factory.mktemp("nan"), request.param
    run_composer(MODES[mode], Path(__file__).with_name("nan_run.py"), tiny_checkpoint, str(out), mode, timeout=900)
    return out / mode


def load(run: Path, name: str) -> list[dict[str, Any]]:
    return [torch.load(f"{run}-{name}-{rank}.pt") for rank in range(MODES[run.name])]


def audit(run: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(f"{run}-{name}", "quarantine.jsonl").read_text().splitlines()]


def assert_same_state(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    """Weights, moments and step counts of all ranks, bit for bit."""
    for here, there in zip(found, expected, strict=True):
        assert here["state"].keys() == there["state"].keys()
        assert all(torch.equal(here["state"][name], value) for name, value in there["state"].items())


@pytest.mark.slow
@pytest.mark.world_size(2)
@pytest.mark.parametrize("name", SKIPPED)
def test_a_batch_that_is_bad_on_one_rank_is_no_step_on_any(run: Path, name: str):
    records = load(run, name)
    assert_same_state(records, load(run, "clean"))
    assert all(record["counts"] == (1, 0, 1.0) for record in records)
    assert all(record["blamed"] == records[0]["blamed"] != {} for record in records)


@pytest.mark.slow
@pytest.mark.world_size(2)
def test_a_bad_weight_on_one_rank_brings_the_snapshot_back_on_all(run: Path):
    records = load(run, "weight")
    assert_same_state(records, load(run, "clean_cut"))
    assert all(record["counts"] == (1, 1, 0.5) for record in records)
    assert records[0]["blamed"] == {}


@pytest.mark.slow
@pytest.mark.world_size(2)
def test_all_ranks_give_up_together(run: Path):
    for record in load(run, "given_up"):
        assert f"training diverged at batch {HIT}" in record["message"]
    assert {entry["action"] for entry in audit(run, "given_up")} == {"stop"}


@pytest.mark.slow
@pytest.mark.world_size(2)
def test_the_audit_names_the_rank_and_the_term(run: Path):
    """A gradient that was averaged over ranks is traced through the gradients of the head's outputs."""
    for name, term in (
        ("loss", "loss_giou"),
        ("loss_gradient", "gradient of pred_boxes of layer 1"),
        ("outputs", "pred_boxes of layer 1"),
    ):
        (entry,) = audit(run, name)
        assert (entry["rank"], entry["batch"], entry["action"]) == (MODES[run.name] - 1, HIT, "skip")
        assert term in entry["terms"]
    assert {entry["rank"] for entry in audit(run, "gradient")} == set(range(MODES[run.name]))


@pytest.mark.slow
@pytest.mark.world_size(2)
def test_a_run_that_diverges_ends_with_its_exit_code(tiny_checkpoint: str, tmp_path: Path):
    """Rates that no model stands; the command of the README, on two ranks."""
    for split, count, seed in (("train", 8, 1), ("val", 2, 2)):
        write_split(iter_samples(count, seed, image_size=84, max_objects=2), str(tmp_path), split)
    launch = run_composer(
        2,
        "recipe/train.py",
        "yamls/quickstart.yaml",
        f"run_folder={tmp_path}/run",
        f"model.pretrained_model_name_or_path={tiny_checkpoint}",
        "teachers.num_teachers=0",
        "teachers.stream=null",
        f"train_loader.streams.shapes.local={tmp_path}",
        f"eval_loader.streams.shapes.local={tmp_path}",
        "train_loader.global_batch_size=4",
        "eval_loader.global_batch_size=2",
        "caption_decoder.max_caption_tokens=16",
        "optimizer.lr_llm=1e30",
        "scheduler.t_warmup=0ba",
        "nan_rollback.strikes=1",
        "nan_rollback.max_rollbacks=1",
        check=False,
        forked=False,
    )
    assert launch.returncode == DIVERGED, launch.output
    assert (
        f"a rollback is due after 1, the limit nan_rollback.max_rollbacks. The bad batches are listed in {tmp_path}/run"
        in (launch.output)
    )
    lines = (tmp_path / "run" / "quarantine.jsonl").read_text().splitlines()
    actions = [json.loads(line)["action"] for line in lines]
    assert actions[0] == "rollback" and actions[-1] == "stop"
