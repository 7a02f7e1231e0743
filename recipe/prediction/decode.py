"""Batch → Predictions: boxes in original pixels, scores, captions, and the language model's answer."""

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torchvision.ops import nms
from transformers import PreTrainedTokenizerBase

from recipe.boxes import answer_frame, asks_for_boxes, normalized_to_pixels, text_to_objects
from recipe.config import EvaluationConfig, PromptConfig
from recipe.families import box_coordinates
from recipe.models.caption_decoder import CaptionCache, CaptionDecoder
from recipe.models.network import JointNetwork, Sealed, is_sharded, on_all_ranks
from recipe.models.vlm import VisionLanguageModel
from recipe.prediction.classes import ClassTrie, class_probabilities
from recipe.schema import (
    Batch,
    CaptionPlaces,
    DetectedObject,
    DetectionOutputs,
    JointOutputs,
    Memory,
    Prediction,
    Sample,
)
from recipe.upstream.torch_private import reshard

log = logging.getLogger(__name__)

Description = tuple[str, tuple[tuple[str, float], ...]]  # a caption, and the classes as in `DetectedObject`


@dataclass(frozen=True)
class Decoding:
    """How the outputs of a network become predictions."""

    tokenizer: PreTrainedTokenizerBase
    evaluation: EvaluationConfig
    prompt: PromptConfig  # says in which frame an answer gives its boxes
    classes: ClassTrie | None = None  # of `evaluation.classes`, which are then the captions
    # Which samples are answered if `evaluation.answers` is set; None: all.
    is_answered: Callable[[Sample], bool] | None = None
    # The positions of an image's objects, by falling score, that get captions if they may; None: all that may.
    described: Callable[[Sequence[DetectedObject], Sample], Collection[int]] | None = None
    lap: Callable[[str], None] = lambda part: None  # called when a part ends: forward, captions or classes, answers


@torch.no_grad()
def predict(network: JointNetwork, batch: Batch, decoding: Decoding) -> tuple[JointOutputs, list[Prediction]]:
    """Run the network on a batch; return its outputs and one prediction for each of `evaluated(batch)`, in order.

    Every query gives an object, by falling score, except those that NMS removes if `nms_iou` is set and those whose box
    or score is not finite, which a warning counts. Objects below the score threshold have no caption. With
    `decoding.classes` a caption is the most probable class. A sample without an image has no objects.
    """
    # Decoded inside the forward pass: outside it, FSDP has sharded the parameters that generation needs.
    result = network(Sealed(batch), lambda outputs: decode(network, batch, outputs, decoding))
    reshard(network)
    return result


def decode(network: JointNetwork, batch: Batch, outputs: JointOutputs, decoding: Decoding) -> list[Prediction]:
    """Return the predictions of a batch whose outputs are known; see `predict`."""
    lockstep = is_sharded(network)
    is_asked = bool(batch["student_views"]) or lockstep
    objects_of: list[tuple[DetectedObject, ...]] = [() for _ in batch["student_views"]]
    if network.has_head:
        ranking, students = rank_queries(outputs.detection, decoding.evaluation), batch["student_views"]
        objects_of = _objects(ranking, students)
        if num_broken := int(ranking.num_broken.sum()):
            log.warning(
                "%d of %d boxes of %s are left out: they or their scores are not finite. Have the weights diverged?",
                num_broken, ranking.queries.numel(), ", ".join(sample.id for sample in students),
            )  # fmt: skip
        chosen = None if decoding.described is None else list(map(decoding.described, objects_of, students))
        decoding.lap("forward")
        if is_asked:
            captions = _describe(network, outputs, ranking, chosen, decoding, lockstep)
            objects_of = list(map(_with_captions, objects_of, captions))
        decoding.lap("captions" if decoding.classes is None else "classes")
    answers = {}
    if is_asked and decoding.evaluation.answers is not None:
        answers = _answers(network, batch, decoding, lockstep)
        decoding.lap("answers")
    patch = network.vlm.hf_model.config.vision_config.patch_size
    predictions, answered = [], _answered(batch)
    for sample, position, row in evaluated(batch):
        size = (sample.width, sample.height)
        objects: tuple[DetectedObject, ...] = () if row is None else objects_of[row]
        (answer, is_cut), answer_objects = (None, False), None
        if row is not None and row in answered:
            answer, is_cut = answers.get(position, (None, False))
        is_alone = not batch["samples"][position].further
        if row is not None and answer is not None and (is_alone or asks_for_boxes(sample)):
            _, height, width = batch["image_grid_thw"][batch["student_images"][row]].tolist()
            boxes_in = box_coordinates(decoding.prompt, network.vlm.hf_model.config)
            frame = answer_frame(boxes_in, (width * patch, height * patch))
            parsed = text_to_objects(answer, size, frame)
            answer_objects = None if parsed is None else tuple(parsed)
        made = (objects, answer, answer_objects, is_cut, network.has_head)
        predictions.append(Prediction(sample.id, *size, *made))
    return predictions


