"""Make models of published sizes with random weights on the device itself, and batches of real or drawn images."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForImageTextToText

from convert.shapes import draw_scene
from real_sets import read_samples
from real_size import NAMES, YAMLS, write_config, write_processor
from recipe.checkpoints.base import BACKBONE, frozen_groups
from recipe.config import RecipeConfig, trained_trunk
from recipe.configure import load_config
from recipe.data.collate import collate_packed, one_each
from recipe.data.encode import Encoder
from recipe.data.image import image_spec
from recipe.joint import JointModel
from recipe.load import build_encoder, build_network, load_processor, store_frozen
from recipe.losses.counts import split_batch
from recipe.models.attention import resolve_attention
from recipe.models.vlm import read_hf_config
from recipe.schema import Batch, Example, Sample
from tests.gpu.measure import ROOT
from tests.gpu.session import Session

MAX_CAPTION_TOKENS = 16


def model_folder(session: Session) -> Path:
    """Return a folder with configuration and processor of the session's size; weights only if it is tiny."""
    folder = session.folder / f"model-{session.size}"
    if not (folder / "config.json").exists() or not (folder / "complete").exists():
        write_processor(session.size, folder, session.inputs / "tokenizer")
        if session.size != "tiny":
            write_config(NAMES[session.size], folder)
        (folder / "complete").touch()
    return folder


def leg_config(session: Session, leg: str, tokens: int, *overrides: str) -> RecipeConfig:
    """Return the configuration of a leg's yaml on one device, with packs of `tokens`."""
    changes = [
        f"model.pretrained_model_name_or_path={model_folder(session)}",
        f"train_loader.packing.max_tokens={tokens}",
        f"max_seq_len={max(tokens, 4096)}",
        "trainer.parallelism_config=null",
        f"trainer.precision={session.precision}",
        *([] if session.is_cuda else ["trainer.device=cpu"]),
    ]
    return load_config(str(ROOT / YAMLS[leg]), [*changes, *overrides])


def build_random(session: Session, config: RecipeConfig) -> tuple[JointModel, Any]:
    """Return the joint model with random weights on the session's device, and its processor.

    Weights are stored as `recipe.load.load_base` stores them.
    """
    name = config.model.pretrained_model_name_or_path
    processor, hf_config = load_processor(name), read_hf_config(name)
    rounds = (config.model.dtype, config.model.frozen_dtype) == ("float32", "bfloat16")
    dtype = "bfloat16" if rounds and frozen_groups(config) >= set(BACKBONE) else config.model.dtype
    torch.manual_seed(0)
    with torch.device(session.device):
        vlm = AutoModelForImageTextToText.from_config(
            hf_config,
            attn_implementation=resolve_attention(config.model.attn_implementation),
            dtype=getattr(torch, dtype),
        )
    store_frozen(vlm, config)
    if config.model.gradient_checkpointing:
        vlm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    network = build_network(config, vlm, image_spec(processor.image_processor, config.image), MAX_CAPTION_TOKENS)
    if config.ema is not None:
        network.add_average()
    model = JointModel(network, processor.tokenizer, config.loss, config.evaluation, config.prompt)
    return session.composer_device().module_to_device(model), processor


def read_images(session: Session, number: int) -> list[Sample]:
    """Return the first of the collected images with their objects; drawn scenes if there are none, or if tiny."""
    folder = session.inputs / "images"
    if session.size != "tiny" and (folder / "instances.json").is_file():
        return read_samples(folder)[:number]
    side = 84 if session.size == "tiny" else 640
    return [draw_scene(seed=0, index=i, image_size=side, min_objects=3, max_objects=6) for i in range(number)]


def encoder_of(config: RecipeConfig, model: JointModel, processor: Any) -> Encoder:
    """Return the product's encoder."""
    return build_encoder(processor, model.model, config.image, config.prompt, config.max_seq_len)


def fill_row(examples: Sequence[Example], tokens: int) -> list[Example]:
    """Return examples in their order, again from the first, until the next would exceed `tokens`; one at least."""
    row: list[Example] = []
    for example in cycle(examples):
        if row and sum(len(item.input_ids) for item in row) + len(example.input_ids) > tokens:
            return row
        row.append(example)
    raise AssertionError("there are no examples")


def packed_batch(session: Session, config: RecipeConfig, encoder: Encoder, tokens: int) -> Batch:
    """Return one pack on the device; without answers if the trunk is frozen, as training has it."""
    samples = read_images(session, 16)
    examples = [encoder(sample, with_answers=bool(trained_trunk(config))) for sample in samples]
    return on_device(session, collate_packed(one_each(fill_row(examples, tokens))))


def on_device(session: Session, batch: Batch) -> Batch:
    """Return a whole global batch on the device, its losses counted before, as the Trainer gets it."""
    (counted,) = split_batch([batch], len(batch["samples"]))
    return session.composer_device().batch_to_device(counted)


@contextmanager
def out_of_memory_is_reported(session: Session, name: str) -> Iterator[None]:
    """Report an out-of-memory error as the figure `name`, and continue."""
    try:
        yield
    except torch.OutOfMemoryError:
        session.not_run(name, "out of memory")
        torch.cuda.empty_cache()
