"""Legs of `fsdp_run.py`, of which only those run that the tests of the session ask for."""

import json
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from convert.write import write_split
from tests.distributed.fsdp_run import Leg
from tests.launches.launch import run_composer
from tests.support.tiny_cases import make_samples

# A step's or evaluation's two halves: in most of them one rank has no image.
SAMPLES = ("two", "text", "unannotated", "text", "crowded", "empty", "one", "other_teacher")


@dataclass(frozen=True)
class Run:
    """What the ranks of a run computed.

    Attributes:
        losses: Of each step, the mean over all microbatches of all ranks.
        flops: Of each step, by rank and part of the model.
        scores: Of each evaluation.
        texts: Of each evaluation, answer and captions by sample.
        shares: Of each evaluation, the probabilities of classes of each object that was described, by sample.
        weights: At the end.
    """

    losses: list[dict[str, Tensor]]
    flops: list[tuple[dict[str, int], ...]]
    scores: list[dict[str, float]]
    texts: list[dict[str, list[str | None]]]
    shares: list[dict[str, list[dict[str, float]]]]
    weights: dict[str, Tensor]


def run_legs(
    request: pytest.FixtureRequest,
    checkpoint: str,
    folder: Path,
    worlds: Mapping[int, Mapping[str, Leg]],
    timeout: float = 1200,
    always: Sequence[str] = (),
    **common: Any,
) -> dict[str, Run]:
    """Run legs in worlds of these sizes, one world after the other; `common` holds for all legs.

    Those run that a parameter of the module's selected tests names, `always`, and what they need: the same run of one
    process, the leg that one begins with, and the uninterrupted run if both are of one mode.
    """
    samples = make_samples()
    numbered = [replace(samples[name], id=f"{index}-{name}") for index, name in enumerate(SAMPLES)]
    write_split(numbered, str(folder / "data"), "train")
    legs = {name: leg for group in worlds.values() for name, leg in group.items()}
    wanted = set(always)
    for item in request.session.items:
        if isinstance(item, pytest.Function) and item.path == request.path and hasattr(item, "callspec"):
            wanted |= legs.keys() & {str(value) for value in item.callspec.params.values()}
    for name in list(wanted):
        wanted.add(one_of(name))
        if begin_with := legs[name].begin_with:
            wanted |= {begin_with} | ({whole_run(name)} if legs[begin_with].mode == legs[name].mode else set())
    found: dict[str, Run] = {}
    for world_size, group in worlds.items():
        settings = []
        for name, leg in group.items():
            if name not in wanted:
                continue
            places = {"checkpoint": checkpoint, "data": str(folder / "data"), "out": str(folder / name)}
            begin_with = leg.begin_with and str(folder / leg.begin_with)
            settings.append(asdict(replace(leg, **places, begin_with=begin_with, **common)))
        path = folder / "legs.json"
        path.write_text(json.dumps(settings))
        run_composer(world_size, Path(__file__).with_name("fsdp_run.py"), str(path), timeout=timeout)
        found |= {name: read_run(folder / name, world_size) for name in group if name in wanted}
    return found


def with_drills(names: Iterable[str], drills: Container[str]) -> list[Any]:
    """Mark those parameters that only `make test-all` runs: CI's tests hold each property once."""
    return [pytest.param(name, marks=pytest.mark.drill) if name in drills else name for name in names]


def one_of(name: str) -> str:
    """The run of one process that a run is to equal."""
    return next((f"one_{kind}" for kind in ("switched", "adapted", "classed") if kind in name), "one")


def whole_run(name: str) -> str:
    """The uninterrupted run that a resumed one has to equal to the bit."""
    return name.partition("_of_")[0].removesuffix("_sharded")


def read_run(folder: Path, world_size: int) -> Run:
    num_microbatches = 2 if world_size == 1 else 4  # of a step
    ranks: list[dict[str, Any]] = [torch.load(folder / f"{rank}.pt") for rank in range(world_size)]
    losses = []
    for parts in zip(*(rank["losses"] for rank in ranks), strict=True):
        losses.append({name: sum(part[name] for part in parts) / num_microbatches for name in parts[0]})
    texts, shares = (
        [{name: found for part in parts for name, found in part.items()} for parts in zip(*rows, strict=True)]
        for rows in ([rank[key] for rank in ranks] for key in ("texts", "shares"))
    )
    flops = list(zip(*(rank["flops"] for rank in ranks), strict=True))
    return Run(losses, flops, ranks[0]["scores"], texts, shares, ranks[0]["weights"])


def assert_same(found: Run, expected: Run) -> None:
    """The same losses in the steps that both made, the same evaluation at the end and the same weights."""
    assert found.losses
    for ours, theirs in zip(reversed(found.losses), reversed(expected.losses), strict=False):
        assert ours.keys() == theirs.keys()
        for name, value in theirs.items():
            # measured: 8.9e-16
            assert float(ours[name]) == pytest.approx(float(value), rel=1e-12, abs=1e-12), name
    # measured: 7.5e-14; the rates are 1e-3
    worst = max(float((found.weights[name] - value).abs().max()) for name, value in expected.weights.items())
    assert found.weights.keys() == expected.weights.keys() and worst <= 1e-12
    assert found.scores[-1] == pytest.approx(expected.scores[-1], rel=1e-6)
    assert found.texts[-1] == expected.texts[-1]
