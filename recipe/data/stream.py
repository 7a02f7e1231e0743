"""MDS shards → packs of Examples, in the order of the epoch's plan."""

import hashlib
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Int
from numpy.typing import NDArray
from streaming.base.shuffle import get_shuffle

from recipe.config import NEW_RUN, ConfigError, TeacherConfig
from recipe.data.lengths import LengthTable
from recipe.data.maker import ExampleMaker, make_inert
from recipe.data.mapped import MOST_COUNT, small_ints
from recipe.data.plan import (
    Budget,
    Plan,
    assign_packs,
    assign_to_worker,
    cached_plan,
    plan_packs,
    plan_samples,
)
from recipe.data.split import ImageHashes, Split
from recipe.data.teachers import TeacherPool
from recipe.images import open_image
from recipe.schema import Example, Pack, Sample
from recipe.upstream.storage import CheckedDataset, open_streams

log = logging.getLogger(__name__)


def read_teachers(config: TeacherConfig, seed: int) -> TeacherPool | None:
    """Read the teacher pool into memory; None if `num_teachers` is 0.

    Raises:
        ValueError: There is no pool, or it cannot be used, or an image of it is broken.
    """
    if config.num_teachers == 0:
        return None
    if config.stream is None:
        raise ValueError(
            f"teachers.num_teachers is {config.num_teachers}, but teachers.stream is null: set it to a pool"
        )
    rows = CheckedDataset(streams=open_streams({"teachers": config.stream}), batch_size=1)
    samples = [Sample.from_mds(rows[index]) for index in range(rows.num_samples)]
    for sample in samples:
        try:
            open_image(sample.image)
        except ValueError as error:  # later it would be blamed on the sample that it is shown with
            raise ValueError(f"teacher {sample.id!r} of the pool: {error}: choose the pool again") from error
    return TeacherPool(samples, config, seed)


@dataclass(frozen=True)
class Packing:
    """How samples are packed; `skips_long_samples` leaves out those over the budget alone instead of raising."""

    budget: Budget
    lengths: LengthTable
    skips_long_samples: bool


