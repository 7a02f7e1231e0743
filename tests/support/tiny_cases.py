"""Make a tiny joint model and a mixed batch that holds every kind of sample; for tests and scripts of several ranks."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig

from convert.shapes import draw_scene
from recipe.build import build_model
from recipe.config import AugmentConfig, LoraConfig, LoraPartConfig, RecipeConfig, lora_parts
from recipe.data.augment import Augmentation
from recipe.data.collate import Collator, collate_packed, collate_standard, one_each
from recipe.data.encode import Encoder
from recipe.data.image import image_spec
from recipe.families import FAMILIES
from recipe.joint import JointModel
from recipe.load import load_network, load_processor
from recipe.losses.counts import split_batch
from recipe.models.lora import adapters
from recipe.optim.groups import build_optimizer
from recipe.schema import Batch, CountedBatch, Example, FurtherImage, Message, Sample
from recipe.tiny import build_tiny_checkpoint

NUM_QUERIES = 5
# Mark a test with it, and the fixtures of tests/conftest.py are of each family in turn.
EVERY_FAMILY = pytest.mark.parametrize("family", list(FAMILIES), indirect=True)
OTHER_FAMILIES = pytest.mark.parametrize("family", [name for name in FAMILIES if name != "qwen2_5_vl"], indirect=True)
ALL_SWITCHES: dict[str, dict[str, Any]] = {
    "detection_head": {"num_query_groups": 3},
    "loss": {"objectness": "mal"},
}
ADAPTED: dict[str, Any] = {  # of both parts; the language model's lengths too (DoRA)
    "lora": LoraConfig(
        llm=LoraPartConfig(rank=4, dora=True), vision=LoraPartConfig(rank=2, alpha=3.0, targets=["qkv", "down_proj"])
    ),
    "optimizer": {"lr_llm": 0.0, "lr_vision": 0.0},
}
IN_NF4: dict[str, Any] = {**ADAPTED, "model": {"frozen_dtype": "nf4"}}
TEXT_CHAT = ({"role": "user", "content": "hello"}, {"role": "assistant", "content": "a red star"})
IMAGE_CHAT = ({"role": "user", "content": "what is it?"}, {"role": "assistant", "content": "large blue circle"})
# Both images before the answer, whose box is of the first; and one image per question, the last after two answers.
COMPARING_CHAT = (
    {"role": "user", "content": "Compare <image> with <image>"},
    {
        "role": "assistant",
        "content": [
            {"type": "text", "text": '[{"bbox_2d": '},
            {"type": "box", "box": (4.0, 8.0, 30.0, 50.0), "image": 0},
            {"type": "text", "text": ', "label": "red"}]'},
        ],
    },
)
CHAT_IN_TURNS = (
    {"role": "user", "content": "<image>first"},
    {"role": "assistant", "content": "a red star"},
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "second"}]},
    {"role": "assistant", "content": [{"type": "box", "box": (1.0, 2.0, 100.0, 90.0), "image": 1}]},
    {"role": "user", "content": "<image>third"},
    {"role": "assistant", "content": "a large blue circle"},
)


def build_checkpoint(folder: str, model_type: str = "qwen2_5_vl") -> str:
    """Build a checkpoint of which a forward and backward pass takes a tenth of a second."""
    build_tiny_checkpoint(
        folder,
        hidden_size=64,
        num_layers=2,
        vision_hidden_size=32,
        vision_depth=2,
        vocab_size=320,
        seed=3,
        model_type=model_type,
    )
    return folder


def token_types(method: Callable[..., Any], input_ids: Tensor, image_token_id: int) -> dict[str, Tensor]:
    """Return what methods of transformers 5 know the tokens of images by; those of 4 read the ids themselves."""
    known = "mm_token_type_ids" in signature(method).parameters
    return {"mm_token_type_ids": (input_ids == image_token_id).int()} if known else {}


def make_config(checkpoint: str, **changes: Any) -> RecipeConfig:
    """Return a float64 run; `changes` as `section={key: value}` or `key=value`.

    The head is narrower than the language model, so that no projection is an identity.
    """
    config = RecipeConfig()
    sections: dict[str, Any] = {
        "model": {"pretrained_model_name_or_path": checkpoint, "dtype": "float64"},
        "detection_head": {"num_queries": NUM_QUERIES, "width": 32, "num_heads": 4, "num_denoising_groups": 2},
        "caption_decoder": {"num_layers": 2, "num_heads": 4, "max_caption_tokens": 16},
        "evaluation": {"score_threshold": 0.0, "max_new_tokens": 4},
    }
    for name, values in changes.items():
        sections[name] = {**sections.get(name, {}), **values} if isinstance(values, dict) else values
    return replace(
        config,
        **{
            name: replace(getattr(config, name), **values) if isinstance(values, dict) else values
            for name, values in sections.items()
        },
    )


def make_encoder(config: RecipeConfig, keep_image: bool = False) -> Encoder:
    """Return what `build_encoder` returns, without building the network."""
    name = config.model.pretrained_model_name_or_path
    processor, hf_config = load_processor(name), AutoConfig.from_pretrained(name)
    longest = config.caption_decoder.max_caption_tokens
    assert longest is not None
    spec = image_spec(processor.image_processor, config.image)
    return Encoder(processor.tokenizer, hf_config, spec, config.prompt, longest, config.max_seq_len, keep_image)


def make_model(config: RecipeConfig) -> JointModel:
    """Return the joint model in training mode, its fresh parts moved off the zeros they start from.

    A zero weight hides what is behind it: with the box layer at its start no other box parameter has a gradient.
    Below adapters the weights are frozen.
    """
    torch.manual_seed(0)
    model = build_model(config, load_processor(config.model.pretrained_model_name_or_path))
    with torch.no_grad():
        for part in (model.model.memory, model.model.detection_head, model.model.caption_decoder):
            for parameter in part.parameters():
                parameter += 0.1 * torch.randn_like(parameter)
        for parameter in adapters(model.model.vlm.hf_model).values():
            parameter += 0.1 * torch.randn_like(parameter)
    if lora_parts(config):
        build_optimizer(model, config.optimizer)
    return model.train()


def load_model(checkpoint: str | Path, config: RecipeConfig | None = None) -> tuple[JointModel, Any, RecipeConfig]:
    """Return what `load_network` loads, as the model that a Trainer sees."""
    network, processor, config = load_network(checkpoint, config)
    return JointModel(network, processor.tokenizer, config.loss, config.evaluation, config.prompt), processor, config


def chat_about(name: str, chat: tuple[Message, ...], *scenes: Sample) -> Sample:
    """Return a sample of several images, each with its objects."""
    first, *others = scenes
    further = (FurtherImage(item.image, item.width, item.height, item.objects) for item in others)
    return replace(first, id=name, messages=chat, further=tuple(further))


def make_samples() -> dict[str, Sample]:
    """Return one sample of each kind; images of several sizes, one larger than a vision window."""

    def scene(index: int, size: int, objects: int) -> Sample:
        return draw_scene(seed=5, index=index, image_size=size, min_objects=objects, max_objects=objects)

    return {
        "two": scene(0, 140, 2),
        "text": Sample("text", b"", 0, 0, None, TEXT_CHAT),
        "unannotated": replace(scene(2, 84, 1), objects=None, messages=IMAGE_CHAT),
        "empty": replace(scene(3, 56, 0), objects=()),
        "crowded": scene(4, 112, NUM_QUERIES + 1),
        "one": scene(5, 84, 1),
        "several": chat_about("several", COMPARING_CHAT, scene(9, 84, 1), replace(scene(10, 56, 2), objects=None)),
        "in_turns": chat_about(
            "in_turns", CHAT_IN_TURNS, replace(scene(11, 56, 1), objects=()), scene(12, 112, 2), scene(13, 84, 1)
        ),
        "teacher": scene(6, 56, 1),
        "other_teacher": scene(7, 84, 2),
        "third_teacher": scene(8, 56, 1),
    }


def make_examples(
    config: RecipeConfig, with_answers: bool = True, augment: AugmentConfig | None = None
) -> dict[str, Example]:
    """Return the student samples of `make_samples`, encoded, with up to three teachers (0-4 images) and own noise.

    With `augment` each is shown as drawn for its own place in an epoch.
    """
    encoder = make_encoder(config)
    samples = make_samples()
    teachers = [samples.pop(name) for name in ("teacher", "other_teacher", "third_teacher")]
    shown = {"two": teachers, "empty": teachers[1:], "one": teachers[:1]}
    examples = {}
    for seed, (name, sample) in enumerate(samples.items(), start=100):
        others, drawn = shown.get(name, []), []
        if augment is not None:
            augmentation = Augmentation.of(augment, encoder.image_spec, config.seed)
            sample, others, drawn = augmentation.show(sample, others, 0, seed)
        examples[name] = with_seeds(encoder(sample, others, with_answers, drawn), seed)
    return examples


def with_seeds(example: Example, seed: int) -> Example:
    """Return the example with its own noise for each of its images."""
    return replace(example, noise_seeds=[seed + 1000 * image for image in example.student_images])


def collator(name: str) -> Callable[[Sequence[Example]], Batch]:
    """Return the collator `standard` or `packed`; the padding is not a token of the samples, so a leak shows."""
    collate: Collator = collate_packed if name == "packed" else partial(collate_standard, pad_token_id=7)
    return lambda examples: collate(one_each(examples))


def microbatches_of(examples: Sequence[Example], layout: str, microbatch_size: int) -> list[Batch]:
    """Return the microbatches of one device batch, `microbatch_size` samples each."""
    starts = range(0, len(examples), microbatch_size)
    return [collator(layout)(examples[start : start + microbatch_size]) for start in starts]


def make_batches(examples: Sequence[Example], layout: str, microbatch_size: int) -> list[CountedBatch]:
    """Return the microbatches of one global batch, each with the denominators of all."""
    return split_batch(microbatches_of(examples, layout, microbatch_size), microbatch_size)


def losses_and_gradients(model: JointModel, batches: Sequence[Batch]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return each loss term and each parameter's gradient of one step, as Composer sums them over microbatches."""
    model.zero_grad(set_to_none=True)
    sums: dict[str, Tensor] = {}
    for batch in batches:
        losses = model.loss(model(batch), batch)
        (losses["total"] / len(batches)).backward()
        for name, value in losses.items():
            sums[name] = sums.get(name, torch.zeros(())) + value.detach() / len(batches)
    missing = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not missing, f"no gradient: {missing}"
    return sums, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def gradient_error(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Return the norm of the difference of two whole gradients, in norms of the second."""
    assert found.keys() == expected.keys()
    differences = torch.stack([(found[name] - expected[name]).norm() for name in expected])
    return float(differences.norm() / torch.stack([value.norm() for value in expected.values()]).norm())


def loss_error(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Return the largest relative difference of a loss term."""
    assert found.keys() == expected.keys()
    return max(float((found[name] - expected[name]).abs() / expected[name].abs()) for name in expected)
