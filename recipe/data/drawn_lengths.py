"""How long the samples of an epoch are as augmentation shows them, without images and without tokenizing them.

What is drawn changes three things in a conversation: the tokens of its image, which objects its answer lists, and the
numbers of its boxes. All else was counted once. So the length of an answer is the sum of a constant, of each listed
object's words, and of its numbers, if the tokenizer ends a token on both sides of every number. The first two sums are
compared with the tokenizer's own count of every record; a tokenizer for which they differ is refused.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from enum import IntEnum
from functools import cache, cached_property

import numpy as np
from jaxtyping import Float32, Int, Int32, Int64, UInt8, UInt64
from numpy.typing import NDArray

from recipe.boxes import answer_frame, box_to_frame
from recipe.config import AugmentConfig
from recipe.data.augment import Augmentation, Moves, boxes_of, draw_shown, is_kept, largest_sides, move_boxes, moves_of
from recipe.data.chat import END_OF_TURN, box_parts
from recipe.data.encode import Encoder, naming
from recipe.data.image import resized_size
from recipe.data.kept import KeptCount, MissingRecordsError, concatenated
from recipe.data.lengths import LengthTable, fingerprint
from recipe.data.mapped import Arrays
from recipe.images import MAX_ASPECT_RATIO
from recipe.schema import Sample
from recipe.upstream.checked_stream import CheckedStream

_CHUNK = 1 << 14  # occurrences that are drawn at once: bounds the memory
_START = '[{"bbox_2d": ['  # what `recipe.boxes.objects_to_text` writes before, between and after numbers
_NEXT = '}, {"bbox_2d": ['
_END = "}]"


_MOVES = {"flipped": Moves.FLIP, "cropped": Moves.CROP, "resized": Moves.SCALE}


class Kind(IntEnum):
    """What a box is to a conversation."""

    OBJECT = 0  # listed by the answer if it is kept
    IN_PROMPT = 1
    IN_ANSWER = 2  # or later
    AROUND = 3  # all boxes of a chat; only bounds a crop


@dataclass(frozen=True)
class Parts:
    """What the lengths of N records depend on, with M boxes in all; a box takes 33 bytes, a record 24."""

    sizes: Int32[np.ndarray, "N 2"]  # width and height of the image; 1 of a record that is never moved
    moves: UInt8[np.ndarray, " N"]  # of `Moves`; without any, a record has no boxes
    num_boxes: Int32[np.ndarray, " N"]
    num_anchors: Int32[np.ndarray, " N"]  # see `boxes_of`
    numbers_in_prompt: Int32[np.ndarray, " N"]  # tokens of boxes in the prompt, as stored
    varying: Int32[np.ndarray, " N"]  # tokens from the first answer on that depend on what is drawn, as stored
    boxes: Float32[np.ndarray, "M 4"]
    kinds: UInt8[np.ndarray, " M"]  # of `Kind`
    words: Int32[np.ndarray, "M 4"]  # tokens between an object's numbers and the next, and if it is last; both flipped

    def describe(self) -> str:
        """Return how many records are never flipped, cropped or resized, as their texts might not remain true."""
        counts = {what: int(((self.moves & move) == 0).sum()) for what, move in _MOVES.items()}
        shown = [f"{count} never {what}" for what, count in counts.items() if count]
        return f"of {len(self.moves)} samples {', '.join(shown) or 'all may change'}"

    @cached_property
    def kinds_of_answer(self) -> UInt8[np.ndarray, " N"]:
        """Return what the boxes of a record's answer are; OBJECT without boxes, too, if the record may be moved."""
        kinds = np.full(len(self.moves), int(Kind.OBJECT), dtype=np.uint8)
        kinds[self.num_anchors < self.num_boxes] = Kind.IN_ANSWER
        kinds[self.moves == 0] = Kind.IN_ANSWER
        return kinds

    @cached_property
    def starts(self) -> Int64[np.ndarray, " N"]:
        """Return where the boxes of each record start."""
        counts = self.num_boxes.astype(np.int64)
        return np.cumsum(counts) - counts


