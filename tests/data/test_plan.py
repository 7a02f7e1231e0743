"""The plan of an epoch: every sample once, within budget, on its canonical node, the same at any world size."""

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from recipe.data import pack_many
from recipe.data import plan as planning
from recipe.data.pack_many import pack_chunks
from recipe.data.plan import (
    WINDOWS_PER_CHUNK,
    Budget,
    Plan,
    assign_packs,
    assign_to_worker,
    plan_packs,
    plan_samples,
)

BUDGET = Budget(max_tokens=100, max_patches=None, window=64)


def make_plan(num_samples: int = 500, num_canonical_nodes: int = 1, budget: Budget = BUDGET, **changes: Any) -> Plan:
    rng = np.random.default_rng(0)
    tokens = rng.integers(3, 60, num_samples)
    arguments = {
        "order": rng.permutation(num_samples),
        "samples": np.arange(num_samples) + 7,
        "tokens": tokens,
        "patches": np.minimum(tokens, rng.integers(0, 40, num_samples)) * 4,
        "num_canonical_nodes": num_canonical_nodes,
        "budget": budget,
        "seed": 3,
        "epoch": 0,
    }
    return plan_packs(**{**arguments, **changes})


def packs_of(plan: Plan) -> list[list[int]]:
    return [plan.occurrences[a:b].tolist() for a, b in zip(plan.offsets[:-1], plan.offsets[1:], strict=True)]


def test_a_plan_worked_by_hand():
    plan = make_plan(
        order=np.array([3, 1, 0, 2]),
        samples=np.array([10, 11, 10, 11]),  # each stored sample twice
        tokens=np.array([60, 40, 30, 70]),
        patches=np.zeros(4, dtype=np.int64),
    )
    assert sorted(sorted(pack) for pack in packs_of(plan)) == [[0, 1], [2, 3]]
    assert plan.samples.tolist() == [10 + occurrence % 2 for occurrence in plan.occurrences]
    assert plan.tokens.tolist() == [[60, 40, 30, 70][occurrence] for occurrence in plan.occurrences]
    assert plan.offsets.tolist() == [0, 2, 4]


@pytest.mark.parametrize("num_canonical_nodes", [1, 2, 7])
@pytest.mark.parametrize("max_patches", [None, 200])
def test_every_sample_is_in_one_pack_within_both_budgets(num_canonical_nodes: int, max_patches: int | None):
    budget = Budget(100, max_patches, 64)
    rng = np.random.default_rng(1)
    patches = rng.integers(0, 150, 500)
    plan = make_plan(num_canonical_nodes=num_canonical_nodes, budget=budget, patches=patches)
    assert sorted(plan.occurrences.tolist()) == list(range(500))
    assert np.array_equal(plan.samples, plan.occurrences + 7)
    assert np.add.reduceat(plan.tokens, plan.offsets[:-1]).max() <= 100
    if max_patches:
        assert np.add.reduceat(patches[plan.occurrences], plan.offsets[:-1]).max() <= max_patches


