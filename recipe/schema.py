"""The nouns: every structure that crosses a file, with shape, dtype and box format beside each field.

Shape legend
    B  rows of a batch               L  tokens of a row            D  width of the language model
    V  vocabulary                    K  supervised tokens          I  images of a batch
    P  vision patches of a batch     N  images the head solves     Q  object queries of an image
    M  memory tokens of an image     W  width of the head          T  objects of an image
    S  prompt tokens of a sample     C  tokens of a caption

Box formats
    xyxy    absolute pixels of the stored picture, EXIF orientation applied, floats: Object, Sample, Prediction
    cxcywh  centre and size, normalised to [0, 1]: Target, DetectionOutputs
    In the text of an answer boxes are integers in the frame `recipe.data.chat` owns.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from typing import TYPE_CHECKING, Any, TypedDict

if TYPE_CHECKING:
    from torch import Tensor

Box = tuple[float, float, float, float]
Message = dict[str, Any]


class Role(IntEnum):
    """Whose answer a supervised token belongs to; `NONE` is never supervised."""

    NONE = 0
    TEACHER = 1
    STUDENT = 2


@dataclass(frozen=True)
class Object:
    """One annotated object.

    Attributes:
        box: xyxy, absolute pixels of the displayed picture.
        caption: What the object is, in words; never empty unless `iscrowd`.
        iscrowd: A region of many objects: never trained on, ignored in scoring as COCO does.
        area: Pixels of the object's mask where the data set tells, for COCO's size ranges; else None.
    """

    box: Box
    caption: str
    iscrowd: bool = False
    area: float | None = None


MDS_COLUMNS: Mapping[str, str] = {
    "id": "str",
    "image": "bytes",
    "width": "int",
    "height": "int",
    "objects": "json",
    "messages": "json",
}


@dataclass(frozen=True)
class Sample:
    """One record of a data set: one row of an MDS shard.

    Attributes:
        id: Unique in its data set.
        image: The original file, never re-encoded; empty for a text-only sample.
        width: Pixels, after EXIF orientation; 0 without a picture.
        height: Pixels, after EXIF orientation; 0 without a picture.
        objects: Empty: an image known to hold nothing. None: not annotated, so no detection loss.
        messages: A chat (`[{"role": ..., "content": text}, ...]`), or None: then the detection chat is made
            from `objects`.
    """

    id: str
    image: bytes
    width: int
    height: int
    objects: tuple[Object, ...] | None
    messages: tuple[Message, ...] | None = None

    @property
    def has_image(self) -> bool:
        """It has a picture, though perhaps not here: the sidecar of records holds samples without their bytes."""
        return self.width > 0

    def to_mds(self) -> dict[str, Any]:
        """The row of `MDS_COLUMNS` that `from_mds` reads back."""
        objects: list[dict[str, Any]] | None = None
        if self.objects is not None:
            objects = []
            for item in self.objects:
                row: dict[str, Any] = {"box": list(item.box), "caption": item.caption}
                if item.iscrowd:
                    row["iscrowd"] = True
                if item.area is not None:
                    row["area"] = item.area
                objects.append(row)
        return {
            "id": self.id,
            "image": self.image,
            "width": self.width,
            "height": self.height,
            "objects": objects,
            "messages": None if self.messages is None else list(self.messages),
        }

    @classmethod
    def from_mds(cls, row: Mapping[str, Any]) -> Sample:
        """Reads a row written by `to_mds`.

        Raises:
            ValueError: A column is missing, naming it: the shard was not written by `convert/`.
        """
        missing = [column for column in MDS_COLUMNS if column not in row]
        if missing:
            raise ValueError(
                f"MDS row has columns {sorted(row)} but lacks {missing}: convert the data set with one of convert/*.py"
            )
        objects = None
        if row["objects"] is not None:
            objects = tuple(
                Object(tuple(item["box"]), item["caption"], item.get("iscrowd", False), item.get("area"))
                for item in row["objects"]
            )
        messages = None if row["messages"] is None else tuple(row["messages"])
        return cls(row["id"], row["image"], row["width"], row["height"], objects, messages)


class Target(TypedDict):
    """What the head is to find in one image; crowd regions left out.

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
        sample: The student's record (its picture dropped unless evaluation needs it).
        input_ids: (L,) int64.
        roles: (L,) uint8 of `Role`: whose answer each token belongs to.
        position_ids: (3, L) int64, rotary positions (time, height, width) from 0.
        prompt_length: Tokens up to and including the student's generation prompt: what inference sees.
        pixel_patches: (P, 3 * patch * patch) uint8, patches of all images in Qwen2-VL order.
        image_grid_thw: (I, 3) int64, patches along time, height and width.
        has_student_image: The last image is the one the head solves.
        target: None where not annotated: no detection loss.
        noise_seed: Of this sample's denoising queries in this epoch.
        is_inert: Has nothing to learn or to score: keeps ranks in step, counts for nothing.
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


