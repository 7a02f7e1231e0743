"""Write tiny checkpoints of all families, and read them, with this interpreter's transformers.

    python -m tests.checkpoints.version_logits write|read FOLDER RESULTS

RESULTS, for `torch.save`, has of each family the float64 logits of a fixed text with an image, the names of the weights
and the image settings; or the message with which reading was refused.
"""

import sys
from pathlib import Path
from typing import Any

import torch

from recipe.config import ConfigError, ImageConfig
from recipe.data.encode import rope_positions
from recipe.data.image import image_spec
from recipe.families import FAMILIES
from recipe.load import load_processor
from recipe.models.vlm import PixelNormalizer, VisionLanguageModel, load_vlm
from recipe.tiny import build_tiny_checkpoint


def write(folder: Path) -> None:
    for family in FAMILIES:
        build_tiny_checkpoint(str(folder / family), 64, 2, 32, 2, vocab_size=320, seed=5, model_type=family)


@torch.no_grad()
def result(checkpoint: Path) -> tuple[torch.Tensor, list[str], tuple[Any, ...]] | str:
    try:
        spec = image_spec(load_processor(str(checkpoint)).image_processor, ImageConfig())
        loaded = load_vlm(str(checkpoint), "sdpa", "float64").eval()
    except ConfigError as error:
        return str(error)
    vlm = VisionLanguageModel(loaded, PixelNormalizer(spec.image_mean, spec.image_std), "sdpa")
    config: Any = loaded.config
    image = [config.vision_start_token_id, *4 * [config.image_token_id], config.vision_end_token_id]
    ids, grid = torch.tensor([30, 31, *image, 32, 33]), torch.tensor([[1, 4, 4]])
    patches = torch.arange(16 * 3 * spec.patch_size**2).remainder(251).to(torch.uint8).view(16, -1)
    positions = rope_positions(ids, grid, config)[:, None]
    states = vlm(ids[None], torch.ones_like(ids)[None], positions, None, patches, grid).last_hidden_state
    settings = (spec.min_pixels, spec.max_pixels, spec.patch_size, spec.merge_size, spec.image_mean, spec.image_std)
    return vlm.logits(states), sorted(loaded.state_dict()), settings


def read(folder: Path) -> dict[str, Any]:
    return {family: result(folder / family) for family in FAMILIES}


if __name__ == "__main__":
    action, folder, results = sys.argv[1], Path(sys.argv[2]), sys.argv[3]
    if action == "write":
        write(folder)
    torch.save(read(folder), results)