class Pieces:
    """How many tokens the pieces of an answer have."""

    def __init__(self, encoder: Encoder):
        self._encoder = encoder
        self._known: dict[str, int] = {}
        # An image is at most MAX_ASPECT_RATIO times as long as wide.
        unit = encoder.image_spec.patch_size * encoder.image_spec.merge_size
        side = int((MAX_ASPECT_RATIO * encoder.image_spec.max_pixels) ** 0.5)
        numbers = [str(number) for number in range(max(1000, side) + 2 * unit)]
        self.first = np.array(self._lengths(numbers), dtype=np.int64)  # of a number after [
        self.later = np.array(self._lengths([f" {number}" for number in numbers]), dtype=np.int64)  # after a comma
        end = self._lengths([END_OF_TURN, "\n"])
        self.empty_list = sum([*self._lengths(["[]"]), *end])
        self.list = sum([*self._lengths([_START]), *end])  # without objects
        self._commas = 3 * self._lengths([","])[0]

    def _lengths(self, texts: Sequence[str]) -> list[int]:
        return [len(row) for row in self._encoder.ids(list(texts))]

    def of_numbers(self, numbers: Int64[np.ndarray, "b 4"]) -> Int64[np.ndarray, " b"]:
        """Return the tokens of the numbers of boxes in a text, without the commas."""
        return self.first[numbers[:, 0]] + self.later[numbers[:, 1:]].sum(axis=1)

    def of_words(self, captions: Sequence[str]) -> list[tuple[int, int]]:
        """Return the tokens between an object's numbers and the next object's, and those if it is the last."""
        texts = [f'], "label": {json.dumps(caption, ensure_ascii=False)}' for caption in captions]
        new = [text for text in dict.fromkeys(texts) if text not in self._known]
        both = self._lengths([text + end for text in new for end in (_NEXT, _END)])
        for text, inner, last in zip(new, both[::2], both[1::2], strict=True):
            self._known[text] = inner
            self._known[text + _END] = last
        return [(self._known[text] + self._commas, self._known[text + _END] + self._commas) for text in texts]


def count_parts(
    samples: Iterable[Sample], encoder: Encoder, augmentation: Augmentation, pieces: Pieces | None = None
) -> Arrays:
    """Return the arrays of `Parts` of some samples, whose images are not needed; `pieces` of earlier ones save time."""
    tokens = pieces or Pieces(encoder)
    records: list[tuple[int, ...]] = []
    boxes: list[NDArray[np.float32]] = [np.empty((0, 4), dtype=np.float32)]
    kinds: list[int] = []
    words: list[tuple[int, ...]] = []
    for sample in samples:
        moves = moves_of(sample, augmentation.vocabulary)
        if not moves:
            records.append((1, 1, 0, 0, 0, 0, 0))
            continue
        own, num_anchors = boxes_of(sample)
        with naming(sample):
            size = resized_size(sample.width, sample.height, encoder.image_spec)
        frame = answer_frame(encoder.box_coordinates, size)
        objects = [item for item in sample.objects or () if not item.iscrowd] if sample.messages is None else []
        exact = [item.box for item in objects] if sample.messages is None else box_parts(sample.messages)
        numbers = np.array([box_to_frame(box, (sample.width, sample.height), frame) for box in exact], dtype=np.int64)
        lengths = tokens.of_numbers(numbers.reshape(-1, 4))
        in_prompt, varying = 0, 0
        if sample.messages is None:
            kinds += [Kind.OBJECT] * len(objects)
            mirrored = [augmentation.vocabulary.mirrored(item.caption) or item.caption for item in objects]
            plain, flipped = tokens.of_words([item.caption for item in objects]), tokens.of_words(mirrored)
            words += [(*pair, *other) for pair, other in zip(plain, flipped, strict=True)]
            if objects:
                last = max(range(len(objects)), key=lambda row: (numbers[row, 1], numbers[row, 0], row))
                inner = sum(pair[0] for pair in plain) + plain[last][1] - plain[last][0]
                varying = inner + int(lengths.sum())
        else:
            answered = next((n for n, turn in enumerate(sample.messages) if turn.get("role") == "assistant"), None)
            num_prompt = len(box_parts(sample.messages[:answered]))
            kinds += [Kind.AROUND] + [Kind.IN_PROMPT] * num_prompt + [Kind.IN_ANSWER] * (len(exact) - num_prompt)
            words += [(0, 0, 0, 0)] * len(own)
            in_prompt, varying = int(lengths[:num_prompt].sum()), int(lengths[num_prompt:].sum())
        boxes.append(own.astype(np.float32))
        records.append((sample.width, sample.height, int(moves), len(own), num_anchors, in_prompt, varying))
    table = np.array(records, dtype=np.int32).reshape(-1, 7)
    return {
        "sizes": table[:, :2],
        "moves": table[:, 2].astype(np.uint8),
        **{name: table[:, column] for column, name in enumerate(_COLUMNS, start=3)},
        "boxes": np.concatenate(boxes),
        "kinds": np.array(kinds, dtype=np.uint8),
        "words": np.array(words, dtype=np.int32).reshape(-1, 4),
    }


_COLUMNS = ("num_boxes", "num_anchors", "numbers_in_prompt", "varying")


