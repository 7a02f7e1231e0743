"""Killed with SIGKILL and resumed, with other workers and world sizes: the same samples in every global step."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from convert.shapes import iter_samples
from convert.write import write_split
from tests.distributed.packed_run import Settings
from tests.launches.launch import run_composer
from tests.support.tiny_cases import CHAT_IN_TURNS, chat_about

NUM_SAMPLES = 33 + 4  # of one image, and of three
STEPS = 12
SCRIPT = Path(__file__).with_name("packed_run.py")


@dataclass(frozen=True)
class Leg:
    """One launch of a run that is killed at its end, but for the last."""

    world_size: int
    num_workers: int
    kill_at: int = 0


@dataclass(frozen=True)
class Run:
    """What all launches of a run leave: the ids of each global step, sorted, and the final weights."""

    steps: list[list[str]]
    answers: list[bool]  # of each global step, whether its conversations hold any
    weights: dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = str(tmp_path_factory.mktemp("data"))
    for split, num_samples, seed in (("train", 45, 1), ("val", 2, 2), ("teachers", 3, 3)):
        samples = list(iter_samples(num_samples, seed, image_size=84, max_objects=5))
        if split == "train":  # the last 12 are in chats about three images each
            groups = (samples[first : first + 3] for first in range(33, 45, 3))
            samples[33:] = [chat_about(f"chat-{group[0].id}", CHAT_IN_TURNS, *group) for group in groups]
        write_split(samples, folder, split)
    return folder


def run(checkpoint: str, data: str, folder: Path, legs: Sequence[Leg], **changes: Any) -> Run:
    """Launches the legs one after the other, each from the checkpoint of the kill before."""
    folder.mkdir()
    settings = Settings(checkpoint, data, str(folder), str(folder / "checkpoints"), steps=STEPS, **changes)
    steps: list[list[str]] = []
    answers: list[bool] = []
    for leg in legs:
        for path in folder.glob("ids-*.jsonl"):
            path.unlink()
        settings = replace(settings, num_workers=leg.num_workers, kill_at=leg.kill_at)
        path = folder / "settings.json"
        path.write_text(json.dumps(asdict(settings)))
        launch = run_composer(leg.world_size, SCRIPT, str(path), timeout=240, check=False)
        assert (launch.returncode == 0) == (leg.kill_at == 0), launch.output
        until = leg.kill_at or STEPS
        rows = list(read_steps(folder, leg.world_size, len(steps), until))
        steps += [ids for ids, _ in rows]
        answers += [has_any for _, has_any in rows]
    return Run(steps, answers, torch.load(folder / "weights.pt"))


def read_steps(folder: Path, world_size: int, first: int, until: int) -> Iterator[tuple[list[str], bool]]:
    """The ids of the global steps `first` to `until`, which are all that a launch made, of all ranks together."""
    ranks = []
    for rank in range(world_size):
        rows = [json.loads(line) for line in (folder / f"ids-{rank}.jsonl").read_text().splitlines()]
        steps = [row["step"] for row in rows]
        assert steps == list(range(first, first + len(steps))), f"rank {rank} began or went on elsewhere: {steps}"
        ranks.append({row["step"]: row for row in rows})
    for step in range(first, until):
        found = [rank[step] for rank in ranks]
        yield sorted(name for row in found for name in row["ids"]), any(row["answers"] for row in found)


@pytest.fixture(scope="module")
def whole(tiny_checkpoint: str, data: str, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """One process, never stopped."""
    return run(tiny_checkpoint, data, tmp_path_factory.mktemp("whole") / "run", [Leg(1, 0)])


@pytest.mark.slow
def test_the_run_never_stopped_trains_on_every_sample_once_an_epoch(whole: Run):
    names = [name for step in whole.steps for name in step]
    epochs = [names[start : start + NUM_SAMPLES] for start in (0, NUM_SAMPLES)]
    assert all(len(set(epoch)) == NUM_SAMPLES for epoch in epochs)
    assert len(names) > 2 * NUM_SAMPLES  # so that kills fall into three epochs


@pytest.mark.slow
def test_killed_twice_and_resumed_ends_with_the_same_weights(
    whole: Run, tiny_checkpoint: str, data: str, tmp_path: Path
):
    killed = run(tiny_checkpoint, data, tmp_path / "run", [Leg(1, 0, kill_at=2), Leg(1, 2, kill_at=7), Leg(1, 0)])
    assert killed.steps == whole.steps
    assert killed.weights.keys() == whole.weights.keys()
    assert all(torch.equal(killed.weights[name], value) for name, value in whole.weights.items())


@pytest.mark.slow
@pytest.mark.world_size(2)
def test_resumed_in_epochs_without_and_with_answers(tiny_checkpoint: str, data: str, tmp_path: Path):
    """The trunk thaws within the second epoch: answers are read from the third on."""
    thaw = "5ba"
    whole = run(tiny_checkpoint, data, tmp_path / "whole", [Leg(1, 0)], thaw=thaw)
    first = whole.answers.index(True)
    assert 5 < first < STEPS - 2 and whole.answers == [False] * first + [True] * (STEPS - first)
    assert len({name for step in whole.steps[:first] for name in step}) == NUM_SAMPLES
    legs = [Leg(1, 2, kill_at=2), Leg(1, 0, kill_at=first + 1), Leg(1, 2)]
    killed = run(tiny_checkpoint, data, tmp_path / "killed", legs, thaw=thaw)
    assert (killed.steps, killed.answers) == (whole.steps, whole.answers)
    assert all(torch.equal(killed.weights[name], value) for name, value in whole.weights.items())
    spread = run(tiny_checkpoint, data, tmp_path / "spread", [Leg(1, 0, kill_at=first - 1), Leg(2, 0)], thaw=thaw)
    assert (spread.steps, spread.answers) == (whole.steps, whole.answers)


@pytest.mark.slow
@pytest.mark.world_size(2)
def test_resumed_with_a_cache_of_the_frozen_trunk(tiny_checkpoint: str, data: str, tmp_path: Path):
    """Killed while it is written and while it is read; two ranks share it. To the bit, and by rounding on two ranks."""

    def cached(name: str, legs: Sequence[Leg], cache: str | None = None) -> Run:
        return run(
            tiny_checkpoint, data, tmp_path / name, legs, frozen_cache=str(tmp_path / (cache or f"{name}_cache"))
        )

    whole = cached("whole", [Leg(1, 0)])
    killed = cached("killed", [Leg(1, 2, kill_at=2), Leg(1, 0, kill_at=8), Leg(1, 2)])
    assert killed.steps == whole.steps and not any(whole.answers)
    assert all(torch.equal(killed.weights[name], value) for name, value in whole.weights.items())
    for name, cache in (("spread", None), ("warm", "whole_cache")):
        spread = cached(name, [Leg(2, 0, kill_at=3), Leg(2, 0)], cache)
        assert spread.steps == whole.steps
        assert max(float((spread.weights[key] - value).abs().max()) for key, value in whole.weights.items()) < 1e-4
    names = [{path.name for path in (tmp_path / f"{name}_cache").glob("*/*")} for name in ("whole", "killed", "spread")]
    assert names[0] == names[1] == names[2] and len(names[0]) == 45


@pytest.mark.slow
@pytest.mark.world_size(2)
def test_resumed_with_augmentation(whole: Run, tiny_checkpoint: str, data: str, tmp_path: Path):
    """To the bit with other workers, and by rounding from one rank to two and back."""

    def augmented(name: str, *legs: Leg) -> Run:
        return run(tiny_checkpoint, data, tmp_path / name, legs, augment=True)

    straight = augmented("straight", Leg(1, 0))
    assert straight.steps != whole.steps  # other lengths, so other packs
    killed = augmented("killed", Leg(1, 2, kill_at=2), Leg(1, 0, kill_at=7), Leg(1, 2))
    assert killed.steps == straight.steps
    assert all(torch.equal(killed.weights[name], value) for name, value in straight.weights.items())
    spread = augmented("spread", Leg(1, 0, kill_at=3), Leg(2, 2, kill_at=6), Leg(1, 0))
    assert spread.steps == straight.steps
    assert max(float((spread.weights[name] - value).abs().max()) for name, value in straight.weights.items()) < 1e-4


@pytest.mark.slow
@pytest.mark.world_size(2)
def test_resumed_on_two_ranks_then_on_one(whole: Run, tiny_checkpoint: str, data: str, tmp_path: Path):
    legs = [Leg(1, 2, kill_at=3), Leg(2, 0, kill_at=6), Leg(1, 0)]
    found = run(tiny_checkpoint, data, tmp_path / "run", legs)
    assert found.steps == whole.steps
    errors = [float((found.weights[name] - value).abs().max()) for name, value in whole.weights.items()]
    assert max(errors) < 1e-4


@pytest.mark.slow
@pytest.mark.world_size(2)
def test_two_ranks_killed_and_resumed_end_with_the_same_weights(
    whole: Run, tiny_checkpoint: str, data: str, tmp_path: Path
):
    straight = run(tiny_checkpoint, data, tmp_path / "straight", [Leg(2, 0)])
    killed = run(tiny_checkpoint, data, tmp_path / "killed", [Leg(2, 2, kill_at=5), Leg(2, 2)])
    assert killed.steps == straight.steps == whole.steps
    assert all(torch.equal(killed.weights[name], value) for name, value in straight.weights.items())
