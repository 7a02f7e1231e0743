"""Runs the tiny joint model with flash-attention's stand-in and with `packed_sdpa`; prints what was called, and errors.

    python -m tests.models.flash_run CHECKPOINT

The last line is JSON: for each layout `calls` and the largest differences between the two ways; for both, the
samples' `lengths`, the `padded_length` of their rows, their images' `patches` and the depths of the towers.
"""

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import torch

from recipe.joint import JointModel
from recipe.prediction.decode import generate_answers
from recipe.schema import Batch, Example, JointOutputs
from tests.support.flash_stub import Call, install
from tests.support.tiny_cases import (
    collator,
    gradient_error,
    losses_and_gradients,
    make_config,
    make_examples,
    make_model,
)


def difference(found: JointOutputs, expected: JointOutputs) -> float:
    """Of answers, boxes, objectness and captions, the largest."""
    pairs = [
        (found.label_losses, expected.label_losses),
        (found.detection.pred_boxes, expected.detection.pred_boxes),
        (found.detection.pred_objectness, expected.detection.pred_objectness),
        (found.caption_losses, expected.caption_losses),
    ]
    return max(float((one - other).detach().abs().max()) for one, other in pairs)


def compare(
    flash: JointModel,
    sdpa: JointModel,
    examples: list[Example],
    collate: Callable[[Sequence[Example]], Batch],
    calls: list[Call],
) -> dict[str, Any]:
    """One training step of both models over the same batch."""
    batch = collate(examples)
    calls.clear()
    outputs = flash(batch)
    noted = list(calls)
    expected = sdpa(batch)
    assert calls == noted, "packed_sdpa is a way of its own"
    report: dict[str, Any] = {"calls": [asdict(call) for call in noted], "outputs": difference(outputs, expected)}
    report["gradients"] = gradient_error(
        losses_and_gradients(flash, [batch])[1], losses_and_gradients(sdpa, [batch])[1]
    )
    return report


def answers(model: JointModel, examples: list[Example]) -> list[list[int]]:
    """Four greedy tokens after each prompt, with transformers' cache."""
    prompts = [example.input_ids[: example.prompt_length] for example in examples]
    shown = [example.image_grid_thw[: example.num_prompt_images] for example in examples]  # others follow an answer
    parts = [example.pixel_patches[: int(of.prod(1).sum())] for example, of in zip(examples, shown, strict=True)]
    patches, grids = torch.cat(parts), torch.cat(shown)
    vlm = model.model.vlm.eval()
    return [ids.tolist() for ids in generate_answers(vlm, model.tokenizer, prompts, patches, grids, 4)]


def main() -> None:
    """Command line."""
    calls = install()
    checkpoint = sys.argv[1]
    flash, sdpa = (
        make_model(make_config(checkpoint, model={"attn_implementation": name}))
        for name in ("flash_attention_2", "auto")
    )
    examples = list(make_examples(make_config(checkpoint)).values())
    report: dict[str, Any] = {
        name: compare(flash, sdpa, examples, collator(name), calls) for name in ("packed", "standard")
    }
    report["answers"], report["expected_answers"] = answers(flash, examples), answers(sdpa, examples)
    report["lengths"] = [len(example.input_ids) for example in examples]
    report["padded_length"] = collator("standard")(examples)["input_ids"].shape[1]
    report["patches"] = [patches for example in examples for patches in example.image_grid_thw.prod(1).tolist()]
    text, vision = flash.model.vlm.text_config, flash.model.vlm.hf_model.config.vision_config
    report["text_layers"], report["vision_layers"] = text.num_hidden_layers, vision.depth
    report["full_vision_layers"] = len(vision.fullatt_block_indexes)
    print(json.dumps(report))


if __name__ == "__main__":
    main()