class JoinedNumbersError(MissingRecordsError):
    """The tokenizer joins the numbers of an answer with what is around them."""


@dataclass(frozen=True)
class DrawnTable(LengthTable):
    """The lengths of a data set as augmentation shows it; `samples` and `teacher_*` are as it is stored."""

    parts: Parts
    teacher_parts: Parts | None  # None: teachers are not augmented
    encoder: Encoder
    augmentation: Augmentation

    def __post_init__(self) -> None:
        """Raise JoinedNumbersError if the tokenizer's count of a record is not the sum of its parts'."""
        is_list = (self.parts.kinds_of_answer == Kind.OBJECT) & (self.samples.answer_tokens > 0)
        wrong = self.samples.answer_tokens[is_list] != self._list_tokens(self.parts)[is_list]
        if self.teacher_parts is not None:
            others = (
                self.teacher_tokens - self._list_tokens(self.teacher_parts) - self._image_tokens(self.teacher_patches)
            )
            wrong = np.concatenate([wrong, others != others[:1]])  # what is not the answer is the same in all
        if wrong.any():
            raise JoinedNumbersError(
                "train_loader.augment with this tokenizer, which joins the numbers of boxes with what is around them, "
                "so lengths cannot be planned: set train_loader.packing=null or train_loader.augment=null"
            )

    @cached_property
    def pieces(self) -> Pieces:
        """Return the lengths of pieces of answers."""
        return Pieces(self.encoder)

    def _list_tokens(self, parts: Parts) -> NDArray[np.int64]:
        """Return (N,) the tokens of answers that list all objects as stored."""
        return parts.varying + np.where(parts.num_boxes > 0, self.pieces.list, self.pieces.empty_list)

    def _image_tokens(self, patches: NDArray[np.int64]) -> NDArray[np.int64]:
        return patches // self.encoder.image_spec.merge_size**2

    def of_epoch(
        self, epoch: int, samples: Int[np.ndarray, " S"] | None, first: int = 0, with_answers: bool = True
    ) -> tuple[Int[np.ndarray, " S"], Int[np.ndarray, " S"]]:
        """Return (tokens, patches) of an epoch's occurrences from `first` on, given their positions; None: all."""
        tokens, patches = super().of_epoch(epoch, samples, first, with_answers)
        own, augmentation = self.samples, self.augmentation.in_epoch(epoch)
        samples = np.arange(len(own)) if samples is None else samples

        def of_samples(start: int, chosen: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
            words = augmentation.words(epoch, first + start, len(chosen))
            stored = own.tokens[chosen], own.patches[chosen], own.answer_tokens[chosen]
            return self._added(augmentation.config, self.parts, chosen, words, *stored, with_answers)

        added = _in_chunks(samples, of_samples)
        tokens, patches = tokens + added[0], patches + added[1]
        parts = self.teacher_parts
        if self.teachers is None or parts is None:
            return tokens, patches
        num_teachers, answers = self.teachers.config.num_teachers, self._list_tokens(parts)
        drawn = self.teachers.draw(epoch, first, own.id_hashes[samples])

        def of_teachers(start: int, chosen: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
            words = augmentation.teacher_words(epoch, first + start, len(chosen), num_teachers)
            flat = chosen.reshape(-1)
            stored = self.teacher_tokens[flat], self.teacher_patches[flat], answers[flat]
            added = self._added(augmentation.config, parts, flat, words.reshape(len(flat), -1), *stored, True)
            return added[0].reshape(chosen.shape), added[1].reshape(chosen.shape)

        shown = (drawn >= 0) & own.takes_teachers[samples, None]
        added = _in_chunks(np.maximum(drawn, 0), of_teachers)
        return (
            tokens + np.where(shown, added[0], 0).sum(axis=1),
            patches + np.where(shown, added[1], 0).sum(axis=1),
        )

    def longest(self, with_answers: bool = True) -> tuple[Int[np.ndarray, " N"], Int[np.ndarray, " N"]]:
        """Return bounds of (tokens, patches) of every sample as it can be drawn, with the longest teachers."""
        own, parts = self.samples, self.teacher_parts
        most = self._longest(self.parts, own.tokens, own.patches, own.answer_tokens, with_answers)
        teachers = self.teacher_tokens, self.teacher_patches
        if parts is not None:
            teachers = self._longest(parts, *teachers, self._list_tokens(parts), with_answers=True)
        bounds = replace(own, tokens=most[0], patches=most[1], answer_tokens=np.zeros_like(most[0]))
        return LengthTable(bounds, self.teachers, *teachers).longest()

    def _added(
        self,
        config: AugmentConfig,
        parts: Parts,
        chosen: NDArray[np.int64],
        words: UInt64[np.ndarray, "n words"],
        tokens: NDArray[np.int64],
        patches: NDArray[np.int64],
        answer_tokens: NDArray[np.int64],
        with_answers: bool,
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the (tokens, patches) that n occurrences of the `chosen` records have more than as stored.

        `tokens`, `patches` and `answer_tokens` are those of the records as stored.
        """
        spec, sizes = self.encoder.image_spec, parts.sizes[chosen].astype(np.int64)
        counts, num_anchors = parts.num_boxes[chosen].astype(np.int64), parts.num_anchors[chosen].astype(np.int64)
        anchors = parts.boxes[_rows(parts.starts[chosen], num_anchors)].astype(np.float64)
        shown = draw_shown(config, spec, words, sizes, parts.moves[chosen], anchors, num_anchors)
        can_move = parts.moves[chosen] > 0
        resized = np.array(
            [
                resized_size(width, height, spec) if moves else (0, 0)
                for (width, height), moves in zip(shown.sizes.tolist(), can_move.tolist(), strict=True)
            ],
            dtype=np.int64,
        ).reshape(-1, 2)
        shown_patches = (resized // spec.patch_size).prod(axis=1)
        rows, owners = _rows(parts.starts[chosen], counts), np.repeat(np.arange(len(chosen)), counts)
        kinds = parts.kinds[rows]
        moved, seen, cut = move_boxes(parts.boxes[rows].astype(np.float64), shown, owners)
        kept = (kinds != Kind.AROUND) & ((kinds != Kind.OBJECT) | is_kept(config, moved, seen, cut))
        rows, owners, kinds, moved = rows[kept], owners[kept], kinds[kept], moved[kept]
        frames = resized if self.encoder.box_coordinates == "absolute" else np.full_like(resized, 1000)
        limits = np.tile(frames[owners], 2)
        numbers = np.clip(np.rint(moved * limits / np.tile(shown.sizes[owners], 2)), 0, limits).astype(np.int64)
        added = self.pieces.of_numbers(numbers)

        def total(of: NDArray[np.bool_]) -> NDArray[np.int64]:
            return np.bincount(owners[of], weights=added[of], minlength=len(chosen)).astype(np.int64)

        in_prompt, stored_in_prompt = total(kinds == Kind.IN_PROMPT), parts.numbers_in_prompt[chosen]
        image_tokens = self._image_tokens(shown_patches) - self._image_tokens(patches)
        found = tokens - answer_tokens + image_tokens + in_prompt - stored_in_prompt
        if with_answers:
            listed = kinds == Kind.OBJECT
            added[listed] += self._list_words(parts, rows[listed], owners[listed], numbers[listed], shown.flips)
            varying = total(kinds != Kind.IN_PROMPT)
            is_list = parts.kinds_of_answer[chosen] == Kind.OBJECT
            fixed = np.where(varying > 0, self.pieces.list, self.pieces.empty_list)
            fixed = np.where(is_list, fixed, answer_tokens - parts.varying[chosen])
            found += np.where(answer_tokens > 0, fixed + varying, 0)
        found -= tokens if with_answers else tokens - answer_tokens
        return np.where(can_move, found, 0), np.where(can_move, shown_patches - patches, 0)

    def _list_words(
        self,
        parts: Parts,
        rows: NDArray[np.int64],
        owners: NDArray[np.int64],
        numbers: NDArray[np.int64],
        flips: NDArray[np.bool_],
    ) -> NDArray[np.int64]:
        """Return (b,) the tokens of listed objects other than their numbers; an answer lists them top to bottom."""
        words = parts.words[rows].astype(np.int64)
        words = np.where(flips[owners, None], words[:, 2:], words[:, :2])
        order = np.lexsort((numbers[:, 0], numbers[:, 1], owners))  # stable, as the answer's own sorting is
        is_last = np.ones(len(rows), dtype=np.bool_)
        is_last[:-1] = owners[order][1:] != owners[order][:-1]
        result = words[:, 0].copy()
        result[order[is_last]] = words[order[is_last], 1]
        return result

    def _longest(
        self,
        parts: Parts,
        tokens: NDArray[np.int64],
        patches: NDArray[np.int64],
        answer_tokens: NDArray[np.int64],
        with_answers: bool,
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return upper bounds of what can be drawn, close for the image: the longest numbers in every box."""
        spec, can_move = self.encoder.image_spec, parts.moves > 0
        sides = largest_sides(self.augmentation.config, spec, parts.sizes.astype(np.float64))  # (2, N, 2)
        unit = spec.patch_size * spec.merge_size
        # Sides are rounded to the nearest multiple, within the budget; or up, from the least size.
        areas = np.minimum((sides + unit / 2).prod(axis=2).max(axis=0), spec.max_pixels)
        least = (sides * np.sqrt(spec.min_pixels / sides.prod(axis=2))[:, :, None] + unit).prod(axis=2).max(axis=0)
        image_tokens = (np.maximum(areas, least) // unit**2).astype(np.int64)
        image_tokens = np.maximum(image_tokens, self._image_tokens(patches))
        if self.augmentation.is_same_size:
            image_tokens = self._image_tokens(patches)
        longest = np.maximum.accumulate(np.maximum(self.pieces.first, self.pieces.later))
        limit = np.ceil(sides.max(axis=(0, 2)) + unit).astype(np.int64)
        if self.encoder.box_coordinates != "absolute":
            limit = np.full_like(limit, 1000)
        per_box = 4 * longest[np.minimum(limit, len(longest) - 1)]
        owners = np.repeat(np.arange(len(tokens)), parts.num_boxes)
        counted = parts.kinds != Kind.AROUND
        boxes = np.bincount(owners[counted], minlength=len(tokens)) * per_box
        words = np.maximum(parts.words[:, :2], parts.words[:, 2:]).max(axis=1, initial=0)
        most_words = np.bincount(owners, weights=words, minlength=len(tokens)).astype(np.int64)
        prompts = np.bincount(owners[parts.kinds == Kind.IN_PROMPT], minlength=len(tokens)) * per_box
        found = tokens - answer_tokens + image_tokens - self._image_tokens(patches) + prompts - parts.numbers_in_prompt
        if with_answers:
            is_list = parts.kinds_of_answer == Kind.OBJECT
            fixed = np.where(is_list, max(self.pieces.list, self.pieces.empty_list), answer_tokens - parts.varying)
            found = found + np.where(answer_tokens > 0, fixed + most_words + boxes - prompts, 0)
        plain = tokens if with_answers else tokens - answer_tokens
        most_patches = image_tokens * spec.merge_size**2
        return np.where(can_move, np.maximum(found, plain), plain), np.where(can_move, most_patches, patches)


def with_draws(
    table: LengthTable,
    streams: Sequence[CheckedStream],
    encoder: Encoder,
    augmentation: Augmentation,
    share: Callable[[Callable[[], Arrays]], Arrays] = lambda count: count(),
) -> DrawnTable:
    """Return the table of what augmentation shows; `share` gives all ranks what one counts, as `shared_arrays` does.

    Raises:
        ValueError: A stream has no records, or a record cannot be used.
        JoinedNumbersError: The lengths of drawn answers are not sums of parts.
    """
    kept = kept_parts(encoder, augmentation)
    parts = Parts(**share(lambda: concatenated([kept.of(stream) for stream in streams])))
    pool, teacher_parts = table.teachers, None
    if pool is not None and augmentation.config.teachers:
        teacher_parts = Parts(**count_parts(pool.samples, encoder, augmentation))
    return DrawnTable(
        **vars(table), parts=parts, teacher_parts=teacher_parts, encoder=encoder, augmentation=augmentation
    )


def kept_parts(encoder: Encoder, augmentation: Augmentation) -> KeptCount:
    """Return the count of `Parts`, which is kept next to the index of a stream."""
    depends = f"{fingerprint(encoder)} {augmentation.vocabulary.described}"
    pieces = cache(lambda: Pieces(encoder))  # once per process
    return KeptCount(
        name="drawn_lengths",
        fingerprint=hashlib.sha256(depends.encode()).hexdigest()[:16],
        what="augmentation",
        remedy="train without train_loader.packing",
        count=lambda samples: count_parts(samples, encoder, augmentation, pieces()),
        join=concatenated,
    )


def _rows(starts: NDArray[np.int64], counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the numbers from each start on, as many as its count, one after the other."""
    ends = np.cumsum(counts)
    return np.repeat(starts - (ends - counts), counts) + np.arange(int(ends[-1]) if len(ends) else 0)


def _in_chunks(
    chosen: NDArray[np.int64], count: Callable[[int, NDArray[np.int64]], tuple[NDArray[np.int64], NDArray[np.int64]]]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return what `count` gives for each part of `chosen`, given where the part starts, one after the other."""
    found = [count(start, chosen[start : start + _CHUNK]) for start in range(0, len(chosen), _CHUNK)]
    if not found:
        return np.zeros_like(chosen), np.zeros_like(chosen)
    return np.concatenate([tokens for tokens, _ in found]), np.concatenate([patches for _, patches in found])