@pytest.mark.parametrize("num_canonical_nodes", [2, 4])
def test_canonical_nodes_keep_their_samples_and_have_equally_many_packs(num_canonical_nodes: int):
    order = np.random.default_rng(2).permutation(500)
    packs = packs_of(make_plan(num_canonical_nodes=num_canonical_nodes, order=order))
    assert len(packs) % num_canonical_nodes == 0
    for node in range(num_canonical_nodes):
        share = order[500 * node // num_canonical_nodes : 500 * (node + 1) // num_canonical_nodes]
        assert {item for pack in packs[node::num_canonical_nodes] for item in pack} == set(share.tolist())


def test_samples_over_the_budget_are_left_out():
    tokens = np.arange(500) % 7 * 20  # every seventh is over the budget
    patches = np.where(np.arange(500) % 5 == 0, 90, 0)
    plan = make_plan(tokens=tokens + 1, patches=patches, budget=Budget(100, 80, 64))
    expected = [index for index in range(500) if index % 7 not in (5, 6) and index % 5]
    assert sorted(plan.occurrences.tolist()) == expected
    assert sorted(plan.left_out.tolist()) == sorted(set(range(7, 507)) - {index + 7 for index in expected})


def test_a_plan_is_a_function_of_seed_and_epoch():
    assert make_plan().digest() == make_plan().digest()
    others = {make_plan(seed=4).digest(), make_plan(epoch=1).digest(), make_plan(num_canonical_nodes=2).digest()}
    assert len(others - {make_plan().digest()}) == 3


def test_the_plan_stays_what_it_was():
    # A change here refuses every checkpoint saved within an epoch.
    assert make_plan().digest() == "c96eb50778bab375"
    assert make_plan(9000).digest() == "993e47359c584b4c"
    assert make_plan(9000, num_canonical_nodes=3).digest() == "31c0450d24c5ad6d"


def test_the_plan_of_earlier_versions_can_still_be_made():
    # As the version of November 2026 printed them.
    assert make_plan(9000, is_divided=False).digest() == "5515875d4253e204"
    assert make_plan(9000, num_canonical_nodes=3, is_divided=False).digest() == "25089b2a28340e81"
    assert make_plan(1000, num_canonical_nodes=3).digest() == "19fd45f8f19321e6", "a share of one chunk has not changed"


@pytest.mark.parametrize("num_canonical_nodes", [1, 2])
def test_chunks_at_once_give_the_plan_of_one_after_the_other(num_canonical_nodes: int, monkeypatch):
    calls, small = [], Budget(max_tokens=100, max_patches=None, window=8)
    num_samples = 2 * 130 * 8 * WINDOWS_PER_CHUNK + 50

    def counted(*arguments: Any) -> Any:
        calls.append(arguments[1])
        return pack_chunks(*arguments)

    for module, name in ((planning, "_MOST_LANES"), (planning, "LEAST_LANES"), (pack_many, "LEAST_LANES")):
        monkeypatch.setattr(module, name, 64)
    monkeypatch.setattr(planning, "pack_chunks", counted)
    at_once = make_plan(num_samples, num_canonical_nodes, small)
    assert calls == [64] * 4, "the rest of a share is fewer chunks than lanes are worth"
    monkeypatch.setattr(planning, "LEAST_LANES", num_samples)
    assert make_plan(num_samples, num_canonical_nodes, small).digest() == at_once.digest()
    assert len(calls) == 4


@pytest.mark.parametrize("num_canonical_nodes, digest", [(1, "f04ffc6ee9e91a9a"), (5, "eb70433fc52145da")])
def test_small_numbers_without_resampling_give_the_plan_of_earlier_versions(
    num_canonical_nodes: int, digest: str, monkeypatch
):
    """The digests are printed by the version before numbers of 32 bits and lanes of several nodes."""
    calls = []
    monkeypatch.setattr(planning, "pack_chunks", lambda *a: calls.append(a[1]) or pack_chunks(*a))
    num_samples, small = 150 * 8 * WINDOWS_PER_CHUNK + 50, Budget(max_tokens=100, max_patches=None, window=8)
    rng = np.random.default_rng(0)
    tokens = rng.integers(3, 60, num_samples)
    order = rng.permutation(num_samples)
    narrow = {"order": order.astype(np.int32), "tokens": tokens.astype(np.int32)}  # the order is a copy
    plan = make_plan(num_samples, num_canonical_nodes, small, samples=None, **narrow)
    assert plan.digest() == digest and plan.samples is plan.occurrences
    assert {array.dtype for array in (plan.samples, plan.tokens)} == {np.dtype(np.int32)}
    wide = make_plan(num_samples, num_canonical_nodes, small, samples=np.arange(num_samples), order=order)
    assert wide.digest() == digest
    # Of five nodes none has a hundred chunks of its own.
    assert calls == [150] * 2


def test_patches_of_large_images_do_not_overflow():
    budget = Budget(max_tokens=20_000, max_patches=300_000, window=64)
    patches = np.full(40, 120_000, dtype=np.int32)  # times `max_tokens` it is above 2^31
    plan = make_plan(40, budget=budget, samples=None, tokens=patches // 120, patches=patches)
    assert np.diff(plan.offsets).max() == 2 and plan.num_packs == 20


def test_crowded_windows_are_packed_one_chunk_after_the_other(monkeypatch):
    def crowded(*arguments: Any) -> Any:
        raise planning.CrowdedWindowError

    small = Budget(max_tokens=100, max_patches=None, window=8)
    num_samples = pack_many.LEAST_LANES * 8 * WINDOWS_PER_CHUNK
    whole = make_plan(num_samples, 1, small)
    monkeypatch.setattr(planning, "pack_chunks", crowded)
    assert make_plan(num_samples, 1, small).digest() == whole.digest()


def test_a_window_that_is_crowded_after_some_packs_changes_no_plan(monkeypatch):
    """Then generators have been drawn from; the digest is of the version before lanes of several nodes."""
    outcomes = []

    def watched(*arguments: Any) -> Any:
        try:
            packed = pack_chunks(*arguments)
        except pack_many.CrowdedWindowError:
            outcomes.append("crowded")
            raise
        return packed

    monkeypatch.setattr(planning, "WINDOWS_PER_CHUNK", 8)
    monkeypatch.setattr(planning, "pack_chunks", watched)
    for module in (planning, pack_many):
        monkeypatch.setattr(module, "LEAST_LANES", 4)
    rng, num_samples = np.random.default_rng(0), 4 * 8 * 400
    # Nine of ten are above half a pack, so most packs are postponed.
    tokens = np.where(rng.random(num_samples) < 0.1, 99, rng.integers(51, 97, num_samples))
    wanted = {"tokens": tokens, "patches": 0 * tokens, "budget": Budget(100, None, 400), "samples": None}
    assert make_plan(num_samples, **wanted).digest() == "1bb6e5e988668bb7" and outcomes == ["crowded"]
    monkeypatch.setattr(planning, "LEAST_LANES", num_samples)
    assert make_plan(num_samples, **wanted).digest() == "1bb6e5e988668bb7" and outcomes == ["crowded"]


def test_chunks_hardly_cost_fill():
    rng = np.random.default_rng(4)
    tokens = rng.lognormal(6.6, 0.45, 60_000).clip(16, 4096).astype(np.int64)
    budget = Budget(4096, None, window=256)  # 10 chunks
    num_packs = [
        make_plan(60_000, budget=budget, order=np.arange(60_000), tokens=tokens, is_divided=is_divided).num_packs
        for is_divided in (True, False)
    ]
    # Up to two packs per chunk; of 1,200, in chunks a quarter of the usual size.
    assert num_packs[1] <= num_packs[0] <= num_packs[1] + 2 * 10


def test_without_packing_every_sample_is_a_pack_in_streamings_order():
    order = np.array([4, 2, 0, 3, 1])
    assert packs_of(plan_samples(order, np.arange(5), 1)) == [[4], [2], [0], [3], [1]]
    # Two canonical nodes, of 2 and 3 samples, take turns.
    assert packs_of(plan_samples(order, np.arange(5), 2)) == [[4], [0], [2], [3], [1]]


def dealt(num_packs: int, first: int, num_nodes: int, ranks_per_node: int, batch_size: int) -> list[list[int]]:
    """The packs of each global step, inert ones left out."""
    ranks: NDArray[np.int64] = assign_packs(num_packs, first, num_nodes, ranks_per_node).reshape(
        num_nodes * ranks_per_node, -1
    )
    assert len({len(rank) for rank in ranks}) == 1
    steps = []
    for start in range(0, ranks.shape[1], batch_size):
        steps.append(sorted(pack for pack in ranks[:, start : start + batch_size].flatten().tolist() if pack >= 0))
    return steps


@pytest.mark.parametrize("num_packs", [1, 5, 24, 37])
def test_global_steps_are_the_same_at_any_world_size_and_after_any_kill(num_packs: int):
    whole = dealt(num_packs, 0, 1, 1, 12)
    assert [pack for step in whole for pack in step] == list(range(num_packs))
    for num_nodes, ranks_per_node in ((1, 2), (2, 1), (2, 3), (4, 3), (1, 12)):
        batch_size = 12 // (num_nodes * ranks_per_node)
        for steps in range(len(whole)):
            assert dealt(num_packs, 12 * steps, num_nodes, ranks_per_node, batch_size) == whole[steps:]


def test_short_ranks_get_an_inert_copy_of_the_last_pack():
    assert assign_packs(5, 0, 1, 2).tolist() == [[[0, 2, 4], [1, 3, -5]]]
    assert assign_packs(5, 0, 2, 2).tolist() == [[[0, 4], [2, -5]], [[1, -5], [3, -5]]]
    assert assign_packs(5, 5, 1, 2).shape == (1, 2, 0)


@pytest.mark.parametrize("num_workers", [1, 2, 3])
def test_workers_batches_taken_in_turn_are_the_ranks_packs(num_workers: int):
    packs = np.arange(11)
    shares = [assign_to_worker(packs, worker, num_workers, 2).tolist() for worker in range(num_workers)]
    batches = [[share[start : start + 2] for start in range(0, len(share), 2)] for share in shares]
    found = [batch.pop(0) for turn in range(6) for batch in [batches[turn % num_workers]]]
    assert [pack for batch in found for pack in batch] == packs.tolist()