def evaluated(batch: Batch) -> list[tuple[Sample, int, int | None]]:
    """Return what is predicted and scored: each solved image alone, and the samples without one.

    Each with its sample's position and its row among the N images.
    """
    found: list[tuple[Sample, int, int | None]] = []
    for position, sample in enumerate(batch["samples"]):
        rows = [row for row, owner in enumerate(batch["student_samples"]) if owner == position]
        found += [(batch["student_views"][row], position, row) for row in rows] or [(sample, position, None)]
    return found


def _answered(batch: Batch) -> set[int]:
    """Return the row of each sample that gets its answer: of the image that it is about, else of the first one."""
    rows: dict[int, int] = {}
    for row, (position, view) in enumerate(zip(batch["student_samples"], batch["student_views"], strict=True)):
        if position not in rows or asks_for_boxes(view):
            rows[position] = row
    return set(rows.values())


@dataclass(frozen=True)
class Ranking:
    """The queries of N images, best first."""

    queries: Tensor  # (N, Q) int64, the objects by falling score, then those that are none
    scores: Tensor  # (N, Q) in [0, 1], of `queries`; -1 if it or the box is not finite
    boxes: Tensor  # (N, Q, 4) cxcywh, relative to the image, float32, of `queries`
    num_objects: Tensor  # (N,) int64
    num_broken: Tensor  # (N,) int64, queries whose score or box is not finite


def rank_queries(detection: DetectionOutputs, evaluation: EvaluationConfig) -> Ranking:
    """Rank all queries by score; those that overlap a better one by more than `nms_iou` are not objects.

    Neither are queries whose score or box is not finite: weights that diverge give some before training sees it.
    """
    scores, boxes = calibrated_scores(detection.pred_objectness, evaluation), detection.pred_boxes.float()
    is_finite = scores.isfinite() & boxes.isfinite().all(-1)
    scores, queries = scores.where(is_finite, -1).sort(dim=1, descending=True, stable=True)
    rows = torch.arange(len(queries), device=queries.device)[:, None]
    boxes = boxes.where(is_finite[..., None], 0)[rows, queries]
    num_objects = is_finite.sum(1)
    num_broken = queries.shape[1] - num_objects
    if evaluation.nms_iou is not None:
        corners = normalized_to_pixels(boxes, 1, 1)  # IoU is the same in any unit of x and of y
        # By falling rank instead of score, so that equal scores keep their order.
        falling = torch.arange(queries.shape[1], 0, -1, dtype=boxes.dtype, device=boxes.device)
        removed = torch.ones_like(queries, dtype=torch.bool)  # (N, Q)
        for image, row in enumerate(corners):
            removed[image, nms(row, falling, evaluation.nms_iou)] = False
        removed |= scores < 0
        order = removed.int().argsort(dim=1, stable=True)
        scores, queries, boxes = scores.gather(1, order), queries.gather(1, order), boxes[rows, order]
        num_objects = (~removed).sum(1)
    return Ranking(queries, scores, boxes, num_objects, num_broken)


def calibrated_scores(logits: Tensor, evaluation: EvaluationConfig) -> Tensor:
    """Return objectness logits as scores; float64 if calibrated, as a steep scale would make the best ones equal."""
    scale, shift = evaluation.score_scale, evaluation.score_shift
    return (logits.float() if (scale, shift) == (1.0, 0.0) else logits.double() * scale + shift).sigmoid()


def _objects(ranking: Ranking, samples: Sequence[Sample]) -> list[tuple[DetectedObject, ...]]:
    """Return the objects of each image, by falling score, without captions."""
    if not samples:
        return []
    sizes = torch.tensor([(sample.width, sample.height) for sample in samples])
    boxes = normalized_to_pixels(ranking.boxes.cpu(), sizes[:, :1], sizes[:, 1:]).tolist()
    rows = zip(boxes, ranking.scores.tolist(), ranking.num_objects.tolist(), strict=True)
    return [
        tuple(
            DetectedObject((box[0], box[1], box[2], box[3]), score, "")
            for box, score in zip(corners[:count], scores[:count], strict=True)
        )
        for corners, scores, count in rows
    ]


