"""Estimate the memory of a run: `python -m recipe.estimate YAML [--world-size N] [key.sub=value ...]`; see --help.

It counts weights, gradients, moments and the snapshot from the model's shapes on the meta device and loads nothing.
Activations follow a formula, whose assumptions it prints below the table. It ends with an answer: whether the run fits
GPUs of three sizes, and which keys would save most.
"""

import json
import sys
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from recipe.config import ConfigError, RecipeConfig, trained_trunk
from recipe.configure import from_command_line, load_config, one_line_errors, parser_of
from recipe.families import PUBLISHED, family_of, published_config, vision_sizes
from recipe.upstream.trainer_section import shards_and_replicas, view_trainer

# torch and transformers are imported inside functions: a mistake in the yaml is reported before those seconds.
if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PretrainedConfig

    from recipe.models.network import JointNetwork

USAGE = "python -m recipe.estimate YAML [--world-size N] [--fit GIB] [--json] [key.sub=value ...]"
EXAMPLES = """  python -m recipe.estimate yamls/joint.yaml --world-size 8
  python -m recipe.estimate yamls/lora.yaml --fit 24
  python -m recipe.estimate yamls/joint.yaml optimizer.lr_vision=0 train_loader.packing.max_tokens=2048
  python -m recipe.estimate yamls/joint.yaml model.pretrained_model_name_or_path=Qwen/Qwen2.5-VL-7B-Instruct"""


def model_config(pretrained_model_name_or_path: str) -> "PretrainedConfig":
    """Return the configuration of a published size, a checkpoint folder or another name on the hub.

    Raises:
        ConfigError: The name is none of these.
    """
    import transformers

    from recipe.models.vlm import read_hf_config

    if pretrained_model_name_or_path in PUBLISHED:
        family, sizes = published_config(pretrained_model_name_or_path)
        return getattr(transformers, family.config)(**sizes)
    try:
        return read_hf_config(pretrained_model_name_or_path)
    except OSError as error:
        raise ConfigError(
            f"model.pretrained_model_name_or_path is {pretrained_model_name_or_path!r}, which is neither a folder nor "
            f"a reachable name: give a checkpoint folder or one of {', '.join(PUBLISHED)}"
        ) from error


GIB = 2**30
OBJECTS = 16  # per image
CAPTION_TOKENS = 8  # per object
SUPERVISED = 0.25  # share of the tokens that have a label
CARDS = (24, 40, 80)  # GiB
CONTEXT = 1.5  # GiB of CUDA and NCCL themselves
FRAGMENTS = 0.1  # share of the sum that the allocator loses
LIBRARIES = 0.8  # GiB of the host: Python with torch, transformers and Composer
RESERVE = f"{CONTEXT:g} GiB for CUDA itself and {FRAGMENTS:.0%} of the sum for the allocator's fragmentation"
ASSUMED = """Assumed:
  tokens       {tokens} per microbatch (packing.max_tokens or max_seq_len, times device_train_microbatch_size)
  patches      {patches} per microbatch (packing.max_patches; if it is not set, every token is an image's)
  labels       a quarter of the tokens; one image per 256 tokens, {objects} objects per image,
               {words} tokens per caption
  attention    flash or packed sdpa: no score matrix is kept
  all groups with a learning rate are trained at once; DDP keeps the bf16 copies that autocast makes
  FSDP         FULL_SHARD: two of the largest blocks are whole at a time, and all that is in no block always
  reserve      {reserve}
  not counted  evaluation, which keeps no activations"""


@dataclass(frozen=True)
class Memory:
    """Bytes per GPU, except `snapshot` and `host`."""

    weights: int  # as they are stored, and their averages
    gradients: int  # of trained weights; twice if DDP adds buckets
    moments: int  # AdamW's two
    compute_copies: int  # weights in the precision of the computation, or unsharded while in use
    activations: int  # kept for the backward pass, plus one recomputed block
    logits: int  # of one chunk of supervised positions or captions, with their gradient
    snapshot: int  # in the host's memory per process: what this rank trains, and its moments
    host: int  # per process: libraries, snapshot, and the weights as loaded; with `trainer.device: cpu` all above

    @property
    def device_total(self) -> int:
        """Return the sum of what a GPU holds."""
        return sum(vars(self).values()) - self.snapshot - self.host

    @property
    def needed(self) -> int:
        """Return the bytes that a GPU must have: the sum and the reserve."""
        return round(self.device_total * (1 + FRAGMENTS) + CONTEXT * GIB)


