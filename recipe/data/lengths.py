"""How long every sample is, without decoding its image: tokens of conversation and captions, vision patches.

Texts and image sizes are stored next to the index (`recipe/records.py`). They are counted once per tokenizer, prompt
and pixel budget; the counts are kept next to the index too, with the fingerprint of all these in their name.
"""

import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import islice
from typing import Any, TypeVar

import numpy as np
from composer.utils import dist
from jaxtyping import Bool, Int
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from recipe.config import ConfigError, LoaderConfig
from recipe.data.chat import Segment
from recipe.data.encode import Encoder, naming, solved_images, without_answers
from recipe.data.image import resized_size
from recipe.data.kept import KeptCount, MissingRecordsError, concatenated, none_if_unknown
from recipe.data.mapped import MOST_COUNT, Arrays, hashed, shared_arrays, small_ints
from recipe.data.teachers import TeacherPool, id_hash
from recipe.records import RECORDS_FILE, DamagedRecordsError, read_records
from recipe.schema import Object, Sample
from recipe.upstream.agreement import from_rank_0
from recipe.upstream.checked_stream import CheckedStream

log = logging.getLogger(__name__)

Counted = TypeVar("Counted")

_CHUNK = 1024  # samples whose texts are tokenized per call
_PROBE = Sample("probe", b"", 640, 480, (Object((10.0, 20.0, 300.0, 400.0), "a probe"),))


@dataclass(frozen=True)
class Lengths:
    """Lengths of the samples of a data set, in stored order."""

    tokens: Int[np.ndarray, " N"]  # of the conversation without teachers, including image tokens
    patches: Int[np.ndarray, " N"]  # of the sample's own images; 0 without one
    takes_teachers: Bool[np.ndarray, " N"]  # see `takes_teachers`
    id_hashes: Int[np.ndarray, " N"]  # see `id_hash`
    answer_tokens: Int[np.ndarray, " N"]  # of `tokens`, those that an epoch without answers does not read
    num_objects: Int[np.ndarray, " N"]  # that the head learns; 0 if not annotated
    num_solved: Int[np.ndarray, " N"] | None = None  # images of `solved_images`; None: each sample's only one

    @property
    def solved_images(self) -> Int[np.ndarray, " N"]:
        """Return how many images of each sample the head solves."""
        return (self.patches > 0).astype(self.patches.dtype) if self.num_solved is None else self.num_solved

    def __len__(self) -> int:
        return len(self.tokens)


