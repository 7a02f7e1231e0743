"""Sample → Example: the conversation as ids with roles, the images as patches, the head's target."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any, cast

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from recipe.boxes import answer_frame, box_to_frame, objects_to_text, pixels_to_normalized
from recipe.config import PromptConfig
from recipe.data import chat
from recipe.data.augment import Drawn
from recipe.data.chat import Segment
from recipe.data.image import patchify, resized_size
from recipe.families import box_coordinates
from recipe.schema import Box, Example, ImageSpec, Object, Role, Sample, Target

KEPT_TEXTS, KEPT_LENGTH = 4096, 256  # texts whose ids are kept, and the characters of one at most


def rope_positions(
    input_ids: Int64[Tensor, " L"], image_grid_thw: Int64[Tensor, "I 3"], hf_config: Any
) -> Int64[Tensor, "3 L"]:
    """Return a sample's positions along time, height and width, from 0; it may have no image.

    Equals `get_rope_index` of every family for images, which takes seven times as long.
    """
    merge = hf_config.vision_config.spatial_merge_size
    places = np.flatnonzero(input_ids.numpy() == hf_config.image_token_id)
    positions = np.empty((3, len(input_ids)), dtype=np.int64)
    position, done, first = 0, 0, 0  # the next position, token and place
    for _, height, width in image_grid_thw.tolist():
        rows, columns = height // merge, width // merge
        start = int(places[first])
        positions[:, done:start] = np.arange(position, position + start - done)
        position, done = position + start - done, start + rows * columns
        positions[:, start:done] = position
        positions[1, start:done] += np.arange(rows).repeat(columns)
        positions[2, start:done] += np.tile(np.arange(columns), rows)
        position, first = position + max(rows, columns), first + rows * columns
    positions[:, done:] = np.arange(position, position + len(input_ids) - done)
    return torch.from_numpy(positions)


def num_prompt_segments(student: Sequence[Segment]) -> int:
    """Return how many segments of a student turn precede its first answer: what inference sees."""
    answers = (position for position, segment in enumerate(student) if segment.role is Role.STUDENT)
    return next(answers, len(student))


def without_answers(student: Sequence[Segment]) -> Sequence[Segment]:
    """Return the segments of a student turn that an epoch without answers reads: its prompt and all its images.

    If an image follows an answer, the answer stays too.
    """
    with_image = [end for end, segment in enumerate(student, start=1) if chat.IMAGE in segment.text]
    return student[: max([num_prompt_segments(student), *with_image])]


def solved_images(sample: Sample) -> list[int]:
    """Return which of a sample's images, from 0, the head solves: the annotated ones, or the only one."""
    views = sample.per_image() if sample.has_image else ()
    return [number for number, view in enumerate(views) if view.objects is not None or len(views) == 1]