def _with_captions(
    objects: Sequence[DetectedObject], captions: Mapping[int, Description]
) -> tuple[DetectedObject, ...]:
    """Return the objects of an image with the captions and classes of those that have any; `captions` by position."""
    return tuple(
        DetectedObject(item.box, item.score, *captions.get(place, ("", ()))) for place, item in enumerate(objects)
    )


def _describe(
    network: JointNetwork,
    outputs: JointOutputs,
    ranking: Ranking,
    chosen: Sequence[Collection[int]] | None,
    decoding: Decoding,
    lockstep: bool,
) -> list[dict[int, Description]]:
    """Return the captions and classes of the best objects of each image, by position; of the `chosen` if given."""
    evaluation, detection = decoding.evaluation, outputs.detection
    num_images, num_queries = ranking.queries.shape
    ranks = torch.arange(num_queries, device=ranking.queries.device)
    is_good = (ranking.scores >= evaluation.score_threshold) & (ranks < ranking.num_objects[:, None])
    is_good &= ranks < evaluation.max_captions
    if chosen is not None:
        is_chosen = torch.zeros(is_good.shape, dtype=torch.bool)
        for row, places in enumerate(chosen):
            is_chosen[row, list(places)] = True
        is_good &= is_chosen.to(is_good.device)
    image, rank = is_good.nonzero(as_tuple=True)
    captions: list[dict[int, Description]] = [{} for _ in range(num_images)]
    is_blank = len(image) == 0
    if is_blank and not lockstep:
        return captions
    if is_blank:  # write one and discard it, since other ranks may have some to write
        image = rank = ranks[:1]
    queries, slot = ranking.queries[image, rank], (is_good.cumsum(1) - 1).clamp(min=0)[image, rank]
    places = CaptionPlaces(image, slot, num_images, int(slot.max()) + 1)
    found = (detection.query_features[image, queries], detection.pred_boxes[image, queries], places, outputs.memory)
    vlm, eos, texts = network.vlm, eos_token_id(decoding.tokenizer), list[Description]()
    if decoding.classes is None:
        ids = generate_captions(network.caption_decoder, *found, vlm.embed_tokens, vlm.logits, eos, lockstep)
        texts = [(text, ()) for text in _texts(decoding.tokenizer, ids.tolist())]
    else:
        trie = decoding.classes.to(image.device)
        shares = class_probabilities(network.caption_decoder, trie, *found, vlm.embed_tokens, vlm.logits_of)
        texts = [(best[0][0], best) for best in map(trie.most_probable, shares.tolist())]
    if not is_blank:
        for row, place, text in zip(image.tolist(), rank.tolist(), texts, strict=True):
            captions[row][place] = text
    return captions


def _answers(network: JointNetwork, batch: Batch, decoding: Decoding, lockstep: bool) -> dict[int, tuple[str, bool]]:
    """Return the first answer of each sample that gets one and whether it was cut off, by position in the batch.

    What follows that answer in the chat, images among it, has no part in it.
    """
    tokens, asks = batch["input_ids"].flatten(), decoding.is_answered
    owners = list(dict.fromkeys(batch["student_samples"]))
    owners = [position for position in owners if asks is None or asks(batch["samples"][position])]
    if on_all_ranks(not owners, tokens.device) if lockstep else not owners:
        return {}
    asked = [batch["student_samples"].index(position) for position in owners]  # its first row
    prompts = [tokens[index[index >= 0]] for index in batch["prompt_index"][asked]]
    patches, grids = batch["pixel_patches"], batch["image_grid_thw"]
    images = [image for row in asked for image in batch["prompt_images"][row]]
    if len(images) < len(grids):
        of_images = patches.split(grids.prod(-1).tolist())
        patches, grids = torch.cat([patches[:0], *(of_images[image] for image in images)]), grids[images]
    if lockstep and not images:
        # Another rank has images, and its vision tower is sharded over this one too.
        patches, grids = network.vlm.blank_image(tokens.device)
        prompts.append(tokens.new_tensor([network.vlm.hf_model.config.image_token_id]))
    ends, _ = special_ids(network.vlm, decoding.tokenizer)
    most = decoding.evaluation.max_new_tokens
    new = generate_answers(network.vlm, decoding.tokenizer, prompts, patches, grids, most, lockstep)
    rows = [row.tolist() for row in new]
    answers = zip(_texts(decoding.tokenizer, rows), (ends.isdisjoint(row) for row in rows), strict=True)
    return dict(zip(owners, answers, strict=False))


