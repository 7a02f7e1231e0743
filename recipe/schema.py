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
from dataclasses import dataclass, field
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
    """What an image was searched for if not all its objects are annotated, as in LVIS; of the rest nothing is known.

    The captions of its objects are searched for too.

    Attributes:
        absent: Captions that the image holds no object of.
        incomplete: Captions of which it may hold more objects than are annotated.
    """

    absent: tuple[str, ...] = ()
    incomplete: tuple[str, ...] = ()


MDS_COLUMNS: Mapping[str, str] = dict(
    id="str", image="bytes", width="int", height="int", objects="json", messages="json"
)


@dataclass(frozen=True)
class Sample:
    """One record of a data set: one row of an MDS shard.

    Attributes:
        id: Unique in its data set.
        image: The original file, never re-encoded; empty for a text-only sample.
        width, height: Pixels, after EXIF orientation; 0 without an image.
        objects: Empty: an image known to hold nothing. None: not annotated, so no detection loss.
        messages: A chat (`[{"role": ..., "content": text}, ...]`); None: the detection chat is made from `objects`. A
            content may also be parts, of text, `{"type": "image"}`, or `{"type": "box", "box": xyxy}` in pixels.
        searched: None: all that is not in `objects` is known to be absent. Used in scoring, not in training.
    """

    id: str
    image: bytes
    width: int
    height: int
    objects: tuple[Object, ...] | None
    messages: tuple[Message, ...] | None = None
    searched: Searched | None = None

    @property
    def has_image(self) -> bool:
        """Return whether the sample has an image, even if `image` is empty as in the file of records."""
        return self.width > 0

    def to_mds(self) -> dict[str, Any]:
        """Return the row of `MDS_COLUMNS` that `from_mds` reads; `searched` is stored with the objects."""
        objects: Any = None
        if self.objects is not None:
            objects = [{"box": list(item.box), "caption": item.caption} for item in self.objects]
            for row, item in zip(objects, self.objects, strict=True):
                row |= ({"iscrowd": True} if item.iscrowd else {}) | ({} if item.area is None else {"area": item.area})
            if self.searched is not None:
                objects = {"objects": objects, **vars(self.searched)}
        messages = None if self.messages is None else list(self.messages)
        return {name: getattr(self, name) for name in MDS_COLUMNS} | {"objects": objects, "messages": messages}

    @classmethod
    def from_mds(cls, row: Mapping[str, Any]) -> Sample:
        """Read a row written by `to_mds`.

        Raises:
            ValueError: A column is missing: `convert/` did not write the shard.
        """
        missing = [column for column in MDS_COLUMNS if column not in row]
        if missing:
            raise ValueError(
                f"MDS row has columns {sorted(row)} but lacks {missing}: convert the data set with one of convert/*.py"
            )
        stored, objects, searched = row["objects"], None, None
        if stored is not None and "absent" in stored:  # a mapping, else a list
            searched = Searched(tuple(stored["absent"]), tuple(stored["incomplete"]))
            stored = stored["objects"]
        if stored is not None:
            objects = tuple(
                Object(tuple(item["box"]), item["caption"], item.get("iscrowd", False), item.get("area"))
                for item in stored
            )
        messages = None if row["messages"] is None else tuple(row["messages"])
        return cls(row["id"], row["image"], row["width"], row["height"], objects, messages, searched)


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
        has_student_image: The last image is the one the head solves.
        target: None: not annotated, so no detection loss.
        noise_seed: Of this sample's denoising queries in this epoch.
        is_inert: Added to keep ranks in step: nothing is learned from it or scored, and it is not counted.
        content: Identifies the pixels and the prompt; empty if not requested.
    """

    sample: Sample
    input_ids: Tensor
    roles: Tensor
    position_ids: Tensor
    prompt_length: int
    pixel_patches: Tensor
    image_grid_thw: Tensor
    has_student_image: bool
    target: Target | None
    noise_seed: int = 0
    is_inert: bool = False
    content: str = ""


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
        student_samples: Which sample each of the N images belongs to.
        targets: N of them; None if not annotated.
        noise_seeds, contents: N of them, see `Example`.
        num_tokens: Real tokens: without padding and inert samples.
        num_samples: Without the inert ones.
        num_packs: Without the inert ones; training data is counted and resumed in packs.
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
    targets: list[Target | None]
    noise_seeds: list[int]
    contents: list[str]
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
        tokens: (N, M, W), with `positions` added: Qwen2.5-VL's rotary positions are relative, so its features do not
            hold their position, which a query needs.
        positions: (N, M, W) sine embedding of the token's centre; zero for words.
        mask: (N, M) bool, True at real tokens.
        cells: (N, M, 4) cxcywh in [0, 1], the part of the image that a vision token covers; zero for words.
    """

    tokens: Tensor
    positions: Tensor
    mask: Tensor
    cells: Tensor


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