@contextmanager
def naming(sample: Sample) -> Iterator[None]:
    """Put the sample's id in front of a ValueError."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"sample {sample.id!r}: {error}") from error


@dataclass(frozen=True)
class Encoder:
    """Encodes a sample and its teachers; the same input always gives the same example."""

    tokenizer: PreTrainedTokenizerBase
    hf_config: Any
    image_spec: ImageSpec
    prompt: PromptConfig
    max_caption_tokens: int  # of the longest caption, including end-of-sequence
    max_seq_len: int  # of the longest conversation
    keep_image: bool = False  # keep the student's image bytes in the example, for drawing
    with_content: bool = False  # identify each example's pixels and prompt
    _kept: dict[str, list[int]] = field(default_factory=dict[str, list[int]], init=False, repr=False, compare=False)

    @property
    def box_coordinates(self) -> str:
        """Return how answers write boxes."""
        return box_coordinates(self.prompt, self.hf_config)

    @property
    def pad_token_id(self) -> int:
        """Return the id that pads rows."""
        return cast(int, self.tokenizer.pad_token_id)

    def __call__(
        self,
        sample: Sample,
        teachers: Sequence[Sample] = (),
        with_answers: bool = True,
        drawn: Sequence[Drawn | None] = (),
    ) -> Example:
        """Encode the teacher turns, then the student turn; `drawn` says how each image is shown, if augmented.

        A sample without `objects` and `messages` gives its prompt alone, as in prediction: exactly the first
        `prompt_length` ids of the annotated sample, none supervised. So does any sample if not `with_answers`: its
        student turn ends with the prompt, or with its last image if that follows an answer, and no answer is
        supervised.

        Raises:
            ValueError: The sample or a teacher cannot be used; names its id and the remedy.
        """
        with naming(sample):
            head, student = self.segments(sample, teachers, with_answers)
            views = sample.per_image() if sample.has_image else ()
            with_image = (*teachers, *views)
            shown = zip(with_image, [*drawn, *[None] * len(with_image)], strict=False)
            images = [patchify(item.image, self.image_spec, how) for item, how in shown]
            for item, (_, (_, rows, columns)) in zip(with_image, images, strict=True):
                patch = self.image_spec.patch_size
                if resized_size(item.width, item.height, self.image_spec) != (columns * patch, rows * patch):
                    raise ValueError(  # boxes refer to the stated size
                        f"the image of {item.id!r} does not have the stated {item.width} x {item.height} pixels: "
                        "convert the data set again"
                    )
            image_grid_thw = torch.tensor([grid for _, grid in images], dtype=torch.int64).view(-1, 3)
            tokens_per_image = (image_grid_thw.prod(-1) // self.image_spec.merge_size**2).tolist()
            input_ids, roles, prompt_length, num_prompt_images = self._tokenize(head, student, tokens_per_image)
            if len(input_ids) > self.max_seq_len:
                raise ValueError(
                    f"its conversation is {len(input_ids)} tokens long ({sum(tokens_per_image)} of them of "
                    f"{len(images)} images), above max_seq_len {self.max_seq_len}: raise max_seq_len, "
                    "or lower image.max_pixels or teachers.num_teachers"
                )
            no_patches = torch.empty(0, self.image_spec.patch_values, dtype=torch.uint8)
            pixel_patches = torch.cat([no_patches, *(patches for patches, _ in images)])
            solved = solved_images(sample)
            content = ""
            if self.with_content:
                content = self._content_of(input_ids[:prompt_length], image_grid_thw, pixel_patches)
            return Example(
                sample=sample if self.keep_image else sample.without_bytes(),
                input_ids=input_ids,
                roles=roles if with_answers else torch.zeros_like(roles),
                position_ids=rope_positions(input_ids, image_grid_thw, self.hf_config),
                prompt_length=prompt_length,
                pixel_patches=pixel_patches,
                image_grid_thw=image_grid_thw,
                num_prompt_images=num_prompt_images,
                student_images=solved,
                targets=[self._target(views[number]) for number in solved],
                noise_seeds=[0 for _ in solved],
                contents=[content if len(views) == 1 else f"{content}#{number}" for number in solved],
            )

    def _content_of(self, *tensors: Tensor) -> str:
        """Return 40 hex digits of the tensors and of how pixels are normalised."""
        content = blake2b(repr((self.image_spec, [tuple(tensor.shape) for tensor in tensors])).encode(), digest_size=20)
        for tensor in tensors:
            content.update(tensor.contiguous().numpy().data)
        return content.hexdigest()

    def segments(
        self, sample: Sample, teachers: Sequence[Sample] = (), with_answers: bool = True
    ) -> tuple[list[Segment], list[Segment]]:
        """Return the segments before the student turn, and its own, without decoding images; raises as `__call__`."""
        head, student = self._segments(sample, teachers)
        return head, student if with_answers else list(without_answers(student))

    def _segments(self, sample: Sample, teachers: Sequence[Sample]) -> tuple[list[Segment], list[Segment]]:
        if sample.objects is not None and not sample.has_image:
            raise ValueError("it has objects but no image: add the image, or write null for the objects")
        messages, views = None, sample.per_image() if sample.has_image else ()
        if sample.messages is not None:
            messages = chat.write_boxes(
                sample.messages, lambda box, image: str(self._to_frame(_image_of(views, image), box))
            )
        head = chat.system_segments(chat.system_of(messages or (), self.prompt.system))
        for teacher in teachers:
            head += self.teacher_segments(teacher)
        if messages is not None:
            return head, chat.message_segments(messages, len(views))
        if sample.further:
            raise ValueError("it has several images but no messages: add a chat about them, or make each a sample")
        if not sample.has_image:
            raise ValueError("it has neither an image nor messages: add one of them, or remove the sample")
        student = [Segment(chat.detection_question(self.prompt))]
        if sample.objects is not None and self.prompt.student_answer is not False:
            student += chat.answer_segments(self._answer(sample, sample.objects), Role.STUDENT)
        return head, student

    def teacher_segments(self, teacher: Sample) -> list[Segment]:
        """Return the turns of one teacher; raise ValueError if it is not an annotated image, or cannot be used."""
        if teacher.objects is None or not teacher.has_image or teacher.further:
            raise ValueError(f"its teacher {teacher.id!r} is not an annotated image: choose the pool again")
        try:
            answer = chat.answer_segments(self._answer(teacher, teacher.objects), Role.TEACHER)
        except ValueError as error:
            raise ValueError(f"its teacher {teacher.id!r}: {error}") from error
        return [Segment(chat.detection_question(self.prompt)), *answer]

    def _answer(self, sample: Sample, objects: Sequence[Object]) -> str:
        return objects_to_text(objects, (sample.width, sample.height), self._frame(sample))

    def _to_frame(self, sample: Sample, box: Box) -> list[int]:
        return box_to_frame(box, (sample.width, sample.height), self._frame(sample))

    def _frame(self, sample: Sample) -> tuple[int, int]:
        return answer_frame(self.box_coordinates, resized_size(sample.width, sample.height, self.image_spec))

    def _tokenize(
        self, head: list[Segment], student: list[Segment], tokens_per_image: list[int]
    ) -> tuple[Tensor, Tensor, int, int]:
        """Tokenize each segment alone and concatenate: ids (L,), roles (L,), and the prompt's length and images."""
        ids: list[int] = []
        roles: list[int] = []
        image_token_id, images = self.hf_config.image_token_id, iter(tokens_per_image)
        prompt_length, num_prompt_images, first_answer = 0, 0, len(head) + num_prompt_segments(student)
        segments = [*head, *student]
        rows = self.ids([segment.text for segment in segments])
        for position, (segment, row) in enumerate(zip(segments, rows, strict=True)):
            for token in row:
                ids += [token] * (next(images) if token == image_token_id else 1)
            roles += [int(segment.role)] * (len(ids) - len(roles))
            if position < first_answer:  # all that the head may read
                prompt_length = len(ids)
                num_prompt_images += row.count(image_token_id)
        assert next(images, None) is None, "every image has its placeholder"
        ids_and_roles = torch.tensor(ids, dtype=torch.int64), torch.tensor(roles, dtype=torch.uint8)
        return *ids_and_roles, prompt_length, num_prompt_images

    def ids(self, texts: list[str]) -> list[list[int]]:
        """Return the token ids of each text alone; do not change them, as those of short texts are kept.

        What is not kept is encoded in one call: a call costs more than a short text.
        """
        new = [text for text in dict.fromkeys(texts) if text not in self._kept]
        found: dict[str, list[int]] = {}
        if new:
            encoded = self.tokenizer(new, add_special_tokens=False, return_attention_mask=False)
            found = dict(zip(new, cast(list[list[int]], encoded["input_ids"]), strict=True))
            short = [text for text in new if len(text) <= KEPT_LENGTH]
            self._kept.update((text, found[text]) for text in short[: KEPT_TEXTS - len(self._kept)])
        return [self._kept[text] if text in self._kept else found[text] for text in texts]

    def _target(self, sample: Sample) -> Target | None:
        """Return what the head should find in the image of a view; None if it is not annotated."""
        if sample.objects is None:
            return None
        kept = [item for item in sample.objects if not item.iscrowd]
        boxes = torch.tensor([item.box for item in kept], dtype=torch.float32).view(-1, 4)
        rows = self.ids([chat.checked(item.caption) for item in kept])
        for item, row in zip(kept, rows, strict=True):
            if len(row) + 1 > self.max_caption_tokens:
                raise ValueError(
                    f"its caption {item.caption!r} is {len(row) + 1} tokens long with end-of-sequence, above "
                    f"{self.max_caption_tokens}: raise caption_decoder.max_caption_tokens or shorten the caption"
                )
        longest = max(map(len, rows), default=0)
        captions = [[*row, self.tokenizer.eos_token_id, *[-100] * (longest - len(row))] for row in rows]
        return Target(
            boxes=pixels_to_normalized(boxes, sample.width, sample.height),
            caption_ids=torch.tensor(captions, dtype=torch.int64).view(-1, longest + 1),
        )


def _image_of(views: Sequence[Sample], number: int) -> Sample:
    if not 0 <= number < len(views):
        raise ValueError(f"a box in `messages` is of image {number}, counted from 0, but there are {len(views)}")
    return views[number]