def eos_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the id that ends a caption and an answer."""
    assert isinstance(tokenizer.eos_token_id, int), "the checkpoint's tokenizer has no end-of-sequence token"
    return tokenizer.eos_token_id


def special_ids(vlm: VisionLanguageModel, tokenizer: PreTrainedTokenizerBase) -> tuple[set[int], int]:
    """Return the ids that end an answer and the one that pads it.

    The generation config's; the tokenizer's if it names none.
    """
    generation: Any = vlm.hf_model.generation_config
    ends = generation.eos_token_id
    ends = {ends} if isinstance(ends, int) else set(ends or (eos_token_id(tokenizer),))
    padding: Any = generation.pad_token_id
    padding = tokenizer.pad_token_id if padding is None else padding
    return ends, eos_token_id(tokenizer) if padding is None else padding


def _texts(tokenizer: PreTrainedTokenizerBase, ids: Sequence[list[int]]) -> list[str]:
    rows = list(map(tuple, ids))  # many objects have the same caption, and a tokenizer takes its time
    texts = {row: tokenizer.decode(list(row), skip_special_tokens=True).strip() for row in set(rows)}
    return [texts[row] for row in rows]


@torch.no_grad()
def generate_captions(
    decoder: CaptionDecoder,
    query_features: Tensor,
    boxes: Tensor,
    places: CaptionPlaces,
    memory: Memory,
    embed: Callable[[Tensor], Tensor],
    logits: Callable[[Tensor], Tensor],
    eos_token_id: int,
    lockstep: bool = False,
) -> Tensor:
    """Write the captions of R queries of N images, all at once and greedily, with a key/value cache.

    `query_features` is (R, W), `boxes` (R, 4) cxcywh, relative to the image. `embed` turns token ids into (..., D),
    `logits` (..., D) into (..., V). With `lockstep` it continues until every rank's captions have ended, as sharded
    parameters need.

    Returns:
        (R, C) int64, filled with `eos_token_id` after a caption's end.
    """
    cache, tokens = CaptionCache(), list[Tensor]()
    finished = torch.zeros(len(query_features), dtype=torch.bool, device=query_features.device)
    for _ in range(decoder.max_caption_tokens):
        embeds = embed(tokens[-1][:, None]) if tokens else None
        hidden = decoder(query_features, boxes, places, memory, embeds, cache)[:, 0]
        tokens.append(logits(hidden).argmax(-1).masked_fill(finished, eos_token_id))  # (R,)
        finished |= tokens[-1] == eos_token_id
        ended = bool(finished.all())
        if on_all_ranks(ended, finished.device) if lockstep else ended:
            break
    return torch.stack(tokens, dim=-1)


@torch.no_grad()
def generate_answers(
    vlm: VisionLanguageModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Tensor],
    pixel_patches: Tensor,
    image_grid_thw: Tensor,
    max_new_tokens: int,
    lockstep: bool = False,
) -> list[Tensor]:
    """Generate the language model's answers with transformers' `generate`, greedily.

    `prompts` are one (S,) int64 per sample, up to and including the generation prompt. `pixel_patches` are
    (P, 3 * patch * patch) uint8, the images of all prompts in order; `image_grid_thw` is (I, 3). With `lockstep` it
    continues until every rank's answers have ended, as sharded parameters need.

    Returns:
        One (new tokens,) int64 per sample, end-of-sequence and padding among them.
    """
    hf_model: Any = vlm.hf_model
    ends, pad_token_id = special_ids(vlm, tokenizer)
    flipped = [prompt.flip(0) for prompt in prompts]
    input_ids = pad_sequence(flipped, batch_first=True, padding_value=pad_token_id).flip(1)  # padded on the left
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=input_ids.device)
    columns = torch.arange(input_ids.shape[1], 0, -1, device=input_ids.device)
    images = {}
    if len(image_grid_thw):
        pixel_values = vlm.normalizer(pixel_patches).to(hf_model.dtype)
        images = {"pixel_values": pixel_values, "image_grid_thw": image_grid_thw}
        if "mm_token_type_ids" in signature(hf_model.forward).parameters:
            # Without them transformers 5 gives image tokens the positions of words.
            images["mm_token_type_ids"] = (input_ids == hf_model.config.image_token_id).int()
    generated = hf_model.generate(
        input_ids=input_ids,
        attention_mask=(columns <= lengths[:, None]).long(),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        repetition_penalty=1.0,  # Qwen's own 1.05 would change measured answers: JSON repeats its words
        use_cache=True,
        synced_gpus=lockstep,
        eos_token_id=sorted(ends),
        pad_token_id=pad_token_id,
        **images,
    )
    return list(generated[:, input_ids.shape[1] :])