@dataclass(frozen=True)
class LengthTable:
    """The lengths of a data set, and what each teacher of the pool adds to a conversation."""

    samples: Lengths
    teachers: TeacherPool | None
    teacher_tokens: Int[np.ndarray, " T"]
    teacher_patches: Int[np.ndarray, " T"]

    def of_epoch(
        self, epoch: int, samples: Int[np.ndarray, " S"] | None, first: int = 0, with_answers: bool = True
    ) -> tuple[Int[np.ndarray, " S"], Int[np.ndarray, " S"]]:
        """Return (tokens, patches) of an epoch's occurrences from `first` on, given their positions; None: all."""
        tokens, patches = self._own_tokens(with_answers), self.samples.patches
        if samples is not None:
            tokens, patches = tokens[samples], patches[samples]
        if self.teachers is not None:
            samples = np.arange(len(tokens)) if samples is None else samples
            drawn = self.teachers.draw(epoch, first, self.samples.id_hashes[samples])
            shown = (drawn >= 0) & self.samples.takes_teachers[samples, None]
            tokens = tokens + np.where(shown, self.teacher_tokens[drawn], 0).sum(axis=1)
            patches = patches + np.where(shown, self.teacher_patches[drawn], 0).sum(axis=1)
        return tokens, patches

    def longest(self, with_answers: bool = True) -> tuple[Int[np.ndarray, " N"], Int[np.ndarray, " N"]]:
        """Return (tokens, patches) of every sample with the longest teachers that it can be shown."""
        tokens, patches = self._own_tokens(with_answers), self.samples.patches
        if self.teachers is not None:
            tokens = tokens + self._most_added(self.teachers, self.teacher_tokens)
            patches = patches + self._most_added(self.teachers, self.teacher_patches)
        return tokens, patches

    def _own_tokens(self, with_answers: bool) -> NDArray[Any]:
        """Return (N,) the tokens of each conversation without teachers."""
        return self.samples.tokens if with_answers else self.samples.tokens - self.samples.answer_tokens

    def _most_added(self, teachers: TeacherPool, added: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return (N,) the most that teachers other than the sample can add to it, each adding `added` (T,)."""
        *longest, spare = np.argsort(-added)[: teachers.config.num_teachers + 1]
        most = self.samples.takes_teachers * added[longest].sum()
        for teacher in longest:
            itself = self.samples.takes_teachers & (self.samples.id_hashes == teachers.id_hashes[teacher])
            most[itself] += added[spare] - added[teacher]
        return most

    def digest(self) -> str:
        """Return 16 hex digits that identify these lengths."""
        own = self.samples  # without what is absent in older checkpoints; the plan has a digest of its own
        arrays = own.tokens, own.patches, own.takes_teachers, own.id_hashes, self.teacher_tokens, self.teacher_patches
        return hashed(arrays).hexdigest()[:16]


def takes_teachers(sample: Sample) -> bool:
    """Return whether a sample can be shown with teachers: only with the detection chat, not its own `messages`."""
    return sample.messages is None and sample.has_image


def count_lengths(samples: Iterable[Sample], encoder: Encoder) -> Lengths:
    """Count what `encoder` would make of each sample, without its image; raise ValueError if one cannot be used."""
    chunks = []
    for chunk in _chunks(samples):
        conversations, prompts = [], []
        for sample in chunk:
            with naming(sample):
                head, student = encoder.segments(sample)
            conversations.append(head + student)
            prompts.append([*head, *without_answers(student)])
        tokens, patches = _count_chunk(chunk, conversations, encoder)
        answer_tokens = tokens - _count_chunk(chunk, prompts, encoder)[0]
        taking = np.array([takes_teachers(sample) for sample in chunk])
        hashes = np.array([id_hash(sample.id) for sample in chunk], dtype=np.int64)
        objects = np.array([len(learned_objects(sample)) for sample in chunk], dtype=np.int64)
        solved = np.array([len(solved_images(sample)) for sample in chunk], dtype=np.int64)
        small = (small_ints(numbers, MOST_COUNT) for numbers in (answer_tokens, objects, solved))
        chunks.append((small_ints(tokens, MOST_COUNT), small_ints(patches, MOST_COUNT), taking, hashes, *small))
    names = [entry.name for entry in fields(Lengths)]
    return Lengths(**_join([dict(zip(names, chunk, strict=True)) for chunk in chunks]))


def learned_objects(sample: Sample) -> list[Object]:
    """Return the objects of all its images that the head learns."""
    return [item for view in sample.per_image() for item in view.objects or () if not item.iscrowd]


def count_captions(samples: Iterable[Sample], tokenizer: PreTrainedTokenizerBase) -> Int[np.ndarray, " N"]:
    """Return the tokens of each sample's longest caption, tokenized as by `Encoder`; 0 without any."""
    longest: list[int] = []
    for chunk in _chunks(samples):
        captions = [[item.caption for item in learned_objects(sample)] for sample in chunk]
        texts = list(dict.fromkeys(caption for row in captions for caption in row))
        rows: Any = (
            tokenizer(texts, add_special_tokens=False, return_attention_mask=False)["input_ids"] if texts else []
        )
        lengths = {text: 1 + len(row) for text, row in zip(texts, rows, strict=True)}
        longest += [max((lengths[caption] for caption in row), default=0) for row in captions]
    return np.array(longest, dtype=np.int64)


def count_teachers(pool: TeacherPool, encoder: Encoder) -> tuple[Int[np.ndarray, " T"], Int[np.ndarray, " T"]]:
    """Return (tokens, patches) that the teachers of the pool add to a conversation."""
    return _count_chunk(pool.samples, [encoder.teacher_segments(teacher) for teacher in pool.samples], encoder)


def read_length_table(streams: Sequence[CheckedStream], encoder: Encoder, teachers: TeacherPool | None) -> LengthTable:
    """Return the lengths of all streams and of the pool; raise ValueError as `read_lengths`."""
    return LengthTable(read_lengths(streams, encoder), teachers, *_added(teachers, encoder))


def read_known_lengths(
    streams: Sequence[CheckedStream], encoder: Encoder, teachers: TeacherPool | None
) -> LengthTable | None:
    """Return what `read_length_table` does, None if a stream has no records or a sample cannot be used."""
    kept = _kept_lengths(encoder)
    found = shared_arrays(lambda: none_if_unknown(lambda: _join([kept.of(stream) for stream in streams])))
    return None if found is None else LengthTable(Lengths(**found), teachers, *_added(teachers, encoder))


def _added(teachers: TeacherPool | None, encoder: Encoder) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    empty = np.empty(0, dtype=np.int64)
    return (empty, empty) if teachers is None else count_teachers(teachers, encoder)


def fingerprint(encoder: Encoder) -> str:
    """Return 16 hex digits of all that token counts depend on, except the samples."""
    probe = [segment.text for part in encoder.segments(_PROBE, [_PROBE]) for segment in part]
    tokenizer: Any = encoder.tokenizer
    counted = [entry.name for entry in fields(Lengths) if entry.name != "num_solved"]
    prompt = {**asdict(encoder.prompt), "box_coordinates": encoder.box_coordinates}
    parts = [tokenizer.backend_tokenizer.to_str(), prompt, asdict(encoder.image_spec), probe, counted]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def read_lengths(streams: Sequence[CheckedStream], encoder: Encoder) -> Lengths:
    """Return the lengths of all streams, concatenated; global rank 0 counts those not kept yet and broadcasts.

    Raises:
        ValueError: A stream has no records next to its index, or a sample cannot be used.
    """
    kept = _kept_lengths(encoder)
    return Lengths(**shared_arrays(lambda: _join([kept.of(stream) for stream in streams])))


def _join(parts: Sequence[Arrays]) -> Arrays:
    """Return the arrays of `Lengths` of all parts, without `num_solved` if no sample has several images."""
    each = [Lengths(**part) for part in parts]
    solved = [part.solved_images for part in each]
    names = [entry.name for entry in fields(Lengths) if entry.name != "num_solved"]
    joined = {name: np.concatenate([getattr(part, name) for part in each]) for name in names}
    # As earlier versions keep it.
    has_several = any(not np.array_equal(own, part.patches > 0) for own, part in zip(solved, each, strict=True))
    return {**joined, "num_solved": np.concatenate(solved)} if has_several else joined


def read_longest_caption(streams: Sequence[CheckedStream], tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the tokens of the longest caption of all streams, including end-of-sequence; counted as `read_lengths`."""
    kept = _kept_captions(tokenizer)
    parts = from_rank_0(lambda: [kept.of(stream) for stream in streams])
    return max(int(part["tokens"].max(initial=0)) for part in parts)


def check_records(
    where: str,
    streams: Sequence[CheckedStream],
    encoder: Encoder,
    teachers: TeacherPool | None,
    loader: LoaderConfig,
    with_answers: bool = True,
    is_used: Bool[np.ndarray, " N"] | None = None,
    draws: Callable[[LengthTable, Sequence[CheckedStream]], LengthTable] | None = None,
) -> None:
    """Judge the records of a loader before the first batch; all ranks must call it.

    Without packing a stream that has no records next to its index is not judged, and logged. With packing the plan
    judges the lengths of conversations.

    Args:
        where: The loader's key, `train_loader` or `eval_loader`.
        streams: Its streams.
        encoder: Gives the longest caption and conversation.
        teachers: Shown with the samples; training is judged by the longest that a sample can be shown.
        loader: Its section. With `on_bad_sample: skip`, what is too long is only logged.
        with_answers: Whether any epoch reads them.
        is_used: Which samples of the streams the loader reads, for lengths; None: all.
        draws: Gives the table of what augmentation shows.

    Raises:
        ConfigError: A caption or conversation is too long, or a sample cannot be used.
    """
    is_packed = loader.packing is not None
    problems = from_rank_0(lambda: _judge(where, streams, encoder, teachers, is_packed, with_answers, is_used, draws))
    if problems and loader.on_bad_sample != "skip":
        raise ConfigError(
            "\n  ".join(f"{text}; {where}.on_bad_sample=skip leaves such samples out" for text in problems)
        )
    for problem in problems if dist.get_global_rank() == 0 else ():
        log.warning("%s; skipped", problem)


def _judge(
    where: str,
    streams: Sequence[CheckedStream],
    encoder: Encoder,
    teachers: TeacherPool | None,
    is_packed: bool,
    with_answers: bool,
    is_used: NDArray[np.bool_] | None,
    draws: Callable[[LengthTable, Sequence[CheckedStream]], LengthTable] | None,
) -> list[str]:
    """Return what is wrong with the records of the streams."""
    problems: list[str] = []
    added = _added(None if is_packed else teachers, encoder)
    first = 0  # position of the stream's first sample
    for stream in streams:
        num_samples = sum(shard["samples"] for shard in stream.read_index()["shards"])
        used = slice(None) if is_used is None else is_used[first : first + num_samples]
        factor = np.zeros(num_samples, dtype=np.int64)  # 0: not read, so never too long
        factor[used] = 1
        try:
            captions = _kept_captions(encoder.tokenizer).of(stream)["tokens"] * factor
            problems += _too_long(where, stream, captions, encoder.max_caption_tokens, "a caption")
            lengths = Lengths(**_kept_lengths(encoder).of(stream))
            if not is_packed:
                table = LengthTable(lengths, teachers, *added)
                table = table if draws is None else draws(table, [stream])
                is_drawn = where == "eval_loader"  # every evaluation draws the same teachers
                if is_drawn:
                    tokens, _ = table.of_epoch(0, np.arange(num_samples), first)
                else:
                    tokens, _ = table.longest(with_answers)
                problems += _too_long(where, stream, tokens * factor, encoder.max_seq_len, "a conversation")
        except (MissingRecordsError, DamagedRecordsError) as error:
            if is_packed:
                raise ConfigError(f"{where}: {error}") from error
            log.warning("%s: captions and lengths are not judged before training: %s", where, error)
        except ValueError as error:
            if is_packed:  # it cannot be planned either
                raise ConfigError(f"{where}: {error}") from error
            problems.append(f"{where}: {error}")
        first += num_samples
    return problems


def _too_long(where: str, stream: CheckedStream, tokens: NDArray[np.int64], most: int, what: str) -> list[str]:
    num_long, longest = int((tokens > most).sum()), int(tokens.argmax()) if len(tokens) else 0
    if not num_long:
        return []
    remedy = "raise max_seq_len, or lower image.max_pixels or teachers.num_teachers"
    if what == "a caption":
        remedy = "raise caption_decoder.max_caption_tokens in training (null: the longest), or shorten it"
    record = next(islice(read_records(stream.folder / RECORDS_FILE, stream.read_index()), longest, None))
    return [
        f"{where}: {num_long} of {len(tokens)} samples in {stream.folder} have {what} above {most} tokens, up to "
        f"{tokens[longest]} in {record.id!r}: {remedy}"
    ]


def _kept_lengths(encoder: Encoder) -> "KeptCount":
    return KeptCount(
        name="lengths",
        fingerprint=fingerprint(encoder),
        what="this tokenizer, prompt and pixel budget",
        remedy="train without train_loader.packing",
        count=lambda samples: {
            name: array for name, array in vars(count_lengths(samples, encoder)).items() if array is not None
        },
        join=_join,
    )


def _kept_captions(tokenizer: PreTrainedTokenizerBase) -> "KeptCount":
    backend: Any = tokenizer
    return KeptCount(
        name="caption_lengths",
        fingerprint=hashlib.sha256(backend.backend_tokenizer.to_str().encode()).hexdigest()[:16],
        what="the longest captions",
        remedy="set caption_decoder.max_caption_tokens",
        count=lambda samples: {"tokens": count_captions(samples, tokenizer)},
        join=concatenated,
    )


def _chunks(samples: Iterable[Sample]) -> Iterator[list[Sample]]:
    iterator = iter(samples)
    while chunk := list(islice(iterator, _CHUNK)):
        yield chunk


def _count_chunk(
    samples: Sequence[Sample], conversations: Sequence[Sequence[Segment]], encoder: Encoder
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return (tokens, patches) per sample; each text is tokenized once, as most samples share the prompt."""
    texts = list(dict.fromkeys(segment.text for segments in conversations for segment in segments))
    num_tokens = {text: len(row) for text, row in zip(texts, encoder.ids(texts), strict=True)}
    spec = encoder.image_spec
    tokens: list[int] = []
    patches: list[int] = []
    for sample, segments in zip(samples, conversations, strict=True):
        of_images: list[int] = []
        for view in sample.per_image() if sample.has_image else ():
            with naming(sample):
                width, height = resized_size(view.width, view.height, spec)
            of_images.append((width // spec.patch_size) * (height // spec.patch_size))
        num_image_tokens = sum(count // spec.merge_size**2 for count in of_images) - len(of_images)
        tokens.append(sum(num_tokens[segment.text] for segment in segments) + num_image_tokens)
        patches.append(sum(of_images))
    return np.array(tokens, dtype=np.int64), np.array(patches, dtype=np.int64)
