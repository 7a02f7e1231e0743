"""Outputs → Predictions: boxes in original pixels, scores, captions, and the language model's answer."""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from recipe.boxes import normalized_to_pixels
from recipe.config import EvaluationConfig, PromptConfig
from recipe.data.chat import answer_frame, text_to_objects
from recipe.models.generation import generate_answers, generate_captions
from recipe.models.memory import Memory
from recipe.models.sharding import is_sharded
from recipe.network import JointNetwork
from recipe.schema import Batch, DetectedObject, DetectionOutputs, Prediction, Sample


@torch.no_grad()
def predict_batch(
    network: JointNetwork,
    batch: Batch,
    detection: DetectionOutputs,
    memory: Memory,
    tokenizer: PreTrainedTokenizerBase,
    evaluation: EvaluationConfig,
    prompt: PromptConfig,
) -> list[Prediction]:
    """One prediction a sample, in the order of `batch["samples"]`.

    Every query gives an object, by falling score; those under the score threshold have no caption. A sample without
    a picture has no objects.
    """
    lockstep = is_sharded(network)
    captions, answers = [], {}
    if batch["student_samples"] or lockstep:
        captions = _captions(network, detection, memory, tokenizer, evaluation, lockstep)
        answers = _answers(network, batch, tokenizer, evaluation, lockstep) if evaluation.generate_answer else {}
    rows = {sample: row for row, sample in enumerate(batch["student_samples"])}
    predictions = []
    for position, sample in enumerate(batch["samples"]):
        objects: tuple[DetectedObject, ...] = ()
        answer, answer_objects = answers.get(position), None
        if position in rows:
            row = rows[position]
            objects = _objects(detection, row, captions[row], sample)
            if answer is not None:
                grid = batch["image_grid_thw"][batch["student_images"][row]]
                answer_objects = _answer_objects(answer, sample, grid, network, prompt)
        predictions.append(Prediction(sample.id, sample.width, sample.height, objects, answer, answer_objects))
    return predictions


def _objects(
    detection: DetectionOutputs, row: int, captions: dict[int, str], sample: Sample
) -> tuple[DetectedObject, ...]:
    """All queries of one image, by falling score; `captions` by query."""
    scores, order = detection.pred_objectness[row].float().sigmoid().sort(descending=True, stable=True)
    boxes = normalized_to_pixels(detection.pred_boxes[row].float(), sample.width, sample.height)[order]
    return tuple(
        DetectedObject((box[0], box[1], box[2], box[3]), score, captions.get(query, ""))
        for box, score, query in zip(boxes.tolist(), scores.tolist(), order.tolist(), strict=True)
    )


def _captions(
    network: JointNetwork,
    detection: DetectionOutputs,
    memory: Memory,
    tokenizer: PreTrainedTokenizerBase,
    evaluation: EvaluationConfig,
    lockstep: bool,
) -> list[dict[int, str]]:
    """The captions of the best queries of each image, by query."""
    scores, queries = detection.pred_objectness.float().sigmoid().sort(dim=1, descending=True, stable=True)
    kept = (scores >= evaluation.score_threshold).sum(1).clamp(max=evaluation.max_captions)  # (N,)
    longest = int(kept.max())
    if lockstep:
        longest = max(longest, 1)
    elif longest == 0:
        return [{} for _ in range(len(kept))]
    queries = queries[:, :longest]
    rows = torch.arange(len(queries), device=queries.device)[:, None]
    ids = generate_captions(
        network.caption_decoder,
        detection.query_features[rows, queries],
        detection.pred_boxes[rows, queries],
        memory,
        network.vlm.embed_tokens,
        network.vlm.logits,
        eos_token_id(tokenizer),
        lockstep,
    )
    return [
        {
            int(query): text
            for query, text in zip(queries[row, :count], _texts(tokenizer, ids[row, :count]), strict=True)
        }
        for row, count in enumerate(kept.tolist())
    ]


def _answers(
    network: JointNetwork,
    batch: Batch,
    tokenizer: PreTrainedTokenizerBase,
    evaluation: EvaluationConfig,
    lockstep: bool,
) -> dict[int, str]:
    """The language model's answers about the pictures, by position in `batch["samples"]`."""
    tokens = batch["input_ids"].flatten()
    prompts = [tokens[row[row >= 0]] for row in batch["prompt_index"]]
    patches, grids = batch["pixel_patches"], batch["image_grid_thw"]
    if not batch["student_samples"]:
        # Another rank has pictures, and its vision tower is sharded over this one too.
        patches, grids = network.vlm.blank_image(tokens.device)
        prompts = [tokens.new_tensor([network.vlm.hf_model.config.image_token_id])]
    new = generate_answers(network.vlm, prompts, patches, grids, evaluation.max_new_tokens, lockstep)
    return dict(zip(batch["student_samples"], _texts(tokenizer, new), strict=False))


def _answer_objects(
    answer: str, sample: Sample, grid: Tensor, network: JointNetwork, prompt: PromptConfig
) -> tuple[DetectedObject, ...] | None:
    """The boxes of an answer, or None where it does not parse; `grid`: (3,) of the student image."""
    patch = network.vlm.hf_model.config.vision_config.patch_size
    _, rows, columns = grid.tolist()
    frame = answer_frame(prompt.box_coordinates, (columns * patch, rows * patch))
    objects = text_to_objects(answer, (sample.width, sample.height), frame)
    return None if objects is None else tuple(objects)


def eos_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id that ends a caption and an answer."""
    assert isinstance(tokenizer.eos_token_id, int), "the checkpoint's tokenizer has an end-of-sequence token"
    return tokenizer.eos_token_id


def _texts(tokenizer: PreTrainedTokenizerBase, ids: Sequence[Tensor] | Tensor) -> list[str]:
    return [tokenizer.decode(row.tolist(), skip_special_tokens=True).strip() for row in ids]
