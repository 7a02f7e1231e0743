"""FLOPs of a training step, counted from a microbatch's true shapes, part by part.

Matrix products alone are counted, a multiplication and an addition as two, as `torch.utils.flop_counter` does; a score
matrix is counted whole also where attention is causal (PaLM, appendix B). Padding of padded rows is work and counted.
The walk follows autograd: a product has a backward half for its weight where that is trained, and one for its input
where something below is.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn

from recipe.schema import Batch

PARTS = ("vision", "merger", "llm", "detection")


@dataclass
class Flops:
    """FLOPs of each of `PARTS`; `detection` is the memory's adapters, the head and the captions.

    Attributes:
        forward: Of the forward pass.
        backward: Of the backward pass.
        recompute: What gradient checkpointing computes twice.
    """

    forward: dict[str, int] = field(default_factory=lambda: dict.fromkeys(PARTS, 0))
    backward: dict[str, int] = field(default_factory=lambda: dict.fromkeys(PARTS, 0))
    recompute: dict[str, int] = field(default_factory=lambda: dict.fromkeys(PARTS, 0))

    def model(self, part: str) -> int:
        """What the model needs: forward and backward."""
        return self.forward[part] + self.backward[part]

    def hardware(self, part: str) -> int:
        """What the device computes: the same, and what is computed twice."""
        return self.model(part) + self.recompute[part]


@dataclass
class Walk:
    """Adds up products along one path; every method returns whether its result has a gradient.

    Attributes:
        flops: Added to.
        part: Whose the products are.
        trained: Whether the part's own weights are.
    """

    flops: Flops
    part: str
    trained: bool

    def linear(self, layer: nn.Module, rows: int, has_gradient: bool) -> bool:
        """`rows` vectors through a linear layer; `has_gradient`: of its input."""
        assert isinstance(layer, nn.Linear)
        return self.product(rows * layer.in_features * layer.out_features, has_gradient, self.trained)

    def product(self, multiplications: int, left: bool, right: bool) -> bool:
        """A matrix product, and which of its factors have a gradient."""
        self.flops.forward[self.part] += 2 * multiplications
        self.flops.backward[self.part] += 2 * multiplications * (left + right)
        return left or right

    def attention(self, pairs: int, score_width: int, value_width: int, query: bool, key: bool, value: bool) -> bool:
        """Scores and weighted sums of `pairs` of a query and a key; widths over all heads."""
        scores = self.product(pairs * score_width, query, key)
        return self.product(pairs * value_width, scores, value)


def step_flops(network: nn.Module, batches: Sequence[Batch], trained: Collection[str]) -> Flops:
    """FLOPs of one optimizer step of this rank.

    Exact but where an image has more objects than there are queries: which captions are then written is not known
    before the matching, and the mean is taken.

    Args:
        network: The `JointNetwork`, wrapped or sharded or neither.
        batches: Its microbatches.
        trained: The parameter groups that have a gradient in this step, as named in `recipe.optim.groups`.
    """
    flops = Flops()
    for batch in batches:
        _count(network, batch, frozenset(trained), flops)
    return flops


def _count(network: Any, batch: Batch, trained: frozenset[str], flops: Flops) -> None:
    hf_model = network.vlm.hf_model
    grids: list[list[int]] = batch["image_grid_thw"].tolist()
    side = hf_model.config.vision_config.spatial_merge_size
    patches, features = _vision(hf_model.model.visual, grids or [[1, side, side]], trained, flops)
    hidden = _language_model(hf_model, batch, features, trained, flops)
    Walk(flops, "llm", "llm" in trained).linear(hf_model.lm_head, len(batch["labels"]), hidden)
    solved = [grids[image] for image in batch["student_images"].tolist()]
    num_images = max(1, len(solved))
    num_vision = max((t * h * w // side**2 for t, h, w in solved), default=1)
    num_words = batch["prompt_index"].shape[1] if solved else 1
    if not trained & {"adapter", "detection"}:
        patches = features = hidden = False  # the whole head runs without autograd
    elif not solved:
        patches, features = False, hidden  # the blank memory is made of hidden states
    adapter = Walk(flops, "detection", "adapter" in trained)
    _adapter(adapter, network.memory.vision_adapter, num_images * num_vision, features)
    _adapter(adapter, network.memory.language_adapter, num_images * num_words, hidden)
    num_patches = 0
    if network.memory.patch_adapter is not None:
        num_patches = num_vision * side**2
        _adapter(adapter, network.memory.patch_adapter, num_images * num_patches, patches)
    has_gradient = patches or features or hidden or "adapter" in trained
    memory = Tokens(num_images, num_vision + num_patches + num_words, has_gradient)
    objects = [0 if target is None else len(target["boxes"]) for target in batch["targets"]] or [0]
    walk = Walk(flops, "detection", "detection" in trained)
    queries = _head(network, memory, objects, walk)
    own = network.caption_decoder.vocabulary
    matrix = hf_model.lm_head.in_features * hf_model.lm_head.out_features if own is None else own.vocab_size * own.width
    ids = [target["caption_ids"] for target in batch["targets"] if target is not None and len(target["caption_ids"])]
    num_slots, length = (max((part.shape[axis] for part in ids), default=1) for axis in (0, 1))
    num_captions = sum(min(len(part), network.detection_head.num_queries) for part in ids) or 1
    written = _captions(walk, network.caption_decoder, memory, num_captions, num_slots, length, queries)
    group = "llm" if own is None else "detection"
    output = Walk(flops, "detection", group in trained and bool(trained & {"adapter", "detection"}))
    output.product(_caption_tokens(ids, network.detection_head.num_queries) * matrix, written, output.trained)


def window_lengths(grid: Sequence[int], side: int) -> list[int]:
    """Vision tokens of each window of a picture, cut off at its edges.

    Args:
        grid: (time, height, width) in vision tokens.
        side: Of a window, in vision tokens.
    """
    frames, rows, columns = grid
    heights = [min(side, rows - top) for top in range(0, rows, side)]
    widths = [min(side, columns - left) for left in range(0, columns, side)]
    return [height * width for height in heights for width in widths] * frames


def _vision(visual: Any, grids: Sequence[Sequence[int]], trained: frozenset[str], flops: Flops) -> tuple[bool, bool]:
    """Patch embedding, blocks and merger; whether the features before and after the merger have a gradient."""
    walk = Walk(flops, "vision", "vision" in trained)
    unit = visual.spatial_merge_unit
    patches = sum(t * h * w for t, h, w in grids)
    whole = sum(t * (h * w) ** 2 for t, h, w in grids)
    merged = [(t, h // visual.spatial_merge_size, w // visual.spatial_merge_size) for t, h, w in grids]
    window = visual.window_size // visual.spatial_merge_size // visual.patch_size
    windowed = sum((unit * length) ** 2 for grid in merged for length in window_lengths(grid, window))
    embed = visual.patch_embed.proj
    _, height, width = embed.kernel_size  # not the weight's: FSDP may have taken it apart
    products = patches * embed.out_channels * embed.in_channels * height * width
    gradient = walk.product(products, False, walk.trained)
    for number, block in enumerate(visual.blocks):
        before = flops.forward["vision"]
        gradient = gradient or walk.trained  # by the norm before the products
        pairs = whole if number in visual.fullatt_block_indexes else windowed
        width = block.attn.proj.in_features
        qkv = walk.linear(block.attn.qkv, patches, gradient)
        attended = walk.attention(pairs, width, width, qkv, qkv, qkv)
        gradient = walk.linear(block.attn.proj, patches, attended) or gradient
        gradient = _gated(walk, block, patches, gradient, before)
    merge = Walk(flops, "merger", "merger" in trained)
    first, _, second = visual.merger.mlp
    merged = merge.linear(first, patches // unit, gradient or merge.trained)
    return gradient, merge.linear(second, patches // unit, merged)


def _language_model(hf_model: Any, batch: Batch, features: bool, trained: frozenset[str], flops: Flops) -> bool:
    """The decoder layers; whether the hidden states have a gradient."""
    walk = Walk(flops, "llm", "llm" in trained)
    num_rows, row_length = batch["input_ids"].shape
    segments = batch["segment_lengths"] or [row_length] * num_rows
    tokens, pairs = num_rows * row_length, sum(length**2 for length in segments)
    gradient = features or walk.trained
    for layer in hf_model.model.language_model.layers:
        before, block = flops.forward["llm"], layer.self_attn
        width = block.o_proj.in_features
        for projection in (block.q_proj, block.k_proj, block.v_proj):
            walk.linear(projection, tokens, gradient)
        attended = walk.attention(pairs, width, width, gradient, gradient, gradient)
        gradient = walk.linear(block.o_proj, tokens, attended)
        gradient = _gated(walk, layer, tokens, gradient, before)
    return gradient


def _gated(walk: Walk, layer: Any, rows: int, gradient: bool, before: int) -> bool:
    """The gated feed-forward at the end of a block, and what checkpointing computes twice of the whole block.

    The block's last product is not: nothing that the backward pass needs comes after it, and torch stops there.
    """
    walk.linear(layer.mlp.gate_proj, rows, gradient)
    gradient = walk.linear(layer.mlp.up_proj, rows, gradient)
    if gradient and getattr(layer, "gradient_checkpointing", False):
        walk.flops.recompute[walk.part] += walk.flops.forward[walk.part] - before
    return walk.linear(layer.mlp.down_proj, rows, gradient)


@dataclass(frozen=True)
class Tokens:
    """Rows of vectors: how many images, how many each, and whether they have a gradient."""

    num_images: int
    length: int
    has_gradient: bool

    @property
    def total(self) -> int:
        """Vectors of all images."""
        return self.num_images * self.length


def _adapter(walk: Walk, adapter: Any, rows: int, gradient: bool) -> None:
    gradient = walk.linear(adapter.down, rows, gradient or walk.trained)
    gradient = walk.linear(adapter.up, rows, gradient)
    if isinstance(adapter.project, nn.Linear):
        walk.linear(adapter.project, rows, gradient)


def _attend(
    walk: Walk,
    attention: Any,
    queries: Tokens,
    keys: Tokens,
    pairs: int,
    query_position: bool = False,
    key_position: bool = False,
    num_places: int | None = None,
) -> bool:
    """One `recipe.models.layers.Attention`.

    Args:
        walk: Adds up.
        attention: The attention.
        queries: What attends.
        keys: What it attends to.
        pairs: Of both.
        query_position: Whether the queries' positions have a gradient.
        key_position: Whether the keys' have.
        num_places: Positions of the queries, where several share one.
    """
    width, score_width = attention.out.in_features, attention.query.out_features
    query = walk.linear(attention.query, queries.total, queries.has_gradient)
    key = walk.linear(attention.key, keys.total, keys.has_gradient)
    value = walk.linear(attention.value, keys.total, keys.has_gradient)
    if attention.query_position is not None:
        places = queries.total if num_places is None else num_places
        query = walk.linear(attention.query_position, places, query_position) or query
        key = walk.linear(attention.key_position, keys.total, key_position) or key
        score_width *= 2
    attended = walk.attention(pairs, score_width, width, query, key, value)
    return walk.linear(attention.out, queries.total, attended)


def _layers(walk: Walk, layers: Any, rows: int, gradient: bool) -> bool:
    for layer in layers:
        if isinstance(layer, nn.Linear):
            gradient = walk.linear(layer, rows, gradient)
    return gradient


def _head(network: Any, memory: Tokens, objects: Sequence[int], walk: Walk) -> bool:
    """The decoder over object and denoising queries; whether the queries' features have a gradient."""
    head, trained = network.detection_head, walk.trained
    if head.selection is not None:
        _selection(walk, head.selection, memory, head.num_queries)
    denoising = 2 * network.num_denoising_groups * max(objects)
    total = head.query_content.num_embeddings + denoising
    gradient = boxes = trained
    for number, layer in enumerate(head.layers):
        queries = Tokens(memory.num_images, total, gradient)
        box = _layers(walk, head.box_position, queries.total, boxes)
        scale = _layers(walk, head.place_scale, queries.total, gradient)
        states = Tokens(memory.num_images, total, gradient or trained)
        pairs = memory.num_images * total**2
        gradient = _attend(walk, layer.self_attention, states, states, pairs, box, box) or gradient
        states = Tokens(memory.num_images, total, gradient or trained)
        pairs = memory.total * total
        gradient = _attend(walk, layer.cross_attention, states, memory, pairs, boxes or scale) or gradient
        gradient = _layers(walk, layer.ffn, queries.total, gradient or trained) or gradient
        judged = network.aux_loss or denoising > 0 or number == len(head.layers) - 1
        outputs = Walk(walk.flops, "detection", trained and judged)
        _layers(outputs, head.box_delta, queries.total, judged and (gradient or trained))
        outputs.linear(head.objectness, queries.total, judged and (gradient or trained))
        boxes = trained and not head.refine_boxes  # a layer's boxes are handed on without their gradient
    return gradient or trained


