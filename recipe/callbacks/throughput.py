"""How much of the device a run uses: FLOPs, their share of the peak, and the time spent waiting for the loader.

FLOPs are computed from the shapes of the modules and of the microbatches. Only matrix products and convolutions count,
a multiplication and an addition as two, as in `torch.utils.flop_counter`. Causal attention counts whole (PaLM, appendix
B), and so does padding. The backward pass has a product for each weight that is trained, and one for each input below
which something is trained.
"""

import math
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import torch
from composer import Callback
from composer.callbacks.speed_monitor import get_gpu_flops_available
from composer.core import State
from composer.loggers import Logger
from composer.utils import dist
from torch import nn

from recipe.callbacks.measures import every_batches, joint_model
from recipe.models.lora import adapter_layers
from recipe.models.pyramid import CELLS_PER_TOKEN
from recipe.optim.groups import named_groups
from recipe.schema import Batch

PARTS = ("vision", "merger", "llm", "detection")  # detection: the memory's adapters, the head and the captions


@dataclass
class Flops:
    """FLOPs of each of `PARTS`: forward and backward of the model, and what is computed twice to save memory."""

    model: Counter[str] = field(default_factory=Counter[str])
    recompute: Counter[str] = field(default_factory=Counter[str])

    def add(self, part: str, linear: int, trained: bool, gradient: bool, attention: int = 0) -> None:
        """Add multiplications with weights (`linear`: rows times `_weights`) and of queries, keys and values."""
        self.model[part] += 2 * (linear * (1 + trained + gradient) + attention * (1 + 2 * gradient))

    def add_logits(self, part: str, linear: int, trained: bool, gradient: bool) -> None:
        """Add the output matrix; if it is trained, the backward pass computes its logits again.

        See `recipe.models.token_losses`.
        """
        self.add(part, linear, trained, gradient)
        self.recompute[part] += 2 * linear * (gradient and trained)

    def add_blocks(
        self, part: str, blocks: Any, rows: int, trained: Collection[str], gradient: bool, attention: int
    ) -> None:
        """Add transformer blocks. Checkpointing recomputes all but the last product, whose result is not needed."""
        pairs = [pair for block in blocks for pair in adapter_layers(block)]
        adapters = rows * sum(_weights(into, out) for into, out, _ in pairs)
        linear = rows * _weights(*blocks) - adapters
        # DoRA computes the whole change of each weight, from a unit matrix, to measure its rows.
        whole = sum(into.in_features * _weights(into, out) for into, out, has_dora in pairs if has_dora)
        self.add(part, linear, part in trained, gradient, attention)
        self.add(part, adapters, f"lora_{part}" in trained, gradient)
        self.add(part, whole, trained=False, gradient=False)
        if gradient and getattr(blocks[0], "gradient_checkpointing", False):
            last = rows * sum(_weights(_last_product(block)) for block in blocks)
            self.recompute[part] += 2 * (linear + adapters + whole + attention - last)


def _last_product(block: Any) -> nn.Module:
    last = [child for child in block.mlp.children() if _weights(child)][-1]
    found = adapter_layers(last)
    return found[0][1] if found else last


def step_flops(network: Any, batches: Sequence[Batch], trained: Collection[str]) -> Flops:
    """Count this rank's optimizer step of a `JointNetwork`, within 1 %, if these parameter groups are `trained`.

    The trunk of a microbatch that the network's cache holds does not run.
    """
    flops = Flops()
    for batch in batches:
        if network.cache is None or not network.cache.has(batch["contents"]):
            _add_trunk(network, batch, trained, flops)
        if network.has_head:
            _add_detection(network, batch, trained, flops)
    return flops


