"""Every noun that crosses a package, with shape, dtype and box format next to each field.

Shape legend
    B  rows of a batch               L  tokens of a row            D  width of the language model
    V  vocabulary                    K  supervised tokens          I  images of a batch
    P  vision patches of a batch     N  images the head solves     Q  object queries of an image
    M  memory tokens of an image     W  width of the head          T  objects of an image
    S  prompt tokens of a sample     C  tokens of a caption        R  captions, or denoising queries

Box formats
    xyxy    absolute pixels of the stored image, EXIF orientation applied, floats: Object, Sample, Prediction
    cxcywh  centre and size, normalised to [0, 1]: Target, DetectionOutputs
    The text of an answer holds integers in the frame that `recipe.data.chat` owns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import IntEnum
from typing import TYPE_CHECKING, Any, TypedDict

if TYPE_CHECKING:  # torch takes two seconds to import, and the converters do not need it
    from torch import Tensor

Box = tuple[float, float, float, float]
Message = dict[str, Any]
ImageId = int | str  # in COCO files


class Role(IntEnum):
    """Whose answer a supervised token belongs to; `NONE` is never supervised."""

    NONE = 0
    TEACHER = 1
    STUDENT = 2


@dataclass(frozen=True)
class Object:
    """One annotated object.

    Attributes:
        box: xyxy, absolute pixels of the displayed image.
        caption: What the object is, in words; never empty unless `iscrowd`.
        iscrowd: A region of many objects: never trained on, ignored in scoring as in COCO.
        area: Pixels of the object's mask, for COCO's size ranges; None if the data set does not give it.
    """

    box: Box
    caption: str
    iscrowd: bool = False
    area: float | None = None


@dataclass(frozen=True)
class Searched:
    """What an image was searched for next to the captions of its objects, as in LVIS; of the rest nothing is known.

    Attributes:
        absent: Captions that the image holds no object of.
        incomplete: Captions of which it may hold more objects than are annotated.
    """

    absent: tuple[str, ...] = ()
    incomplete: tuple[str, ...] = ()


MDS_COLUMNS = dict(id="str", image="bytes", width="int", height="int", objects="json", messages="json")


@dataclass(frozen=True)
class FurtherImage:
    """An image of a chat after its first, which `Sample` holds with the same fields."""

    image: bytes
    width: int
    height: int
    objects: tuple[Object, ...] | None


@dataclass(frozen=True)
class Sample:
    """One record of a data set: one row of an MDS shard.

    Attributes:
        id: Unique in its data set.
        image: The original file, never re-encoded; empty for a text-only sample.
        width, height: Pixels, after EXIF orientation; 0 without an image.
        objects: Empty: an image known to hold nothing. None: not annotated, so no detection loss.
        messages: A chat (`[{"role": ..., "content": text}, ...]`); None: the detection chat is made from `objects`. A
            content may also be parts, of text, `{"type": "image"}`, or `{"type": "box", "box": xyxy}` in pixels, with
            `"image": k` if it is of `further[k - 1]`.
        searched: None: all that is not in `objects` is known to be absent. Used in scoring, not in training.
        further: The chat's images after the first, in order.
    """

    id: str
    image: bytes
    width: int
    height: int
    objects: tuple[Object, ...] | None
    messages: tuple[Message, ...] | None = None
    searched: Searched | None = None
    further: tuple[FurtherImage, ...] = ()

    def __deepcopy__(self, memo: dict[int, Any]) -> Sample:
        return self  # nothing in it changes, and Composer copies every device batch

    @property
    def has_image(self) -> bool:
        """Return whether the sample has an image, even if `image` is empty as in the file of records."""
        return self.width > 0

    def per_image(self) -> tuple[Sample, ...]:
        """Return a sample of each image: itself, or with several images those of the ids ID#1, ID#2, ...

        An image keeps the chat if all boxes of the first answer are its own, else the questions and an empty answer.
        """
        if not self.further:
            return (self,)
        turns = self.messages or ()
        replied: Any = next((turn["content"] for turn in turns if turn.get("role") == "assistant"), ())
        answered = {part.get("image", 0) for part in replied if not isinstance(part, str) and part.get("type") == "box"}
        asked = (*(turn for turn in turns if turn.get("role") != "assistant"), {"role": "assistant", "content": ""})
        chats = [turns if answered == {number} else asked for number in range(len(self.further) + 1)]
        first = replace(self, id=f"{self.id}#1", messages=chats[0], further=())
        others = enumerate(zip(self.further, chats[1:], strict=True), start=2)
        return first, *(Sample(f"{self.id}#{number}", **vars(item), messages=chat) for number, (item, chat) in others)

    def without_bytes(self) -> Sample:
        """Return the sample without the files of its images."""
        return replace(self, image=b"", further=tuple(replace(item, image=b"") for item in self.further))

    def to_mds(self) -> dict[str, Any]:
        """Return the row that `from_mds` reads: `searched` and further images but their files join the objects."""
        more: dict[str, Any] = {} if self.searched is None or self.objects is None else {**vars(self.searched)}
        if self.further:
            names = ("num_bytes", "width", "height", "objects")
            rows = ((len(item.image), item.width, item.height, _to_rows(item.objects)) for item in self.further)
            more["further"] = [dict(zip(names, row, strict=True)) for row in rows]
        objects = {"objects": _to_rows(self.objects), **more} if more else _to_rows(self.objects)
        image = b"".join([self.image, *(item.image for item in self.further)])
        messages = None if self.messages is None else list(self.messages)
        return dict(zip(MDS_COLUMNS, (self.id, image, self.width, self.height, objects, messages), strict=True))

    @classmethod
    def from_mds(cls, row: Mapping[str, Any]) -> Sample:
        """Read a row written by `to_mds`; its image may be empty, as in the file of records.

        Raises:
            ValueError: A column is missing: `convert/` did not write the shard. Or the files are not those of the row.
        """
        missing = [column for column in MDS_COLUMNS if column not in row]
        if missing:
            raise ValueError(
                f"MDS row has columns {sorted(row)} but lacks {missing}: convert the data set with one of convert/*.py"
            )
        data, found, searched = row["image"], row["objects"], None
        stored: dict[str, Any] = {"objects": found}
        if found is not None and "objects" in found:  # a mapping, else a list
            stored = found
        if "absent" in stored:
            searched = Searched(tuple(stored["absent"]), tuple(stored["incomplete"]))
        rows: list[Any] = stored.get("further", [])
        begin = len(data) - (sum(item["num_bytes"] for item in rows) if data else 0)  # of the next further image
        if begin < bool(data):
            raise ValueError(f"{row['id']!r} has too few bytes ({len(data)}) for its images: convert the set again")
        image, further = data[:begin], list[FurtherImage]()
        for item in rows:
            file = data[begin : begin + item["num_bytes"]]
            further.append(FurtherImage(file, item["width"], item["height"], _to_objects(item["objects"])))
            begin += item["num_bytes"]
        messages = None if row["messages"] is None else tuple(row["messages"])
        first = (image, row["width"], row["height"], _to_objects(stored["objects"]))
        return cls(row["id"], *first, messages, searched, tuple(further))


def _to_rows(objects: Sequence[Object] | None) -> list[dict[str, Any]] | None:
    if objects is None:
        return None
    rows: list[dict[str, Any]] = []
    for item in objects:
        marks = ({"iscrowd": True} if item.iscrowd else {}) | ({} if item.area is None else {"area": item.area})
        rows.append({"box": list(item.box), "caption": item.caption, **marks})
    return rows


def _to_objects(rows: Sequence[Mapping[str, Any]] | None) -> tuple[Object, ...] | None:
    if rows is None:
        return None
    return tuple(Object(tuple(row["box"]), row["caption"], row.get("iscrowd", False), row.get("area")) for row in rows)


@dataclass(frozen=True)
class ImageSpec:
    """How the checkpoint wants its images.

    Attributes:
        patch_size: Pixels along one side of a vision patch.
        merge_size: Patches along one side of a vision token.
        min_pixels: Smaller images are enlarged to it.
        max_pixels: Larger images are reduced to it.
        image_mean, image_std: Per channel, of pixels in [0, 1].
    """

    patch_size: int
    merge_size: int
    min_pixels: int
    max_pixels: int
    image_mean: tuple[float, ...]
    image_std: tuple[float, ...]

    @property
    def patch_values(self) -> int:
        """Return the bytes of one patch: 3 * patch * patch."""
        return 3 * self.patch_size**2


class Target(TypedDict):
    """What the head should find in one image, without crowd regions.

    Attributes:
        boxes: (T, 4) float32, cxcywh normalised.
        caption_ids: (T, C) int64, each caption followed by end-of-sequence, padded with -100.
    """

    boxes: Tensor
    caption_ids: Tensor


@dataclass
class Example:
    """One sample, encoded: the teacher turns, then the student turn. Nothing in it depends on the batch.

    Attributes:
        sample: The student's record (without its image bytes unless evaluation needs them).
        input_ids: (L,) int64.
        roles: (L,) uint8 of `Role`: whose answer each token belongs to.
        position_ids: (3, L) int64, rotary positions (time, height, width) from 0.
        prompt_length: Tokens up to and including the student's generation prompt: what inference sees.
        pixel_patches: (P, 3 * patch * patch) uint8, patches of all images in Qwen2-VL order.
        image_grid_thw: (I, 3) int64, patches along time, height and width.
        num_prompt_images: Of the I images: later ones follow the first answer.
        student_images: Which of the sample's own images the head solves: the annotated ones, or the only one.
        targets: Of each solved image; None: not annotated, so no detection loss.
        noise_seeds: Of their denoising queries in this epoch.
        is_inert: Added to keep ranks in step: nothing is learned from it or scored, and it is not counted.
        contents: Of each solved image: identifies its pixels and the prompt; empty if not requested.
        drawn: How its image is shown, in words; empty without augmentation.
    """

    sample: Sample
    input_ids: Tensor
    roles: Tensor
    position_ids: Tensor
    prompt_length: int
    pixel_patches: Tensor
    image_grid_thw: Tensor
    num_prompt_images: int
    student_images: list[int]
    targets: list[Target | None]
    noise_seeds: list[int]
    contents: list[str]
    is_inert: bool = False
    drawn: str = ""


@dataclass
class Pack:
    """Samples that share one row: the unit of a data set's items. Without packing, one sample each.

    Attributes:
        number: In the plan of the epoch.
        examples: In order; never empty.
        skipped: Samples of the pack that could not be used: id → reason.
        is_inert: A repetition that keeps ranks in step; not counted.
    """

    number: int
    examples: list[Example]
    skipped: dict[str, str] = field(default_factory=dict[str, str])
    is_inert: bool = False


class LossCounts(TypedDict):
    """Denominators of the loss terms over the whole global batch: all microbatches of all ranks."""

    teacher_tokens: float
    student_tokens: float
    objects: float
    images: float
    microbatches: float


class Batch(TypedDict):
    """One microbatch, collated. `standard`: right-padded rows. `packed`: one row, no padding.

    The index fields index the flattened (B * L) tokens, so that readers need not distinguish the two layouts.

    Attributes:
        samples: The students' records, in order.
        input_ids: (B, L) int64.
        attention_mask: (B, L) int64, 1 for tokens and 0 for padding; None when packed.
        position_ids: (3, B, L) int64; when packed (4, 1, L), with row 0 restarting at 0 for every sample.
        segment_lengths: Tokens of each sample of a packed row; None for padded rows.
        label_index: (K,) int64, the positions that predict a supervised token (the token before it).
        labels: (K,) int64, the supervised tokens.
        label_roles: (K,) int64 of `Role`.
        prompt_index: (N, S) int64, the prompt positions of each solved image's sample, padded with -1.
        pixel_patches: (P, 3 * patch * patch) uint8.
        image_grid_thw: (I, 3) int64.
        student_images: (N,) int64, which of the I images the head solves.
        student_samples: Which sample each of the N images belongs to; rising.
        student_views: N of them, the record of each image alone: see `Sample.per_image`.
        prompt_images: N of them: which of the I images the prompt holds, in order.
        targets, noise_seeds, contents, drawn: See `Example`; N of them, but `drawn` of each sample.
        num_tokens: Real tokens: without padding and inert samples.
        num_samples, num_packs: Without the inert ones; training data is counted and resumed in packs.
        skipped: Samples that could not be used: id → reason.
    """

    samples: list[Sample]
    input_ids: Tensor
    attention_mask: Tensor | None
    position_ids: Tensor
    segment_lengths: list[int] | None
    label_index: Tensor
    labels: Tensor
    label_roles: Tensor
    prompt_index: Tensor
    pixel_patches: Tensor
    image_grid_thw: Tensor
    student_images: Tensor
    student_samples: list[int]
    student_views: list[Sample]
    prompt_images: list[list[int]]
    targets: list[Target | None]
    noise_seeds: list[int]
    contents: list[str]
    drawn: list[str]
    num_tokens: int
    num_samples: int
    num_packs: int
    skipped: dict[str, str]


class CountedBatch(Batch):
    """A training microbatch with the denominators of its whole global batch."""

    loss_counts: LossCounts


@dataclass
class Memory:
    """What the head may look at: one padded row of tokens per image.

    Attributes:
        tokens: (N, M, W), with `positions` added: features hold none, as Qwen2.5-VL's rotary positions are relative.
        positions: (N, M, W) sine embedding of the token's centre; zero for words.
        mask: (N, M) bool, True at real tokens.
        cells: (N, M, 4) cxcywh in [0, 1], the part of the image that a vision token covers; zero for words.
        levels: Maps (N, rows, columns, W) of a feature pyramid, the finest first; zero beyond the image.
        extents: (N, levels, 2), the shares (x, y) of each map that the image covers; None without a pyramid.
        finest_sizes: (rows, columns) of each image's own part of the finest map.
    """

    tokens: Tensor
    positions: Tensor
    mask: Tensor
    cells: Tensor
    levels: list[Tensor] = field(default_factory=list["Tensor"])
    extents: Tensor | None = None
    finest_sizes: list[tuple[int, int]] = field(default_factory=list[tuple[int, int]])


@dataclass
class Proposals:
    """What each of the P cells of the finest map of N images proposes.

    Attributes:
        cells: (N, P, 4) cxcywh in [0, 1], the part of the image that a cell covers; zero at padding.
        pred_boxes, pred_objectness: (N, P, 4) cxcywh, which may reach beyond the image, and (N, P) logits.
    """

    cells: Tensor
    pred_boxes: Tensor
    pred_objectness: Tensor


@dataclass
class DenoisingQueries:
    """Noised boxes of N images; G groups of (T positive, T negative) queries, T padded to the largest image.

    Attributes:
        boxes: (N, R, 4) cxcywh with R = G * 2 * T: the reference boxes.
        valid: (N, R) bool, False at padding.
        target_boxes: (N, R, 4) cxcywh: what each query should become.
        positive: (N, R) bool: True if the query is an object, False if it should be rejected.
        num_groups: G.
    """

    boxes: Tensor
    valid: Tensor
    target_boxes: Tensor
    positive: Tensor
    num_groups: int

    def __len__(self) -> int:
        return self.boxes.shape[1]


@dataclass(frozen=True)
class CaptionPlaces:
    """Which of N images each of R captions belongs to.

    Attributes:
        image: (R,) int64.
        slot: (R,) int64, distinct within an image.
        num_images: N.
        num_slots: T, more than any slot.
    """

    image: Tensor
    slot: Tensor
    num_images: int
    num_slots: int

    def side_by_side(self, rows: Tensor) -> Tensor:
        """Return (R, ...) as (N, T, ...), zero in slots without a caption."""
        slots = rows.new_zeros(self.num_images, self.num_slots, *rows.shape[1:])
        return slots.index_put((self.image, self.slot), rows)

    def rows(self, slots: Tensor) -> Tensor:
        """Return (N, T, ...) as (R, ...)."""
        return slots[self.image, self.slot]


@dataclass
class DetectionOutputs:
    """What the head predicts for N images.

    Attributes:
        pred_boxes: (N, Q, 4) cxcywh, relative to the image, which they may reach beyond.
        pred_objectness: (N, Q) logits.
        query_features: (N, Q, W).
        aux_outputs: The same after each earlier layer, without their own features and aux outputs.
        groups: Of the other groups of queries, in training.
        proposals: That the queries were chosen from; None if queries are learned.
    """

    pred_boxes: Tensor
    pred_objectness: Tensor
    query_features: Tensor
    aux_outputs: list[DetectionOutputs] = field(default_factory=list["DetectionOutputs"])
    groups: list[DetectionOutputs] = field(default_factory=list["DetectionOutputs"])
    proposals: Proposals | None = None

    def layers(self) -> list[tuple[str, DetectionOutputs]]:
        """Return all outputs that are matched to objects, each with the suffix of its loss terms; last layer last."""
        found = [("_group", layer) for group in self.groups for layer in [*group.aux_outputs, group]]
        return [*found, *(("_aux", layer) for layer in self.aux_outputs), ("", self)]


@dataclass
class Matches:
    """Matched pairs of one layer, all images together; n = the sum of min(Q, T) over annotated images.

    Attributes:
        image: (n,) int64, which of the N images.
        query, target: (n,) int64, the query and the object within its image.
    """

    image: Tensor
    query: Tensor
    target: Tensor

    def __len__(self) -> int:
        return len(self.image)


@dataclass
class JointOutputs:
    """What one forward pass returns.

    Attributes:
        label_losses: (K,), cross-entropy of each supervised position.
        memory: Of the N images.
        detection: Of the object queries.
        denoising: The queries and their outputs; None outside training.
        matches: One for each of `detection.layers()`.
        targets: N of them.
        caption_losses: (k,), cross-entropy of each token of all matched captions.
        caption_labels, caption_images: (k,) int64, each token and its image.
    """

    label_losses: Tensor
    memory: Memory
    detection: DetectionOutputs
    denoising: tuple[DenoisingQueries, DetectionOutputs] | None
    matches: list[Matches]
    targets: Sequence[Target | None]
    caption_losses: Tensor
    caption_labels: Tensor
    caption_images: Tensor


@dataclass(frozen=True)
class DetectedObject:
    """One predicted object: xyxy in original-image pixels, objectness in [0, 1], caption in words.

    If it was to be one of some classes, `classes` holds (class, probability) of the likely ones, best first, and the
    caption is the first.
    """

    box: Box
    score: float
    caption: str
    classes: tuple[tuple[str, float], ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return what `from_json` reads."""
        row = {"box": list(self.box), "score": self.score, "caption": self.caption}
        return {**row, "classes": dict(self.classes)} if self.classes else row

    def per_class(self) -> list[DetectedObject]:
        """Return one object per class, its score times the class's probability; the object itself without classes."""
        if not self.classes:
            return [self]
        return [DetectedObject(self.box, self.score * share, name) for name, share in self.classes]

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> DetectedObject:
        """Read what `to_json` wrote; the objects of a text answer have no score, which is 1."""
        classes = tuple(row.get("classes", {}).items())
        return cls(tuple(row["box"]), row.get("score", 1.0), row["caption"], classes)