class PackStream(CheckedDataset):
    """The training set. Its items are packs: the unit of batch size, length, position and resumption.

    Streaming resamples and shuffles an epoch's samples and fetches their shards. The plan says which samples share a
    pack and assigns the packs to ranks and workers.

    Attributes:
        maker: Row → Example.
        epoch_of_length: The epoch that `len` is of.
        with_answers: Whether this epoch's conversations hold the answers; constant within an epoch, and part of the
            state of the epoch in progress. Only workers started later see a change.
        quarantined: Ids left out; only workers started later see a change.
    """

    def __init__(
        self,
        maker: ExampleMaker,
        packing: Packing | None,
        skips_bad_samples: bool,
        answers_at_start: bool = True,
        answers_ever: bool = True,
        split: Split | None = None,
        lengths: LengthTable | None = None,
        image_hashes: ImageHashes | None = None,
        **keywords: Any,
    ):
        """Open the shards.

        Args:
            maker: Row → Example.
            packing: None: one sample per pack.
            skips_bad_samples: List samples that cannot be used in `Pack.skipped`, else raise.
            answers_at_start: `with_answers` of the run's first epoch.
            answers_ever: Whether any epoch has answers, so that a sample must fit with its own.
            split: What is held out for evaluation, if anything.
            lengths: Of all samples, if known; `packing` has its own.
            image_hashes: Of all samples, if known.
            **keywords: Of `streaming.StreamingDataset`; `batch_size` counts packs, `predownload` samples.
        """
        super().__init__(**keywords)
        self.maker, self._packing, self._skips_bad_samples = maker, packing, skips_bad_samples
        self._val_fraction = None if split is None else split.fraction
        self.is_trained = np.ones(self.num_samples, dtype=np.bool_) if split is None else ~split.is_validation  # (N,)
        self.lengths, self.image_hashes = lengths if packing is None else packing.lengths, image_hashes
        self._asked_block_size = self.shuffle_block_size
        self._asked_canonical_nodes = self.num_canonical_nodes
        # Streaming would set both when the first epoch starts, but its length must be known before.
        if not self.num_canonical_nodes:
            self.num_canonical_nodes = self._parallel_rank_world.num_nodes
        self._set_shuffle_block_size(self._parallel_rank_world)
        if keywords.get("predownload") is None:
            # Streaming's own default would count packs as samples.
            per_pack = 1.0
            if packing is not None:
                tokens, _ = packing.lengths.of_epoch(0, None, 0, answers_at_start)
                per_pack = max(1.0, packing.budget.max_tokens / float(tokens.mean()))
            self.predownload = max(64, round(8 * (self.batch_size or 1) * per_pack))
        if packing is not None and not packing.skips_long_samples:
            self._check_lengths(packing, answers_ever)
        self._fixed_identity, self._described = self._identify_data(), self._describe_streams()
        self.epoch_of_length = 0
        self.with_answers = self.answers_at_start = answers_at_start
        self.quarantined: set[str] = set()
        self._plan: tuple[str, Plan] | None = None
        self._undivided_epoch: int | None = None  # begun by a version that packed a node's share as one chunk
        self._packs: NDArray[np.int64] = np.empty(0, dtype=np.int64)
        self._epoch = 0

    def __len__(self) -> int:
        """Return the packs of one rank in `epoch_of_length`: epochs differ."""
        return -(-self.plan(self.epoch_of_length).num_packs // self._parallel_rank_world.num_ranks)

    def plan(self, epoch: int, with_answers: bool | None = None) -> Plan:
        """Return the packs of an epoch, of all ranks; `with_answers` is by default that of the epoch in progress."""
        answers = self.with_answers if with_answers is None else with_answers
        is_divided = epoch != self._undivided_epoch
        key = f"epoch{epoch}-{'answers' if answers else 'prompts'}-{_digest(self.identity())}"
        key += "" if is_divided else "-undivided"
        if self._plan is None or self._plan[0] != key:
            self._plan = (key, cached_plan(key, lambda: self._make_plan(epoch, answers, is_divided)))
        return self._plan[1]

    def example(self, position: int) -> Example:
        """Return the Example of a stored sample, as epoch 0 shows it without resampling."""
        return self.maker(self[position], 0, position, self.answers_at_start)

    def prompt_sizes(self) -> tuple[int, float, float]:
        """Return the stored images that the head solves, their prompts' tokens and their patches.

        They may be estimates: of some 16 evenly spread samples without packing, and of chats about several images.
        """
        if self._packing is not None:
            own = self._packing.lengths.samples
            tokens = (own.tokens - own.answer_tokens) * own.solved_images
            return int(own.solved_images.sum()), float(tokens.sum()), float(own.patches.sum())
        positions = range(0, self.num_samples, max(1, self.num_samples // 16))
        examples = [example for example in map(self.example, positions) if example.student_images]
        scale = self.num_samples / len(positions)
        num_images = sum(len(example.student_images) for example in examples)
        tokens = sum(example.prompt_length * len(example.student_images) for example in examples)
        patches = sum(len(example.pixel_patches) for example in examples)
        return round(scale * num_images), scale * tokens, scale * patches

    def identity(self) -> dict[str, str]:
        """Return all that the plans depend on, by the names that error messages use."""
        shuffle = (self.shuffle_algo, self.shuffle_block_size) if self.shuffle else None
        return {
            **self._fixed_identity,
            "shuffle": str(shuffle),
            "seed": f"{self.shuffle_seed}, {self.maker.seed}",
            "num_canonical_nodes": str(self.num_canonical_nodes),
        }

    def state_dict(self, num_samples: int, from_beginning: bool) -> dict[str, Any]:
        """Return Streaming's state, counted in packs, and what the plan depends on."""
        state = super().state_dict(num_samples, from_beginning)
        digest = self.plan(state["epoch"]).digest() if state["sample_in_epoch"] else ""
        plan = {**self.identity(), "digest": digest}
        return {**state, "plan": plan, "streams": self._described, "with_answers": self.with_answers}

    def load_state_dict(self, obj: dict[str, Any]) -> None:
        """Resume from a state; raise ConfigError if the plan is not that run's."""
        self.check_plan(obj)
        self.with_answers = obj.get("with_answers", True)  # older checkpoints have answers in every epoch
        super().load_state_dict(obj)

    def check_plan(self, obj: Mapping[str, Any]) -> None:
        """Take over a state's partitions; raise ConfigError that says why if the plan is not that run's."""
        self.num_canonical_nodes = obj["num_canonical_nodes"]
        self.shuffle_block_size = self._asked_block_size
        self._set_shuffle_block_size(self._parallel_rank_world)
        # Older checkpoints do not name it.
        then, now = {"val_fraction": "None", "augmentation": "", **obj.get("plan", {})}, self.identity()
        streams = obj.get("streams", {}), self._described
        changed = [
            _CHANGES[name](*streams) if name in _CHANGES else f"{name} was {then.get(name)}, now {value}"
            for name, value in now.items()
            if then.get(name) != value
        ]
        asked = self._asked_canonical_nodes
        if asked and asked != obj["num_canonical_nodes"]:
            changed.append(f"num_canonical_nodes was {obj['num_canonical_nodes']}, now {asked}")
        self._undivided_epoch = None
        if not changed and then["digest"] and then["digest"] != self._digest_of(obj):
            self._undivided_epoch = obj["epoch"]  # as an earlier version planned it
            if then["digest"] != self._digest_of(obj):
                self._undivided_epoch = None
                changed = ["the packer, Streaming's shuffle or numpy has another version"]
        if changed:
            raise ConfigError(
                f"cannot resume: the plan of the epoch has changed since the checkpoint ({'; '.join(changed)}). "
                f"Undo the change, or start a new run from the weights: {NEW_RUN}"
            )

    def _digest_of(self, obj: Mapping[str, Any]) -> str:
        """Return the digest of the plan that a state is within."""
        return self.plan(obj["epoch"], obj.get("with_answers", True)).digest()

    def __iter__(self) -> Iterator[Pack]:
        """Yield this worker's packs of the epoch."""
        examples: list[Example] = []
        skipped: dict[str, str] = {}
        members = self._members()  # begins with the first `next`, when the epoch's work has been found
        for row in super().__iter__():
            number, occurrence, num_tokens, is_last = next(members)
            try:
                if row["id"] not in self.quarantined:
                    example = self.maker(row, self._epoch, occurrence, self.with_answers)
                    if num_tokens and len(example.input_ids) != num_tokens:
                        raise RuntimeError(
                            f"sample {row['id']!r} is {len(example.input_ids)} tokens long, but {num_tokens} were "
                            "planned: its records.jsonl.gz does not belong to its shards: convert the data set again"
                        )
                    examples.append(example)
            except ValueError as error:
                if not self._skips_bad_samples:
                    raise
                skipped[row["id"]] = str(error)
            if is_last:
                examples = examples or [self._find_filler()]
                if number >= 0:
                    yield Pack(number, examples, skipped)
                else:
                    yield Pack(-1 - number, [make_inert(example) for example in examples], is_inert=True)
                examples, skipped = [], {}

    def _get_work(self, epoch: int, sample_in_epoch: int) -> NDArray[np.int64]:
        """Return the stored positions of this worker's samples, pack by pack; Streaming fetches their shards ahead."""
        plan, world = self.plan(epoch), self._parallel_worker_world
        packs = assign_packs(plan.num_packs, sample_in_epoch, world.num_nodes, world.ranks_per_node)
        assert isinstance(self.batch_size, int)
        self._epoch = epoch
        self._packs = assign_to_worker(
            packs[world.node, world.rank_of_node], world.worker_of_rank, world.workers_per_rank, self.batch_size
        )
        entries = [plan.samples[plan.entries(number)] for number in self._packs]
        return np.concatenate(entries) if entries else np.empty(0, dtype=np.int64)

    def _members(self) -> Iterator[tuple[int, int, int, bool]]:
        """Yield (pack, occurrence, planned tokens, is last of its pack) of this worker's samples."""
        plan = self.plan(self._epoch)
        for number in self._packs.tolist():
            entries = plan.entries(number)
            for entry in range(entries.start, entries.stop):
                yield number, int(plan.occurrences[entry]), int(plan.tokens[entry]), entry == entries.stop - 1

    def _find_filler(self) -> Example:
        """Return an inert example, for a pack without a usable sample."""
        for index in range(self.num_samples):
            with suppress(ValueError):
                if self.is_trained[index] and self[index]["id"] not in self.quarantined:
                    return make_inert(self.example(index))
        raise ValueError("no sample of the data set can be used: convert it again, with --strict to see why")

    def _identify_data(self) -> dict[str, str]:
        """Return the part of `identity` that is constant while the data set is open."""
        sampling = (self.sampling_method, self.sampling_granularity, [int(stream.choose) for stream in self.streams])
        packing, teachers, augmentation = self._packing, self.maker.teachers, self.maker.augmentation
        return {
            "data": _digest(_contents(self.shards)),
            "sampling of streams": _digest(sampling),
            "packing": str(packing and (packing.budget, packing.skips_long_samples)),
            "lengths (tokenizer, prompt, pixel budget)": packing.lengths.digest() if packing else "",
            "teachers": teachers.digest() if teachers else "",
            "val_fraction": str(self._val_fraction),
            "augmentation": augmentation.digest() if augmentation else "",
        }

    def _describe_streams(self) -> dict[str, list[Any]]:
        """Return a fingerprint, the samples, and the samples per epoch of each stream, by its key."""
        shards = iter(self.shards)
        found = {}
        for index, stream in enumerate(self.streams):
            own = [next(shards) for _ in range(int(self.shards_per_stream[index]))]
            key = getattr(stream, "key", str(index))
            found[key] = [_digest(_contents(own)), sum(shard.samples for shard in own), int(stream.choose)]
        return found

    def epoch_samples(self, epoch: int) -> tuple[Int[np.ndarray, " units"], Int[np.ndarray, " S"] | None]:
        """Return the sizes of what is shuffled as a whole, and the stored position of each of an epoch's samples.

        The latter is None if each sample is read once, in stored order.
        """
        if all(stream.choose == count for stream, count in zip(self.streams, self.samples_per_stream, strict=True)):
            return self.samples_per_shard, None  # what Streaming finds, with several copies
        units, samples = self.resample_streams(epoch)
        return units, small_ints(samples, self.num_samples)

    def _make_plan(self, epoch: int, with_answers: bool, is_divided: bool) -> Plan:
        units, samples = self.epoch_samples(epoch)
        num_samples = int(units.sum())
        if self.shuffle:
            assert self.num_canonical_nodes and self.shuffle_block_size
            order = get_shuffle(
                self.shuffle_algo, units, self.num_canonical_nodes, self.shuffle_seed, epoch, self.shuffle_block_size
            )
        else:
            order = np.arange(num_samples)
        order = small_ints(order, num_samples)  # at once: of a hundred million samples each copy counts
        if not self.is_trained.all():
            order = order[self.is_trained[order if samples is None else samples[order]]]
        if self._packing is None:
            return plan_samples(order, samples, self.num_canonical_nodes)
        found = self._packing.lengths.of_epoch(epoch, samples, 0, with_answers)
        tokens, patches = (small_ints(numbers, MOST_COUNT) for numbers in found)
        budget = self._packing.budget
        if not budget.fits(tokens, patches)[order].any():
            raise ConfigError(
                f"all {len(order)} samples of epoch {epoch} are over the budget of a pack: "
                "raise train_loader.packing.max_tokens, max_seq_len or max_patches"
            )
        nodes, seed = self.num_canonical_nodes, self.shuffle_seed
        return plan_packs(order, samples, tokens, patches, nodes, budget, seed, epoch, is_divided)

    def _check_lengths(self, packing: Packing, with_answers: bool) -> None:
        """Raise ValueError if a sample could be over the budget alone, in any epoch."""
        budget = packing.budget
        tokens, patches = packing.lengths.longest(with_answers)
        long = np.flatnonzero(~budget.fits(tokens, patches) & self.is_trained)
        if not len(long):
            return
        shown = "" if self.maker.teachers is None else ", including its longest teachers"
        raise ConfigError(
            f"{len(long)} samples can be over {budget.max_tokens} tokens per pack, {budget.max_seq_len} per sample and "
            f"{budget.max_patches or 'any number of'} patches; first {self[int(long[0])]['id']!r}, with "
            f"{tokens[long[0]]} tokens and {patches[long[0]]} patches{shown}. Raise train_loader.packing.max_tokens, "
            "max_seq_len or max_patches, or set train_loader.packing.on_long_sample=skip"
        )


def _contents(shards: Iterable[Any]) -> list[Any]:
    return [(shard.samples, [(raw.bytes, raw.hashes) for raw, _ in shard.file_pairs]) for shard in shards]


def _digest(value: object) -> str:
    return hashlib.sha256(repr(value).encode()).hexdigest()[:16]


def _other_data(then: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Return which streams hold other samples; both from `_describe_streams`, `then` empty in older checkpoints."""
    parts = []
    for key in [*then, *(key for key in now if key not in then)] if then else []:
        before, after = then.get(key), now.get(key)
        if before is None or after is None:
            parts.append(f"train_loader.streams.{key} is {'new' if before is None else 'missing'}")
        elif before[0] != after[0]:
            parts.append(f"train_loader.streams.{key} had other samples ({before[1]}, now {after[1]})")
    return ", ".join(parts) or "train_loader.streams hold other samples, or in another order"


def _other_sampling(then: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Return how many samples per epoch other streams give; as `_other_data`."""
    parts = [
        f"train_loader.streams.{key} gave {then[key][2]} samples per epoch, now {now[key][2]} "
        f"(its choose, repeat or proportion, or train_loader.dataset.epoch_size)"
        for key in now
        if key in then and then[key][2] != now[key][2]
    ]
    what = "choose, repeat or proportion of train_loader.streams, or train_loader.dataset.epoch_size or sampling_*"
    return ", ".join(parts) or what


# What is compared by a fingerprint, which says nothing to a reader.
_CHANGES: dict[str, Callable[[Mapping[str, Any], Mapping[str, Any]], str]] = {
    "data": _other_data,
    "sampling of streams": _other_sampling,
    "lengths (tokenizer, prompt, pixel budget)": lambda then, now: "lengths (tokenizer, prompt, pixel budget)",
    "teachers": lambda then, now: "teachers (teachers.stream, num_teachers, teacher_ratio, or seed)",
    "augmentation": lambda then, now: "train_loader.augment",
}