@dataclass(frozen=True)
class TokenTree:
    """Token sequences that share their beginnings, as C nodes, parents first; the first is the root, before any token.

    Attributes:
        tokens: (C - 1,) int64, the tokens of all nodes but the root.
        depths: (C,) int64, the number of tokens from the root to a node.
        mask: (C, C) bool: True if the column is the row's node or one of its ancestors.
    """

    tokens: Tensor
    depths: Tensor
    mask: Tensor


@dataclass
class DetectionOutputs:
    """What the head predicts for N images.

    Attributes:
        pred_boxes: (N, Q, 4) cxcywh in [0, 1]: the sigmoid of `pred_boxes_raw`.
        pred_boxes_raw: (N, Q, 4) before the sigmoid.
        pred_objectness: (N, Q) logits.
        query_features: (N, Q, W).
        aux_outputs: The same after each earlier layer, without their own features and aux outputs.
        groups: Of the other groups of queries, in training.
        selection: Of the proposals that the queries were chosen from; None if queries are learned.
    """

    pred_boxes: Tensor
    pred_boxes_raw: Tensor
    pred_objectness: Tensor
    query_features: Tensor
    aux_outputs: list[DetectionOutputs] = field(default_factory=list["DetectionOutputs"])
    groups: list[DetectionOutputs] = field(default_factory=list["DetectionOutputs"])
    selection: DetectionOutputs | None = None

    def layers(self) -> list[tuple[str, DetectionOutputs]]:
        """Return all outputs that are matched to objects, each with the suffix of its loss terms; last layer last."""
        found = [] if self.selection is None else [("_selection", self.selection)]
        found += [("_group", layer) for group in self.groups for layer in [*group.aux_outputs, group]]
        return [*found, *(("_aux", layer) for layer in self.aux_outputs), ("", self)]


@dataclass
class Matches:
    """Matched pairs of one layer, all images together; n = the sum of min(Q, T) over annotated images.

    Attributes:
        image: (n,) int64, which of the N images.
        query: (n,) int64, within its image.
        target: (n,) int64, the object within its image.
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


@dataclass(frozen=True)
class PredictedFile:
    """One entry of `predictions.json`: an image file and what was predicted for it.

    Attributes:
        id: Of the entry and its drawing; unique in the file.
        file: Path of the image, as given on the command line.
        image_id: In COCO results; None in files of older versions.
        prediction: Holds the objects with at least `score_threshold`; None if the image could not be used.
        score_threshold: None if the head did not run, and in files of older versions.
        error: Why the image could not be used.
        objects_below: Objects below the threshold, for the gallery's slider: no predictions, without captions. Holds
            those with at least `least_score`. Both are None if the head did not run, and in files of older versions.
    """

    id: str
    file: str
    image_id: ImageId | None
    prediction: Prediction | None
    score_threshold: float | None = None
    error: str | None = None
    least_score: float | None = None
    objects_below: tuple[DetectedObject, ...] | None = None

    def to_json(self) -> dict[str, Any]:
        """Return what `from_json` reads; if the image was not used, all but `error` and the names is null."""
        size, made = ("width", "height"), ("objects", "answer", "answer_objects", "answer_is_cut")
        known = dict.fromkeys((*size, *made)) if self.prediction is None else self.prediction.to_json()
        row = {"id": self.id, "file": self.file, "image_id": self.image_id, **{name: known[name] for name in size}}
        row["score_threshold"] = self.score_threshold
        row |= {**{name: known[name] for name in made}, "error": self.error}
        if self.objects_below is not None:
            row |= {"least_score": self.least_score, "objects_below": [item.to_json() for item in self.objects_below]}
        return row

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> PredictedFile:
        """Read what `to_json` wrote, also in a version without `score_threshold` or `objects_below`."""
        prediction = None if row["error"] is not None else Prediction.from_json(row)
        threshold, least, below = (row.get(name) for name in ("score_threshold", "least_score", "objects_below"))
        below = None if below is None else tuple(map(DetectedObject.from_json, below))
        return cls(row["id"], row["file"], row.get("image_id"), prediction, threshold, row["error"], least, below)


@dataclass
class EvalOutputs:
    """Predictions and losses of one evaluation batch.

    Attributes:
        predictions: Aligned with `batch["samples"]`.
        loss_sums: Each term before the division.
        counts: Denominators of this batch alone.
    """

    predictions: list[Prediction]
    loss_sums: dict[str, Tensor]
    counts: LossCounts


@dataclass(frozen=True)
class Origin:
    """What a run was made from.

    Attributes:
        config: The whole configuration, without secrets.
        tokenizer: Fingerprint of the tokenizer and its chat template.
        model: Fingerprint of the names and shapes of all parameters but averages.
        base: Fingerprint of the weights that its checkpoints leave out; None: they hold all.
    """

    config: dict[str, Any]
    tokenizer: str
    model: str
    base: str | None = None
