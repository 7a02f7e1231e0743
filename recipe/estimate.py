"""Memory of a run before it is started: `python -m recipe.estimate YAML [--world-size N] [key.sub=value ...]`.

Weights, gradients, moments and the snapshot are counted from the model's shapes, built on the meta device; nothing is
loaded. Activations are a formula; what it assumes is printed under the table.
"""

import argparse
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from recipe.build import build_network
from recipe.config import RecipeConfig
from recipe.configure import load_config
from recipe.models.network import JointNetwork
from recipe.optim.groups import group_parameters
from recipe.schema import ImageSpec

_TEXT: Mapping[str, Mapping[str, Any]] = {
    "Qwen/Qwen2.5-VL-3B-Instruct": {
        "hidden_size": 2048,
        "intermediate_size": 11008,
        "num_hidden_layers": 36,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "vocab_size": 151936,
        "tie_word_embeddings": True,
    },
    "Qwen/Qwen2.5-VL-7B-Instruct": {
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152064,
        "tie_word_embeddings": False,
    },
}


def model_config(pretrained_model_name_or_path: str) -> Qwen2_5_VLConfig:
    """The configuration of a published size, or of a checkpoint folder or other name.

    Raises:
        ValueError: It is none of these.
    """
    text = _TEXT.get(pretrained_model_name_or_path)
    if text is None:
        try:
            return Qwen2_5_VLConfig.from_pretrained(pretrained_model_name_or_path)
        except OSError as error:
            raise ValueError(
                f"{pretrained_model_name_or_path!r} is neither a folder nor a reachable name: give a checkpoint folder "
                f"or one of {', '.join(_TEXT)}"
            ) from error
    return Qwen2_5_VLConfig(
        text_config={
            **text,
            "max_position_embeddings": 128000,
            "rms_norm_eps": 1e-6,
            "rope_theta": 1e6,
            "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
            "use_sliding_window": False,
        },
        vision_config={
            "depth": 32,
            "hidden_size": 1280,
            "out_hidden_size": text["hidden_size"],
            "intermediate_size": 3420,
            "num_heads": 16,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "window_size": 112,
            "fullatt_block_indexes": [7, 15, 23, 31],
            "tokens_per_second": 2,
        },
        tie_word_embeddings=text["tie_word_embeddings"],
    )


GIB = 2**30
OBJECTS = 16  # of a picture
CAPTION_TOKENS = 8  # of an object
SUPERVISED = 0.25  # share of the tokens that have a label
ASSUMED = """Assumed:
  tokens       {tokens} of a microbatch (packing.max_tokens or max_seq_len, times device_train_microbatch_size)
  patches      {patches} of them (packing.max_patches; where it is not set, every token is a picture's)
  labels       a quarter of the tokens; a picture a 256 tokens, {objects} objects a picture,
               {words} tokens a caption
  attention    flash or packed sdpa: no score matrix is kept
  all groups with a learning rate are trained at once; DDP keeps the bf16 copies that autocast makes
  FSDP         FULL_SHARD: two of the largest blocks are whole at a time, and what lies in no block always
  not counted  the allocator's fragmentation (10-20 %), CUDA's and NCCL's own memory (1-2 GiB), evaluation"""


@dataclass(frozen=True)
class Memory:
    """Bytes of one GPU, and of one process in the host's memory.

    Attributes:
        weights: As the optimizer moves them, and their averages.
        gradients: Of what is trained; twice where DDP has buckets too.
        moments: AdamW's two.
        compute_copies: Weights in the precision of the computation, or not sharded for as long as they are used.
        activations: Kept for the backward pass, and one block's that is recomputed.
        logits: Of supervised positions and captions, with their gradient.
        snapshot: In the host's memory: weights and moments of this rank.
    """

    weights: int
    gradients: int
    moments: int
    compute_copies: int
    activations: int
    logits: int
    snapshot: int

    @property
    def device_total(self) -> int:
        """All but the snapshot."""
        return sum(vars(self).values()) - self.snapshot


