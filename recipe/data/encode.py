"""Sample → Example: the conversation as ids with roles, the pictures as patches, the head's target."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from inspect import signature
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase, Qwen2_5_VLModel

from recipe.boxes import pixels_to_normalized
from recipe.config import PromptConfig
from recipe.data.chat import (
    Segment,
    answer_frame,
    answer_segments,
    checked,
    detection_question,
    message_segments,
    objects_to_text,
    system_of,
    system_segments,
)
from recipe.data.image import patchify, resized_size
from recipe.schema import Example, ImageSpec, Object, Role, Sample, Target


def rope_positions(input_ids: Tensor, image_grid_thw: Tensor, hf_config: Any) -> Tensor:
    """(3, L) int64 positions along time, height and width, from 0.

    Args:
        input_ids: (L,) int64 of one sample.
        image_grid_thw: (I, 3) int64 of its images; I may be 0.
        hf_config: The checkpoint's configuration.
    """
    # get_rope_index reads nothing of the model but its config, and in transformers 5 a method that reads nothing of it.
    kind: Any = Qwen2_5_VLModel
    model = SimpleNamespace(config=hf_config)
    arguments = {"input_ids": input_ids[None], "image_grid_thw": image_grid_thw if len(image_grid_thw) else None}
    if "mm_token_type_ids" in signature(kind.get_rope_index).parameters:
        model.get_vision_position_ids = partial(kind.get_vision_position_ids, None)
        arguments["mm_token_type_ids"] = (input_ids[None] == hf_config.image_token_id).int()  # 1: of a picture
    positions, _ = kind.get_rope_index(model, **arguments)
    return positions[:, 0].clone()


@dataclass(frozen=True)
class Encoder:
    """Encodes one sample and its teachers; the same sample always gives the same example.

    Attributes:
        tokenizer: The checkpoint's.
        hf_config: The checkpoint's configuration: its ids and the rotary rule.
        image_spec: How the checkpoint wants its pictures.
        prompt: The text of the conversation.
        max_caption_tokens: Longest caption, end-of-sequence counted.
        max_seq_len: Longest conversation, in tokens.
        keep_image: Keep the student's picture in the example, for drawing.
    """

    tokenizer: PreTrainedTokenizerBase
    hf_config: Any
    image_spec: ImageSpec
    prompt: PromptConfig
    max_caption_tokens: int
    max_seq_len: int
    keep_image: bool = False

    @property
    def pad_token_id(self) -> int:
        """What fills up padded rows."""
        return cast(int, self.tokenizer.pad_token_id)

    def __call__(self, sample: Sample, teachers: Sequence[Sample] = ()) -> Example:
        """Encodes the teachers' turns, then the student's.

        A sample without `objects` and `messages` gives its prompt alone, nothing supervised: what prediction sees,
        and exactly the first `prompt_length` ids of the annotated sample.

        Raises:
            ValueError: The sample or a teacher cannot be used; its id and the remedy are named.
        """
        try:
            return self._encode(sample, teachers)
        except ValueError as error:
            raise ValueError(f"sample {sample.id!r}: {error}") from error

    def _encode(self, sample: Sample, teachers: Sequence[Sample]) -> Example:
        head, student = self.segments(sample, teachers)
        pictured = [item for item in (*teachers, sample) if item.has_image]
        pictures = [patchify(item.image, self.image_spec) for item in pictured]
        _check_sizes(pictured, [grid for _, grid in pictures], self.image_spec)
        image_grid_thw = torch.tensor([grid for _, grid in pictures], dtype=torch.int64).view(-1, 3)
        empty = torch.empty(0, self.image_spec.patch_values, dtype=torch.uint8)

        tokens_per_image = (image_grid_thw.prod(-1) // self.image_spec.merge_size**2).tolist()
        input_ids, roles, prompt_length = self._tokenize(head, student, tokens_per_image)
        if len(input_ids) > self.max_seq_len:
            raise ValueError(
                f"its conversation is {len(input_ids)} tokens long ({sum(tokens_per_image)} of them of "
                f"{len(pictures)} pictures), above max_seq_len {self.max_seq_len}: raise max_seq_len, "
                "or lower image.max_pixels or teachers.num_teachers"
            )
        return Example(
            sample=sample if self.keep_image else replace(sample, image=b""),
            input_ids=input_ids,
            roles=roles,
            position_ids=rope_positions(input_ids, image_grid_thw, self.hf_config),
            prompt_length=prompt_length,
            pixel_patches=torch.cat([empty, *(patches for patches, _ in pictures)]),
            image_grid_thw=image_grid_thw,
            has_student_image=sample.has_image,
            target=None if sample.objects is None else self._target(sample, sample.objects),
        )

    def segments(self, sample: Sample, teachers: Sequence[Sample] = ()) -> tuple[list[Segment], list[Segment]]:
        """The text of the conversation: system and teachers' turns, then the student's. Reads no picture's bytes.

        Raises:
            ValueError: The sample or a teacher cannot be used.
        """
        if sample.objects is not None and not sample.has_image:
            raise ValueError("it has objects but no picture: give the picture, or null for the objects")
        head = system_segments(system_of(sample.messages or (), self.prompt.system))
        for teacher in teachers:
            head += self.teacher_segments(teacher)
        return head, self._student_segments(sample)

    def teacher_segments(self, teacher: Sample) -> list[Segment]:
        """The turns of one teacher.

        Raises:
            ValueError: It is not an annotated picture, or its text or size cannot be used.
        """
        if teacher.objects is None or not teacher.has_image:
            raise ValueError(f"its teacher {teacher.id!r} is not an annotated picture: choose the pool anew")
        try:
            answer = answer_segments(self._answer(teacher, teacher.objects), Role.TEACHER)
        except ValueError as error:
            raise ValueError(f"its teacher {teacher.id!r}: {error}") from error
        return [Segment(detection_question(self.prompt)), *answer]

    def _student_segments(self, sample: Sample) -> list[Segment]:
        if sample.messages is not None:
            return message_segments(sample.messages, sample.has_image)
        if not sample.has_image:
            raise ValueError("it has neither a picture nor messages: nothing can be asked")
        segments = [Segment(detection_question(self.prompt))]
        if sample.objects is not None and self.prompt.student_answer:
            segments += answer_segments(self._answer(sample, sample.objects), Role.STUDENT)
        return segments

    def _answer(self, sample: Sample, objects: Sequence[Object]) -> str:
        frame = answer_frame(self.prompt.box_coordinates, resized_size(sample.width, sample.height, self.image_spec))
        return objects_to_text(objects, (sample.width, sample.height), frame)

    def _tokenize(
        self, head: list[Segment], student: list[Segment], tokens_per_image: list[int]
    ) -> tuple[Tensor, Tensor, int]:
        """Each segment on its own, concatenated: ids (L,), roles (L,) and the prompt's length."""
        ids: list[int] = []
        roles: list[int] = []
        image_token_id, images = self.hf_config.image_token_id, iter(tokens_per_image)
        prompt_length = None
        segments = [*head, *student]
        rows = self.ids([segment.text for segment in segments])
        for position, (segment, row) in enumerate(zip(segments, rows, strict=True)):
            # The head may read the prompt, so it ends before the student's first answer.
            if position >= len(head) and segment.role is Role.STUDENT and prompt_length is None:
                prompt_length = len(ids)
            for token in row:
                ids += [token] * (next(images) if token == image_token_id else 1)
            roles += [int(segment.role)] * (len(ids) - len(roles))
        assert next(images, None) is None, "every picture has its placeholder"
        return (
            torch.tensor(ids, dtype=torch.int64),
            torch.tensor(roles, dtype=torch.uint8),
            len(ids) if prompt_length is None else prompt_length,
        )

    def ids(self, texts: list[str]) -> list[list[int]]:
        """The token ids of each text alone; one call for all, as a call costs more than a short text."""
        if not texts:
            return []
        encoded = self.tokenizer(texts, add_special_tokens=False, return_attention_mask=False)
        return cast(list[list[int]], encoded["input_ids"])

    def _target(self, sample: Sample, objects: Sequence[Object]) -> Target:
        kept = [item for item in objects if not item.iscrowd]
        boxes = torch.tensor([item.box for item in kept], dtype=torch.float32).view(-1, 4)
        rows = self.ids([checked(item.caption) for item in kept])
        captions = [self._caption_ids(item.caption, row) for item, row in zip(kept, rows, strict=True)]
        return Target(
            boxes=pixels_to_normalized(boxes, sample.width, sample.height),
            caption_ids=pad_sequence(captions, batch_first=True, padding_value=-100)
            if captions
            else torch.empty(0, 1, dtype=torch.int64),
        )

    def _caption_ids(self, caption: str, ids: list[int]) -> Tensor:
        if len(ids) + 1 > self.max_caption_tokens:
            raise ValueError(
                f"its caption {caption!r} is {len(ids) + 1} tokens long with end-of-sequence, above "
                f"{self.max_caption_tokens}: raise caption_decoder.max_caption_tokens or shorten the caption"
            )
        return torch.tensor([*ids, self.tokenizer.eos_token_id], dtype=torch.int64)


def _check_sizes(samples: Sequence[Sample], grids: list[tuple[int, int, int]], spec: ImageSpec) -> None:
    """Boxes are told in a frame made from the stated size: it must be the decoded picture's."""
    for sample, (_, rows, columns) in zip(samples, grids, strict=True):
        stated = resized_size(sample.width, sample.height, spec)
        if stated != (columns * spec.patch_size, rows * spec.patch_size):
            raise ValueError(
                f"the picture of {sample.id!r} does not have the stated {sample.width} x {sample.height} pixels: "
                "convert the data set anew"
            )