def _selection(walk: Walk, selection: Any, memory: Tokens, num_queries: int) -> None:
    """Judges every token of the memory; boxes of the best alone."""
    gradient = walk.linear(selection.inputs, memory.total, memory.has_gradient)
    walk.linear(selection.objectness, memory.total, gradient)
    _layers(walk, selection.box_delta, memory.num_images * min(num_queries, memory.length), gradient)


def _captions(
    walk: Walk, decoder: Any, memory: Tokens, num_captions: int, num_slots: int, length: int, features: bool
) -> bool:
    """The caption decoder up to the output matrix; whether its states have a gradient.

    Args:
        walk: Adds up.
        decoder: The `CaptionDecoder`.
        memory: What it reads.
        num_captions: Of all images.
        num_slots: The most captions that an image could have, which cross-attention has room for.
        length: Of a caption.
        features: Whether the queries' features have a gradient.
    """
    trained, slots = walk.trained, memory.num_images * num_slots
    gradient = walk.linear(decoder.start, num_captions, features)
    if isinstance(decoder.token_in, nn.Linear):
        gradient = walk.linear(decoder.token_in, num_captions * (length - 1), trained) or gradient
    rows = Tokens(num_captions, length, gradient or trained)
    for layer in decoder.layers:
        gradient = _attend(walk, layer.self_attention, rows, rows, num_captions * length**2) or gradient
        padded = Tokens(memory.num_images, num_slots * length, gradient or trained)
        pairs = memory.total * padded.length
        gradient = _attend(walk, layer.cross_attention, padded, memory, pairs, num_places=slots) or gradient
        gradient = _layers(walk, layer.ffn, rows.total, gradient or trained)
        rows = replace(rows, has_gradient=gradient or trained)
    if isinstance(decoder.token_out, nn.Linear):
        gradient = walk.linear(decoder.token_out, rows.total, rows.has_gradient)
    return gradient


def _caption_tokens(ids: Sequence[Tensor], num_queries: int) -> int:
    """Tokens of the captions that find a query."""
    counts = [(len(part), int((part != -100).sum())) for part in ids]
    return sum(round(tokens * min(1.0, num_queries / objects)) for objects, tokens in counts)