def build_on_meta(config: RecipeConfig) -> JointNetwork:
    """The run's network without memory for its weights.

    Raises:
        ValueError: The model's configuration is not at hand.
    """
    hf_config = model_config(config.model.pretrained_model_name_or_path)
    vision = hf_config.vision_config
    spec = ImageSpec(vision.patch_size, vision.spatial_merge_size, 1, 1, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    with torch.device("meta"):
        vlm = Qwen2_5_VLForConditionalGeneration(hf_config).to(getattr(torch, config.model.dtype))
        network = build_network(config, vlm, spec)
        if config.ema is not None:
            network.add_average()
        return network.to("meta")  # after a `from_pretrained` of transformers 5, linspace overlooks the device above


def microbatch_shape(config: RecipeConfig, merge_size: int) -> tuple[int, int]:
    """Tokens and image patches of one forward pass, at most."""
    packing = config.train_loader.packing
    row = config.max_seq_len if packing is None else packing.max_tokens or config.max_seq_len
    microbatch = config.trainer.get("device_train_microbatch_size") or 1
    most = None if packing is None else packing.max_patches
    return row * microbatch, microbatch * (row * merge_size**2 if most is None else most)


def estimate(config: RecipeConfig, network: JointNetwork, world_size: int) -> Memory:
    """Memory of each of `world_size` GPUs.

    Args:
        config: The run's.
        network: From `build_on_meta`, or a real one.
        world_size: GPUs of the run.
    """
    sharded = _is_sharded(config)
    shards = world_size if sharded else 1
    amp = str(config.trainer.get("precision", "")).startswith("amp_") and config.model.dtype != "bfloat16"
    weights = trained = elements = 0
    for group, members in group_parameters(network).items():
        size = sum(parameter.numel() * parameter.element_size() for _, parameter in members)
        elements += sum(parameter.numel() for _, parameter in members)
        weights += size
        trained += size if getattr(config.optimizer, f"lr_{group}") else 0
    weights += sum(average.numel() * average.element_size() for _, average in network.averaged_parameters())
    gradients = trained * (2 if world_size > 1 and not sharded else 1)
    width = 2 if amp else torch.empty(0, dtype=getattr(torch, config.model.dtype)).element_size()
    copies = elements * 2 if amp else 0
    if sharded:
        blocks = [_elements(block) for block in (*_vision(network).blocks, *_language(network).layers)]
        copies = (elements - sum(blocks) + 2 * max(blocks)) * width
    return Memory(
        weights=weights // shards,
        gradients=gradients // shards,
        moments=2 * trained // shards,
        compute_copies=copies,
        activations=_activations(config, network, width),
        logits=_logits(config, network, width),
        snapshot=(weights + 2 * trained) // shards,
    )


def block_bytes(rows: int, hidden: int, key_width: int, intermediate: int, width: int) -> int:
    """What one transformer block of Qwen2.5-VL keeps for its backward pass.

    As autograd saves it, a row: of each norm its input in float32 and the normalised row; queries, keys, values and
    the attention's result; four of the gated feed-forward.

    Args:
        rows: Tokens or patches.
        hidden: Width of the block.
        key_width: Of keys, and of values; of all heads after they are repeated.
        intermediate: Width of the feed-forward part.
        width: Bytes of a number in the computation.
    """
    norms = 2 * (hidden * 4 + 2 * hidden * width)
    attention = (4 * hidden + 2 * key_width) * width
    return rows * (norms + attention + 4 * intermediate * width)


def _activations(config: RecipeConfig, network: JointNetwork, width: int) -> int:
    vision_config = network.vlm.hf_model.config.vision_config
    text = network.vlm.text_config
    tokens, patches = microbatch_shape(config, vision_config.spatial_merge_size)
    side, hidden = vision_config.hidden_size, text.hidden_size
    vision_block = block_bytes(patches, side, side, vision_config.intermediate_size, width)
    text_block = block_bytes(tokens, hidden, hidden, text.intermediate_size, width)
    if config.model.gradient_checkpointing:
        inputs = vision_config.depth * patches * side + text.num_hidden_layers * tokens * hidden
        kept = inputs * width + max(vision_block, text_block)
    else:
        kept = vision_config.depth * vision_block + text.num_hidden_layers * text_block
    return kept + _head_activations(config, network, tokens, patches, width)


def _head_activations(config: RecipeConfig, network: JointNetwork, tokens: int, patches: int, width: int) -> int:
    """A layer keeps about 20 rows of its width a query or caption token, the feed-forward's, and 4 a memory token.

    The adapter of the patches keeps 5 rows of the tower's width a patch, the selection of queries 3 a memory token.
    """
    head, captions = config.detection_head, config.caption_decoder
    images, memory = _num_images(config), tokens + (patches if head.patch_features else 0)
    queries = images * (head.num_query_groups * head.num_queries + 2 * head.num_denoising_groups * OBJECTS)
    words = images * OBJECTS * CAPTION_TOKENS
    a_query, a_word = (20 + 2 * part.ffn_factor for part in (head, captions))
    rows = head.num_layers * (queries * a_query + memory * 4) + captions.num_layers * (words * a_word + memory * 4)
    rows += 3 * memory if head.select_queries else 0
    adapter = 5 * (memory - tokens) * network.vlm.hf_model.config.vision_config.hidden_size
    return (rows * network.memory.width + adapter) * max(width, 4)


def _logits(config: RecipeConfig, network: JointNetwork, width: int) -> int:
    """Of each logit in the losses: itself, in float32, its log-probability and its gradient.

    Or, if that is more, what the matching has for a moment where captions count in it: beside the labels' logits one a
    query and word of the vocabulary, in float32 and exponentiated.
    """
    tokens, _ = microbatch_shape(config, 1)
    images, labels = _num_images(config), round(tokens * SUPERVISED)
    numbers = (labels + images * OBJECTS * CAPTION_TOKENS) * (width + 12)
    if config.matcher.cost_caption:
        queries = images * config.detection_head.num_query_groups * config.detection_head.num_queries
        numbers = max(numbers, labels * width + queries * (width + 8))
    return numbers * network.vlm.text_config.vocab_size


def _num_images(config: RecipeConfig) -> int:
    """Pictures that the head solves in a microbatch: at most as many as fit the tokens at 256 each."""
    return max(1, microbatch_shape(config, 1)[0] // 256)


def _is_sharded(config: RecipeConfig) -> bool:
    return (config.trainer.get("parallelism_config") or {}).get("fsdp") is not None


def _vision(network: JointNetwork):
    return network.vlm.hf_model.model.visual


def _language(network: JointNetwork):
    return network.vlm.hf_model.model.language_model


def _elements(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def table(config: RecipeConfig, network: JointNetwork, world_size: int) -> str:
    """What the command prints."""
    memory = estimate(config, network, world_size)
    sharded = _is_sharded(config)
    lines = [f"{config.model.pretrained_model_name_or_path}, {world_size} x {'FSDP' if sharded else 'DDP'}", ""]
    for group, members in group_parameters(network).items():
        count = sum(parameter.numel() for _, parameter in members)
        lines.append(f"{group:<16}{count / 1e6:>10.1f} M parameters{_rate(config, group)}")
    lines += ["", f"{'a GPU':<16}{'GiB':>10}"]
    lines += [f"{name:<16}{size / GIB:>10.2f}" for name, size in vars(memory).items() if name != "snapshot"]
    lines += [f"{'total':<16}{memory.device_total / GIB:>10.2f}", ""]
    lines += [f"{'host, a process':<16}{memory.snapshot / GIB:>10.2f}  snapshot of the NaN rollback", ""]
    tokens, patches = microbatch_shape(config, network.vlm.hf_model.config.vision_config.spatial_merge_size)
    return "\n".join([*lines, ASSUMED.format(tokens=tokens, patches=patches, objects=OBJECTS, words=CAPTION_TOKENS)])


def _rate(config: RecipeConfig, group: str) -> str:
    return "" if getattr(config.optimizer, f"lr_{group}") else ", frozen"


def main(arguments: list[str]) -> None:
    """Prints the estimate of a yaml; on a mistake prints one line and exits with status 2."""
    parser = argparse.ArgumentParser(description="Estimate the memory of a run.")
    parser.add_argument("yaml")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value")
    parser.add_argument("--world-size", type=int, default=1, help="GPUs of the run")
    args = parser.parse_intermixed_args(arguments)
    if args.world_size < 1:
        parser.error(f"--world-size is {args.world_size}: it must be 1 or more")
    try:
        config = load_config(args.yaml, args.overrides)
        network = build_on_meta(config)
    except ValueError as error:  # ConfigError among them
        print(f"configuration error: {error}", file=sys.stderr)
        raise SystemExit(2) from error
    print(table(config, network, args.world_size))


if __name__ == "__main__":
    main(sys.argv[1:])