@dataclass
class Pack:
    """Samples that share one row: what a training step is dealt. Without packing, one sample each.

    Attributes:
        number: In the plan of the epoch.
        examples: In order; never empty.
        skipped: Samples of the pack that could not be used: their reason by their id.
        is_inert: A pack dealt a second time, to keep ranks in step: counts for nothing.
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

    The index fields are counted in the flattened (B * L) tokens, so that every reader is the same for both.

    Attributes:
        samples: The students' records, in order.
        input_ids: (B, L) int64.
        attention_mask: (B, L) int64, 1 for tokens and 0 for padding; None when packed.
        position_ids: (3, B, L) int64; when packed (4, 1, L), row 0 restarting at 0 for every sample.
        segment_lengths: Tokens of each sample of a packed row; None for padded rows.
        label_index: (K,) int64, the positions that predict a supervised token (the token before it).
        labels: (K,) int64, the supervised tokens.
        label_roles: (K,) int64 of `Role`.
        prompt_index: (N, S) int64, the prompt positions of each solved image's sample, padded with -1.
        pixel_patches: (P, 3 * patch * patch) uint8.
        image_grid_thw: (I, 3) int64.
        student_images: (N,) int64, which of the I images the head solves.
        student_samples: which sample each of the N images belongs to.
        targets: N of them; None where not annotated.
        noise_seeds: N of them, see `Example`.
        num_tokens: Real tokens: neither padding nor inert samples are counted.
        num_samples: Without the inert ones.
        num_packs: Of a training stream, without the inert ones: the unit in which it is dealt and resumed.
        skipped: Samples left out because they could not be used: their reason by their id.
        loss_counts: Set by `split_batch`, before the forward pass; None: count this batch alone.
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
    num_tokens: int
    num_samples: int
    num_packs: int
    skipped: dict[str, str]
    loss_counts: LossCounts | None


@dataclass
class DetectionOutputs:
    """What the head says of N images.

    Attributes:
        pred_boxes: (N, Q, 4) cxcywh in [0, 1]: the sigmoid of `pred_boxes_raw`.
        pred_boxes_raw: (N, Q, 4) before the sigmoid.
        pred_objectness: (N, Q) logits.
        query_features: (N, Q, W).
        aux_outputs: The same (without features or aux outputs of their own) after each earlier layer.
        groups: Of the further groups of queries, in training.
        selection: Of the proposals that the queries were chosen from; None: they are learned.
    """

    pred_boxes: Tensor
    pred_boxes_raw: Tensor
    pred_objectness: Tensor
    query_features: Tensor
    aux_outputs: list[DetectionOutputs] = field(default_factory=list["DetectionOutputs"])
    groups: list[DetectionOutputs] = field(default_factory=list["DetectionOutputs"])
    selection: DetectionOutputs | None = None

    def layers(self) -> list[tuple[str, DetectionOutputs]]:
        """All that is matched to the objects, each with the suffix of its loss terms; the last layer's are last."""
        found = [] if self.selection is None else [("_selection", self.selection)]
        found += [("_group", layer) for group in self.groups for layer in [*group.aux_outputs, group]]
        return [*found, *(("_aux", layer) for layer in self.aux_outputs), ("", self)]


@dataclass(frozen=True)
class DetectedObject:
    """One predicted object: xyxy in original-image pixels, objectness in [0, 1], caption in words."""

    box: Box
    score: float
    caption: str


@dataclass(frozen=True)
class Prediction:
    """What the model says of one picture.

    Attributes:
        id: The sample's id, or the file's name.
        width: Pixels of the displayed picture.
        height: Pixels of the displayed picture.
        objects: By falling score.
        answer: The language model's text, or None where none was generated.
        answer_objects: The objects parsed from `answer` (score 1.0); None where it did not parse or was not generated.
        answer_is_cut: The answer was longer than `evaluation.max_new_tokens`, so it lacks its end.
    """

    id: str
    width: int
    height: int
    objects: tuple[DetectedObject, ...]
    answer: str | None = None
    answer_objects: tuple[DetectedObject, ...] | None = None
    answer_is_cut: bool = False