def window_pairs(grid: Sequence[int], side: int) -> int:
    """Return how many pairs of an image's patches (time, height, width) share a window of `side`, cut at the edge."""
    down, across = (size // side * side**2 + (size % side) ** 2 for size in grid[1:])
    return grid[0] * down * across


def _add_trunk(network: Any, batch: Batch, trained: Collection[str], flops: Flops) -> None:
    hf_model, (num_rows, row_length) = network.vlm.hf_model, batch["input_ids"].shape
    visual, layers = hf_model.model.visual, hf_model.model.language_model.layers
    embed, merge, family = visual.patch_embed.proj, visual.spatial_merge_size, network.vlm.family
    num_whole = len(visual.fullatt_block_indexes if family.has_windows else visual.blocks)
    grids = batch["image_grid_thw"].tolist() or [[1, merge, merge]]  # a blank image if there is none
    patches, pairs = sum(t * h * w for t, h, w in grids), num_whole * sum(t * (h * w) ** 2 for t, h, w in grids)
    if family.has_windows:
        side = visual.window_size // visual.patch_size // merge * merge
        pairs += (len(visual.blocks) - num_whole) * sum(window_pairs(grid, side) for grid in grids)
    pixels = embed.in_channels * embed.kernel_size[-1] ** 2  # of one frame: two equal ones are read as one
    flops.add("vision", patches * pixels * embed.out_channels, "vision" in trained, gradient=False)
    gradient = not {"vision", "lora_vision"}.isdisjoint(trained)
    flops.add_blocks("vision", visual.blocks, patches, trained, gradient, 2 * pairs * embed.out_channels)
    gradient = gradient or "merger" in trained
    mergers = _weights(*(visual.get_submodule(name) for name in family.mergers))
    flops.add("merger", patches // merge**2 * mergers, "merger" in trained, gradient)
    gradient = gradient or not {"llm", "lora_llm"}.isdisjoint(trained)
    pairs = len(layers) * sum(length**2 for length in batch["segment_lengths"] or [row_length] * num_rows)
    attention = 2 * pairs * layers[0].self_attn.o_proj.in_features
    flops.add_blocks("llm", layers, num_rows * row_length, trained, gradient, attention)
    flops.add_logits("llm", len(batch["labels"]) * _weights(hf_model.lm_head), "llm" in trained, gradient)


def _add_detection(network: Any, batch: Batch, trained: Collection[str], flops: Flops) -> None:
    memory, head, writer = network.memory, network.detection_head, network.caption_decoder
    learns, hf_model = "detection" in trained, network.vlm.hf_model
    merge = hf_model.model.visual.spatial_merge_size
    gradient = learns or "adapter" in trained  # without either, all of it runs without autograd
    below = gradient and set(trained) != {"detection"}
    grids = batch["image_grid_thw"][batch["student_images"]].tolist()
    images, words = max(1, len(grids)), batch["prompt_index"].shape[1] if grids else 1
    vision = max((t * h * w // merge**2 for t, h, w in grids), default=1)
    adapted = images * vision * _weights(memory.vision_adapter) + images * words * _weights(memory.language_adapter)
    tokens = images * (vision + words)
    flops.add("detection", adapted, "adapter" in trained, below)
    cells, maps_learn = [0], gradient and not {"vision", "lora_vision", "merger", "adapter"}.isdisjoint(trained)
    if memory.pyramid is not None:
        cells = _add_pyramid(memory.pyramid, grids, merge, trained, gradient, flops)
    if head.proposal_head is not None:
        finder = head.proposal_head
        own = CELLS_PER_TOKEN**2 * (sum(t * h * w // merge**2 for t, h, w in grids) or 1)  # without padding
        linear = own * _weights(finder.tower) + cells[0] * _weights(finder.objectness, finder.box)
        flops.add("detection", linear + images * head.num_queries * _weights(finder.content), learns, maps_learn)
    ids = [target["caption_ids"] for target in batch["targets"] if target is not None and len(target["boxes"])]
    slots, length = (max((rows.shape[axis] for rows in ids), default=1) for axis in (0, 1))
    captions = sum(min(len(rows), head.num_queries) for rows in ids) or 1
    # Of more objects than queries, the matching chooses whose captions are written: take the mean.
    written = sum(round(min(1.0, head.num_queries / len(rows)) * int((rows != -100).sum())) for rows in ids)
    queries = images * (head.query_content.num_embeddings + 2 * network.num_denoising_groups * (slots if ids else 0))
    of_query = _weights(head.box_embedding, head.place_scale, head.box_deltas, head.objectness)
    starts = [layer for layer in (writer.start, writer.region) if layer is not None]
    of_caption = _weights(*starts) + (length - 1) * _weights(writer.token_in) + length * _weights(writer.token_out)
    flops.add("detection", len(head.layers) * queries * of_query + captions * of_caption, learns, gradient)
    for layers, rows, asking, places, pairs in (  # captions ask the memory in slots, all tokens of one from one place
        (head.layers, queries, queries, queries, queries**2 // images),
        (writer.layers, captions * length, images * slots * length, images * slots, captions * length**2),
    ):
        own, cross, width = layers[0].self_attention, layers[0].cross_attention, len(layers) * memory.width
        attention = (2 + (own.query_position is not None)) * pairs + 3 * tokens * asking // images
        linear = rows * _weights(own, layers[0].ffn) + asking * _weights(cross.query, cross.out)
        flops.add("detection", len(layers) * linear, learns, gradient, width * attention)
        flops.add("detection", len(layers) * tokens * _weights(cross.key, cross.value), learns, below)
        linear = tokens * _weights(cross.key_position) + places * _weights(cross.query_position)
        flops.add("detection", len(layers) * linear, learns, gradient=False)  # positions are given
    for look in (layer.map_attention for layer in head.layers if memory.pyramid is not None):
        flops.add("detection", sum(cells) * _weights(look.value), learns, maps_learn)
        flops.add("detection", queries * _weights(look.offsets, look.weights, look.out), learns, gradient)
    flops.add_logits("detection", written * _weights(hf_model.lm_head), gradient and "llm" in trained, gradient)


def _add_pyramid(
    pyramid: Any, grids: Sequence[Sequence[int]], merge: int, trained: Collection[str], has_graph: bool, flops: Flops
) -> list[int]:
    """Add the maps of the student images, of one token if there is none; return the cells of each map with padding."""
    tokens = [(height // merge, width // merge) for _, height, width in grids] or [(1, 1)]
    levels = [[(n * rows, n * columns) for rows, columns in tokens] for n in (CELLS_PER_TOKEN, 2, 1)]
    levels.append([(-(-rows // 2), -(-columns // 2)) for rows, columns in tokens])
    finest, patches, whole, coarse = (sum(rows * columns for rows, columns in level) for level in levels)
    learns = "adapter" in trained
    patches_learn = has_graph and not {"vision", "lora_vision"}.isdisjoint(trained)
    tokens_learn = patches_learn or (has_graph and "merger" in trained)
    of_pixels = finest * _weights(pyramid.stem[2]) + 4 * finest * _weights(pyramid.stem[1])
    of_patches, of_tokens = whole * _weights(pyramid.to_tokens), whole * _weights(pyramid.from_tokens)
    of_tokens += coarse * _weights(pyramid.to_coarse, pyramid.from_coarse)
    of_tokens += patches * _weights(pyramid.smooth_patches, pyramid.from_patches)
    of_tokens += finest * _weights(pyramid.smooth_finest, pyramid.widen)
    for linear, gradient in (  # each with whether its input has a gradient
        (16 * finest * _weights(pyramid.stem[0]), False),
        (of_pixels + patches * _weights(pyramid.to_patches), learns),
        (patches * _weights(pyramid.patches), patches_learn),
        (of_patches, learns or patches_learn),
        (whole * _weights(pyramid.tokens), tokens_learn),
        (of_tokens, learns or tokens_learn),
    ):
        flops.add("detection", linear, learns, gradient)
    return [len(tokens) * max(rows for rows, _ in level) * max(columns for _, columns in level) for level in levels]


def _weights(*modules: nn.Module) -> int:
    """Return the multiplications per row, or per cell of the result, of the linear layers and convolutions."""
    total = 0  # by their shapes: under FSDP1 a rank holds no whole weight
    for layer in (layer for module in modules for layer in module.modules()):
        if isinstance(layer, nn.Conv2d):
            total += layer.in_channels * layer.out_channels * math.prod(layer.kernel_size)
        elif isinstance(layer, nn.Linear):
            total += layer.in_features * layer.out_features
    return total


class Throughput(Callback):
    """Counts FLOPs and time between the request for a batch and the batch's end; evaluation and saving stay out.

    Logged every `interval`, of the steps since the last time and over all ranks:
        flops/step/{vision,merger,llm,detection}: of one step, forward and backward, nothing that is computed twice.
        flops/per_second: the same over all parts.
        flops/hardware_per_second: with what gradient checkpointing and the losses' logits compute twice.
        mfu: `flops/per_second` over the peak of all devices; only where the peak is known.
        data/stall_share: share of the time in which the rank waited for its loader.

    Args:
        interval: Number of batches, such as `10ba`.
        peak_flops_per_second: Of one device, dense, in the run's precision. Default: Composer's table of devices, which
            says so where it does not know one.
    """

    def __init__(self, interval: str = "10ba", peak_flops_per_second: float | None = None):
        self.num_batches = every_batches(interval)
        self.peak = peak_flops_per_second
        self._reset()

    def fit_start(self, state: State, logger: Logger) -> None:
        """Looks the device up."""
        if self.peak is None:
            self.peak = float(get_gpu_flops_available(state))

    def before_dataloader(self, state: State, logger: Logger) -> None:
        """A batch is asked for."""
        self.asked = perf_counter()

    def after_dataloader(self, state: State, logger: Logger) -> None:
        """It is there."""
        self.stalled += perf_counter() - self.asked

    def batch_start(self, state: State, logger: Logger) -> None:
        """Counts on the host, before the batch is moved; what is frozen in this step is frozen by now."""
        groups = named_groups(state.optimizers[0]).items()
        trained = {name for name, parameters in groups if any(parameter.requires_grad for parameter in parameters)}
        flops = step_flops(joint_model(state).model, state.batch, trained)
        for index, part in enumerate(PARTS):
            self.model_flops[index] += flops.model[part]
            self.hardware_flops += flops.model[part] + flops.recompute[part]

    def batch_end(self, state: State, logger: Logger) -> None:
        """Logs every `interval`: one all-reduce."""
        self.seconds += perf_counter() - self.asked
        self.steps += 1
        if int(state.timestamp.batch) % self.num_batches:
            return
        own = [*self.model_flops, self.hardware_flops, self.stalled, self.seconds]
        sums = state.device.tensor_to_device(torch.tensor(own, dtype=torch.float64))
        dist.all_reduce(sums)
        *parts, hardware, stalled, rank_seconds = sums.tolist()
        seconds = rank_seconds / dist.get_world_size()
        metrics = {f"flops/step/{part}": value / self.steps for part, value in zip(PARTS, parts, strict=True)}
        metrics["flops/per_second"] = sum(parts) / seconds
        metrics["flops/hardware_per_second"] = hardware / seconds
        metrics["data/stall_share"] = stalled / rank_seconds
        if self.peak:
            metrics["mfu"] = sum(parts) / (rank_seconds * self.peak)
        logger.log_metrics(metrics)
        self._reset()

    def _reset(self) -> None:
        self.model_flops = [0.0] * len(PARTS)
        self.hardware_flops = 0.0
        self.steps = 0
        self.stalled = 0.0
        self.seconds = 0.0
        self.asked = perf_counter()