@dataclass(frozen=True)
class Prediction:
    """What the model predicts for one image.

    Attributes:
        id: The sample's id, or the file's name.
        width, height: Pixels of the displayed image.
        objects: By decreasing score.
        answer: The language model's text; None if it did not run.
        answer_objects: The objects parsed from `answer` (score 1.0); None without an answer or if it does not parse.
        answer_is_cut: The answer reached `evaluation.max_new_tokens`, so its end is missing.
        with_head: False: the head did not run, so `objects` is empty.
    """

    id: str
    width: int
    height: int
    objects: tuple[DetectedObject, ...]
    answer: str | None = None
    answer_objects: tuple[DetectedObject, ...] | None = None
    answer_is_cut: bool = False
    with_head: bool = True

    def to_json(self) -> dict[str, Any]:
        """Return what `from_json` reads, without loss."""
        answered = None if self.answer_objects is None else [item.to_json() for item in self.answer_objects]
        for row in answered or ():
            if row["score"] == 1:  # as all objects of a text answer have
                del row["score"]
        row = {**vars(self), "objects": None, "answer_objects": answered}
        if row.pop("with_head"):
            row["objects"] = [item.to_json() for item in self.objects]
        return row

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> Prediction:
        """Read what `to_json` wrote, also in a version without `answer_is_cut`."""
        objects, answered = (
            None if row[name] is None else tuple(map(DetectedObject.from_json, row[name]))
            for name in ("objects", "answer_objects")
        )
        made = (objects or (), row["answer"], answered, bool(row.get("answer_is_cut")), objects is not None)
        return cls(row["id"], row["width"], row["height"], *made)


@dataclass
class EvalOutputs:
    """Predictions and losses of one evaluation batch.

    Attributes:
        samples, predictions: Aligned, see `recipe.prediction.decode.evaluated`.
        loss_sums: Each term before the division.
        counts: Denominators of this batch alone.
    """

    samples: list[Sample]
    predictions: list[Prediction]
    loss_sums: dict[str, Tensor]
    counts: LossCounts