def build_on_meta(config: RecipeConfig) -> "JointNetwork":
    """Return the run's network on the meta device, which needs no memory for its weights."""
    import torch
    import transformers

    from recipe.load import build_network, store_frozen
    from recipe.schema import ImageSpec

    hf_config: Any = model_config(config.model.pretrained_model_name_or_path)
    vision = hf_config.vision_config
    spec = ImageSpec(vision.patch_size, vision.spatial_merge_size, 1, 1, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    with torch.device("meta"):
        vlm = getattr(transformers, family_of(hf_config).model)(hf_config).to(getattr(torch, config.model.dtype))
        store_frozen(vlm, config)
        # If the data decides the length of captions: it changes little but the size of a table.
        network = build_network(config, vlm, spec, config.caption_decoder.max_caption_tokens or 32)
        if config.ema is not None:
            network.add_average()
        return network.to("meta")  # after a `from_pretrained` of transformers 5, linspace ignores the device above


def microbatch_shape(config: RecipeConfig, merge_size: int) -> tuple[int, int]:
    """Return the largest number of tokens and of image patches in one forward pass."""
    packing = config.train_loader.packing
    row = config.max_seq_len if packing is None else packing.max_tokens or config.max_seq_len
    microbatch = view_trainer(config).microbatch_size or 1
    most = None if packing is None else packing.max_patches
    return row * microbatch, microbatch * (row * merge_size**2 if most is None else most)


def estimate(config: RecipeConfig, network: "JointNetwork", world_size: int) -> Memory:
    """Return the memory of each of `world_size` GPUs; `network` is from `build_on_meta`, or a real one."""
    from recipe.models.nf4 import nf4_layers
    from recipe.optim.groups import group_parameters

    view = view_trainer(config)
    shards, _ = shards_and_replicas(view.fsdp, world_size)
    amp = (view.precision or "").startswith("amp_") and config.model.dtype != "bfloat16"
    weights = trained = elements = copied = moments = 0
    for group, members in group_parameters(network).items():
        size = sum(parameter.numel() * parameter.element_size() for _, parameter in members)
        count = sum(parameter.numel() for _, parameter in members)
        elements += count
        weights += size
        if getattr(config.optimizer, f"lr_{group}"):
            trained += size
            moments += sum(moment_bytes(parameter, config.optimizer.moments) for _, parameter in members)
            copied += count  # autocast keeps its copies of weights that are trained
    averages = sum(average.numel() * average.element_size() for _, average in network.averaged_parameters())
    gradients = trained * (2 if world_size > 1 and not view.is_sharded else 1)
    width = 2 if amp else {"float64": 8, "float32": 4, "bfloat16": 2}[config.model.dtype]
    model = network.vlm.hf_model.model
    copies = copied * 2 if amp else 0
    if view.is_sharded:
        blocks = [
            sum(parameter.numel() for parameter in block.parameters())
            for block in (*model.visual.blocks, *model.language_model.layers)
        ]
        copies = (elements - sum(blocks) + 2 * max(blocks)) * width
    tokens, patches = microbatch_shape(config, network.vlm.hf_model.config.vision_config.spatial_merge_size)
    # Without autocast, the trunk computes in what it is stored in.
    stored = max(parameter.element_size() for parameter in network.vlm.embed_tokens.parameters())
    activations, logits = _forward_bytes(config, network, tokens, patches, min(width, stored))
    snapshot = (trained + averages + moments) // shards if config.nan_rollback.snapshot == "memory" else 0
    # Of nf4 one weight at a time is whole, and loading begins with all of them in bfloat16.
    nf4 = nf4_layers(network)
    whole = [2 * layer.in_features * layer.out_features for layer in nf4]
    copies += max(whole, default=0)
    in_nf4 = sum(part.nbytes for layer in nf4 for part in layer.parameters() if part is not layer.bias)
    parts = {
        "weights": (weights + averages) // shards,
        "gradients": gradients // shards,
        "moments": moments // shards,
        "compute_copies": copies,
        "activations": activations,
        "logits": logits,
    }
    loaded = weights + averages + sum(whole) - in_nf4
    if view.device == "cpu":
        loaded = max(loaded, sum(parts.values()))
    if view.is_sharded and config.load_path is None:
        loaded = 2 * elements  # mapped from a file in bfloat16, as bases are published, until it is sharded
    return Memory(**parts, snapshot=snapshot, host=round(LIBRARIES * GIB) + snapshot + loaded)


def moment_bytes(parameter: "Tensor", kind: str) -> int:
    """Return the bytes of AdamW's two moments; with 8 bits as `recipe.optim.eight_bit` says."""
    count = parameter.numel()
    if kind == "full":
        return 2 * count * parameter.element_size()
    return 2 * (count + 4 * -(-count // 256)) if count >= 4096 else 8 * count


def block_bytes(
    rows: int,
    hidden: int,
    heads: int,
    intermediate: int,
    width: int,
    feed_forward_rows: int = 4,
    has_head_norms: bool = False,
) -> int:
    """Return the bytes that one transformer block keeps for its backward pass.

    Autograd saves per row: each norm's input in float32 and its normalised row; queries, keys, values and the
    attention's result; four rows of a gated feed-forward. `rows` are tokens or patches, `width` is bytes per number;
    `heads` is the width of all heads together, to which keys and values are repeated.
    """
    norms = 2 * (hidden * 4 + 2 * hidden * width) + has_head_norms * 2 * heads * (4 + width)
    attention = (2 * hidden + 4 * heads) * width
    return rows * (norms + attention + feed_forward_rows * intermediate * width)


def adapter_bytes(block: "nn.Module", width: int, amp: bool) -> int:
    """Return the bytes per row that the adapters of a block keep for its backward pass, at most.

    They are `rank` numbers each, a copy of the input if their precision is not the block's (`width`, bytes per number),
    and with DoRA what base and adapter computed.
    """
    from recipe.models.lora import adapter_layers

    total = 0
    for into, out, has_dora in adapter_layers(block):
        own = into.weight.element_size()
        copy = 0 if own == width else into.in_features * (width if amp else own)
        total += copy + own * (into.out_features + 2 * has_dora * out.out_features)
    return total


def _forward_bytes(
    config: RecipeConfig, network: "JointNetwork", tokens: int, patches: int, width: int
) -> tuple[int, int]:
    """Return upper bounds for the activations and the logits of one forward pass, in bytes.

    Rows of the head's width: 20 and the feed-forward's per query or caption token, 4 per memory token. With maps 200
    more per vision token, 22 per vision token and layer, 22 per query and layer, and 43 per vision token if they
    propose; the pyramid also keeps the token's pixels and what it reads of the tower. Each logit of a chunk of
    positions counts three times: itself, in float32, and its log-probability or gradient.
    """
    from recipe.models.token_losses import CHUNK

    head, captions = config.detection_head, config.caption_decoder
    vision, text = network.vlm.hf_model.config.vision_config, network.vlm.text_config
    hf_model, hidden = network.vlm.hf_model, text.hidden_size
    family, (side, inner) = network.vlm.family, vision_sizes(hf_model.config)
    vision_block = block_bytes(patches, side, side, inner, width, family.feed_forward_rows)
    heads = hf_model.model.language_model.layers[0].self_attn.o_proj.in_features
    text_block = block_bytes(
        tokens, hidden, heads, text.intermediate_size, width, has_head_norms=family.normalizes_heads
    )
    # The graph reaches down to the lowest part that learns; below it a block's memory is given back at once.
    learning = set(trained_trunk(config))
    kept_vision = vision.depth if learning & {"vision", "lora_vision"} else 0
    kept_text = text.num_hidden_layers if learning else 0
    model, amp = hf_model.model, (view_trainer(config).precision or "").startswith("amp_")
    vision_block += patches * adapter_bytes(model.visual.blocks[0], width, amp)
    text_block += tokens * adapter_bytes(model.language_model.layers[0], width, amp)
    if config.model.gradient_checkpointing:
        activations = (kept_vision * patches * side + kept_text * tokens * hidden) * width
    else:
        activations = max(kept_vision - 1, 0) * vision_block + max(kept_text - 1, 0) * text_block
    activations += max(vision_block, text_block)
    if head is None:
        return activations, min(CHUNK, round(tokens * SUPERVISED)) * (width + 8) * text.vocab_size
    images = max(1, tokens // 256)  # of the head
    queries = images * (head.num_query_groups * head.num_queries + 2 * head.num_denoising_groups * OBJECTS)
    words = images * OBJECTS * CAPTION_TOKENS
    per_query, per_word = (20 + 2 * part.ffn_factor for part in (head, captions))
    rows = head.num_layers * (queries * per_query + tokens * 4) + captions.num_layers * (words * per_word + tokens * 4)
    read = 0
    if head.multi_scale:
        shown = patches // vision.spatial_merge_size**2  # vision tokens
        rows += shown * (200 + 43 * head.select_queries) + head.num_layers * 22 * (shown + queries)
        read = shown * (3 * 32**2 + 8 * side + 2 * hidden)
    activations += (rows * network.memory.width + read) * max(width, 4)
    logits = min(CHUNK, max(round(tokens * SUPERVISED), words)) * (width + 8) * text.vocab_size
    return activations, logits


def fits(memory: Memory, card: float) -> bool:
    """Return whether a GPU of `card` GiB holds the sum and the reserve."""
    return memory.needed <= card * GIB


def largest_packs(config: RecipeConfig, network: "JointNetwork", world_size: int, card: float) -> int | None:
    """Return the largest `packing.max_tokens`, a multiple of 256, with which a GPU of `card` GiB is enough; or None."""
    packing = config.train_loader.packing
    if packing is None:
        raise ConfigError("--fit looks for train_loader.packing.max_tokens: set train_loader.packing={}")
    found = None
    for step in (2**power * 256 for power in range(10, -1, -1)):  # by bisection: more tokens never need less
        trial = deepcopy(config)
        assert trial.train_loader.packing is not None
        trial.train_loader.packing.max_tokens = (found or 0) + step
        if fits(estimate(trial, network, world_size), card):
            found = (found or 0) + step
    return found


def advice(config: RecipeConfig, world_size: int, card: float) -> str:
    """Return what to set after a GPU of `card` GiB has run out of memory."""
    packing = config.train_loader.packing
    if packing is None:
        return "set train_loader.packing={max_tokens: 2048}, which bounds a step's memory"
    tokens = largest_packs(config, build_on_meta(config), world_size, card)
    if tokens is None:
        return f"by recipe.estimate no pack fits {card:.0f} GiB: freeze parts or set lora (yamls/README.md)"
    if tokens < (packing.max_tokens or config.max_seq_len):
        return f"by recipe.estimate {card:.0f} GiB are enough for train_loader.packing.max_tokens={tokens}"
    return (
        f"by recipe.estimate packs of {tokens} tokens fit {card:.0f} GiB: look for another process on the GPU "
        "(nvidia-smi), set trainer.device_train_microbatch_size=1, or lower train_loader.packing.max_tokens"
    )


def savings(reload: Callable[[list[str]], RecipeConfig], world_size: int) -> list[tuple[str, int]]:
    """Return overrides that would save memory, each with the bytes that it saves alone; the greatest first.

    `reload` gives the run's configuration with overrides.
    """

    def needed(overrides: list[str]) -> int:
        config = reload(overrides)
        return estimate(config, build_on_meta(config), world_size).needed

    before = needed([])
    found = [(way, before - needed(way.split())) for way in _ways_to_save(reload([]))]
    return sorted(((way, saved) for way, saved in found if saved > 0), key=lambda entry: -entry[1])


def _ways_to_save(config: RecipeConfig) -> list[str]:
    packing = config.train_loader.packing
    ways = [] if config.model.gradient_checkpointing else ["model.gradient_checkpointing=true"]
    if config.optimizer.lr_llm and config.detection_head is not None:
        frozen = "optimizer.lr_vision=0 optimizer.lr_merger=0 optimizer.lr_llm=0"
        # Stages that freeze the head at first would leave nothing that trains.
        ways.append(f"{frozen} staged_freezing.groups=null" if config.staged_freezing.groups else frozen)
    if config.optimizer.lr_vision:
        ways.append("optimizer.lr_vision=0")
    if not view_trainer(config).is_sharded and find_spec("bitsandbytes"):
        ways += [] if config.optimizer.lr_llm or config.model.frozen_dtype == "nf4" else ["model.frozen_dtype=nf4"]
        takes_8bit = config.optimizer.moments == "full" and config.model.dtype != "float64"
        ways += ["optimizer.moments=8bit"] if takes_8bit else []
    if packing is not None:
        tokens = packing.max_tokens or config.max_seq_len
        ways.append(f"train_loader.packing.max_tokens={tokens // 2}")
    return ways


def table(config: RecipeConfig, network: "JointNetwork", world_size: int) -> str:
    """Return the text that the command prints."""
    from recipe.models.nf4 import num_weights
    from recipe.optim.groups import group_parameters

    memory = estimate(config, network, world_size)
    view = view_trainer(config)
    shards, replicas = shards_and_replicas(view.fsdp, world_size)
    kind = "FSDP" if view.is_sharded else "DDP"
    groups = f", {replicas} groups of {shards}" if view.is_sharded and replicas > 1 else ""
    lines = [f"{config.model.pretrained_model_name_or_path}, {world_size} x {kind}{groups}", ""]
    for group, members in group_parameters(network).items():
        count = sum(num_weights(name, parameter) for name, parameter in members)
        frozen = "" if getattr(config.optimizer, f"lr_{group}") else ", frozen"
        lines.append(f"{group:<16}{count / 1e6:>10.1f} M parameters{frozen}")
    lines += ["", f"{'per GPU':<16}{'GiB':>10}"]
    parts = {name: size for name, size in vars(memory).items() if name not in ("snapshot", "host")}
    lines += [f"{name:<16}{size / GIB:>10.2f}" for name, size in parts.items()]
    lines += [f"{'total':<16}{memory.device_total / GIB:>10.2f}", "", f"{'per process':<16}{'GiB':>10}"]
    lines += [f"{'host':<16}{memory.host / GIB:>10.2f}  {memory.snapshot / GIB:.2f} of it the NaN rollback's snapshot"]
    tokens, patches = microbatch_shape(config, network.vlm.hf_model.config.vision_config.spatial_merge_size)
    words = {"objects": OBJECTS, "words": CAPTION_TOKENS, "reserve": RESERVE}
    return "\n".join([*lines, "", ASSUMED.format(tokens=tokens, patches=patches, **words)])


def answer(memory: Memory, ways: Sequence[tuple[str, int]]) -> str:
    """Return the last lines of the command: which GPUs are enough, and what would save most, from `savings`."""
    verdicts = [f"{card} GB: {'yes' if fits(memory, card) else 'no'}" for card in CARDS]
    lines = [f"fits a GPU of  {', '.join(verdicts)}  (needs {memory.needed / GIB:.1f} GiB with the reserve)"]
    lines += [f"saves {saved / GIB:>5.1f} GiB  {way}" for way, saved in ways[:3]]
    return "\n".join(lines)


def main(arguments: Sequence[str]) -> None:
    """Print the estimate for a yaml that `train.py` accepts; on a mistake print one line and exit with status 2."""
    purpose = "Estimate the memory of a run, per GPU; nothing is loaded and no GPU is needed."
    parser = parser_of(USAGE, purpose, EXAMPLES)
    parser.add_argument("--world-size", type=int, default=1, help="GPUs of the run; default %(default)s")
    parser.add_argument("--fit", type=float, metavar="GIB", help="print the largest packing.max_tokens for such a GPU")
    parser.add_argument("--json", action="store_true", help="print one JSON object: GiB by part, sum, needed, host")
    with one_line_errors():
        config, args = from_command_line(parser, arguments)
        from recipe.checks import check_libraries

        check_libraries(config)
        network = build_on_meta(config)
        if args.fit is not None:
            tokens = largest_packs(config, network, args.world_size, args.fit)
            if tokens is None:
                raise ConfigError(f"no pack fits {args.fit:g} GiB: freeze parts or use lora (yamls/README.md)")
            print(f"train_loader.packing.max_tokens={tokens} fits {args.fit:g} GiB, with {RESERVE}")
        elif args.json:
            memory = estimate(config, network, args.world_size)
            sizes = {**vars(memory), "sum": memory.device_total, "needed": memory.needed}
            print(json.dumps({name: round(size / GIB, 3) for name, size in sizes.items()}))
        else:
            ways = savings(lambda more: load_config(args.yaml, [*args.overrides, *more]), args.world_size)
            print(table(config, network, args.world_size), "", sep="\n")
            print(answer(estimate(config, network, args.world_size), ways))


if __name__ == "__main__":
    main(sys.argv[1:])
