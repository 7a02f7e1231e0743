"""The detection head: object queries with reference boxes that read an image's memory, layer by layer.

DETR's set prediction (Carion et al. 2020) with anchor boxes as queries (DAB-DETR), positions matched separately from
contents in cross-attention (Conditional DETR), boxes refined by each layer (Deformable DETR) and denoising queries
(DN-DETR, DINO). There is no class list: a query has one objectness logit, and the caption decoder writes its words.

Denoising queries (DN-DETR; contrastive as in DINO, section 3.3) are noised ground truth that the decoder must restore.
They need no matching, so they teach the decoder to refine boxes from the first step. The noise of an image depends
on its seed alone, never on the rest of the batch, so training stays exact under microbatches, ranks and resume.
"""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from recipe.boxes import apply_deltas
from recipe.models.layers import MLP, Attention, DeformableAttention, FeedForward, compass, objectness_layer
from recipe.models.memory import sides_in_tokens, sine_embedding
from recipe.models.proposals import ProposalHead
from recipe.models.pyramid import LEVELS
from recipe.schema import DenoisingQueries, DetectionOutputs, Memory, Target

NUM_POINTS = 4  # of each head in each map (Deformable DETR)
SMALLEST_REFERENCE = 1e-3  # side of a reference box, as a share of the image's


class DecoderLayer(nn.Module):
    """Self-attention among queries, a look at the maps, cross-attention to the memory, feed-forward; pre-norm."""

    def __init__(
        self, width: int, num_heads: int, ffn_factor: int, dropout: float, local_attention: bool, multi_scale: bool
    ):
        super().__init__()
        self.self_norm = nn.LayerNorm(width)
        self.self_attention = Attention(width, num_heads, positional=True)
        self.map_norm = nn.LayerNorm(width) if multi_scale else None
        self.map_attention = DeformableAttention(width, num_heads, LEVELS, NUM_POINTS) if multi_scale else None
        self.cross_norm = nn.LayerNorm(width)
        self.cross_attention = Attention(width, num_heads, positional=True, local=local_attention)
        self.ffn_norm = nn.LayerNorm(width)
        self.ffn = FeedForward(width, ffn_factor, dropout)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        queries: Float[Tensor, "N Q W"],
        box_positions: Float[Tensor, "N Q W"],
        place_positions: Float[Tensor, "N heads Q W"],
        boxes: Float[Tensor, "N Q 4"],
        memory: Memory,
        mask: Bool[Tensor, "#N 1 Q Q"] | None,
    ) -> Float[Tensor, "N Q W"]:
        """Return the next layer's queries.

        `boxes` are the references, cxcywh, `box_positions` their embedding; `place_positions` embed where each head
        looks, comparable to `memory.positions`. `mask` is for self-attention.
        """
        queries = queries + box_positions
        states = self.self_norm(queries)
        keys_values = self.self_attention.keys_values(states, box_positions)
        positions = self.self_attention.query_positions(box_positions)
        queries = queries + self.dropout(self.self_attention(states, keys_values, positions, mask))
        if self.map_attention is not None and self.map_norm is not None:
            assert memory.extents is not None
            read = self.map_attention(self.map_norm(queries), boxes, memory.levels, memory.extents)
            queries = queries + self.dropout(read)
        states = self.cross_norm(queries)
        keys_values = self.cross_attention.keys_values(memory.tokens, memory.positions)
        positions = self.cross_attention.query_positions(place_positions)
        memory_mask = memory.mask[:, None, None, :]
        queries = queries + self.dropout(self.cross_attention(states, keys_values, positions, memory_mask))
        return queries + self.dropout(self.ffn(self.ffn_norm(queries)))


class DetectionHead(nn.Module):
    """Up to `num_queries` objects per image: box, objectness logit and the features a caption is written from.

    Args:
        width: Of the memory; a multiple of 8 and of `num_heads`.
        ffn_factor: Width of the feed-forward blocks, as a multiple of `width`.
        refine_boxes: Each layer's boxes are the next one's references; else all layers share the first.
        local_attention: Queries initially look around their reference boxes, each head at its own place; else they
            learn slowly how their positions relate to the memory's.
        multi_scale: Queries read the memory's maps too.
        select_queries: The first references are the best proposals of the finest map; else they are learned.
        num_query_groups: Groups of queries in training, each matched separately (Group DETR); only the first one
            predicts.
    """

    def __init__(
        self,
        width: int,
        num_queries: int,
        num_heads: int,
        num_layers: int,
        ffn_factor: int,
        dropout: float,
        refine_boxes: bool,
        local_attention: bool = True,
        multi_scale: bool = False,
        select_queries: bool = False,
        num_query_groups: int = 1,
    ):
        super().__init__()
        self.width = width
        self.num_queries = num_queries
        self.refine_boxes = refine_boxes
        self.num_query_groups = num_query_groups
        self.query_content = nn.Embedding(num_query_groups * num_queries, width)
        # Small compared with what is read from the memory: else queries learn frequent places before appearance.
        nn.init.normal_(self.query_content.weight, std=0.1)
        self.query_boxes = nn.Parameter(initial_boxes(num_queries).repeat(num_query_groups, 1))
        self.denoising_content = nn.Parameter(torch.zeros(width))
        self.box_embedding = MLP(width, width, width, 2)
        self.place_scale = _constant_mlp(width, width, 2, start=1.0)  # at first, places as they are
        self.places = nn.Parameter(compass(num_heads) * local_attention)
        self.layers = nn.ModuleList(
            DecoderLayer(width, num_heads, ffn_factor, dropout, local_attention, multi_scale) for _ in range(num_layers)
        )
        self.norm = nn.LayerNorm(width)
        self.objectness = objectness_layer(width)
        # Its name says the unit: heads of older versions have a `box_delta` before the sigmoid, and do not load.
        self.box_deltas = _constant_mlp(width, 4, 3, start=0.0)  # at first, the reference box itself
        self.proposal_head = ProposalHead(width) if select_queries else None

    def forward(
        self, memory: Memory, denoising: DenoisingQueries | None = None
    ) -> tuple[DetectionOutputs, DetectionOutputs | None]:
        """Return the outputs of the object queries of N images, and those of the denoising queries if given."""
        num_images, num_groups = len(memory.tokens), self.num_query_groups if self.training else 1
        num_queries = num_groups * self.num_queries
        queries = self.query_content.weight[:num_queries].expand(num_images, -1, -1)  # (N, G * Q, W)
        # (N, G * Q, 4), at least float32 as the cells are, whatever the weights' precision; so all boxes are.
        references = self.query_boxes[:num_queries].to(memory.cells.dtype).sigmoid().expand(num_images, -1, -1)
        proposals = None
        if self.proposal_head is not None:
            proposals = self.proposal_head(memory)
            best, contents, found = (
                part.repeat(1, num_groups, 1)
                for part in self.proposal_head.select(proposals, memory.levels[0], self.num_queries)
            )
            queries = queries + contents * found
            references = torch.where(found, as_references(best), references) + 0.0 * references
        num_denoising, mask = 0, None
        if denoising is not None:
            num_denoising = len(denoising)
            mask = attention_mask(denoising, num_queries, num_groups)
            content = self.denoising_content.expand(num_images, num_denoising, -1)
            queries = torch.cat([content, queries], dim=1)
            references = torch.cat([as_references(denoising.boxes).to(references), references], dim=1)
        else:
            queries = queries + 0.0 * self.denoising_content  # every parameter has a gradient in every step
            if num_groups > 1:
                group = group_numbers(num_queries, num_groups, queries.device)
                mask = (group[:, None] == group)[None, None]
        in_tokens = sides_in_tokens(memory.cells)
        boxes, logits, features = [], [], queries
        for layer in self.layers:
            queries = layer(queries, *self._positions(queries, references, in_tokens), references, memory, mask)
            features = self.norm(queries)
            boxes.append(apply_deltas(references, self.box_deltas(features)))
            logits.append(self.objectness(features).squeeze(-1))
            if self.refine_boxes:
                references = as_references(boxes[-1])
        starts = range(num_denoising, num_denoising + num_queries, self.num_queries)
        first, *others = (_outputs(boxes, logits, features, slice(start, start + self.num_queries)) for start in starts)
        first.groups, first.proposals = others, proposals
        return first, None if denoising is None else _outputs(boxes, logits, features, slice(0, num_denoising))

    def _positions(self, queries: Tensor, boxes: Tensor, in_tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Return embeddings of the reference boxes (N, Q, W) and of where each head looks (N, heads, Q, W).

        As in DAB-DETR, section 4.3, except that each head looks at its own learned place, in half box sizes from the
        centre, like the sampling points of Deformable DETR. `in_tokens` are the sides of the images (N, 2).
        """
        boxes = boxes * in_tokens.repeat(1, 2)[:, None]
        box_positions = self.box_embedding(sine_embedding(boxes, self.width))
        places = boxes[:, None, :, :2] + self.places[:, None] * boxes[:, None, :, 2:] / 2  # (N, heads, Q, 2)
        return box_positions, sine_embedding(places, self.width) * self.place_scale(queries)[:, None]


def as_references(boxes: Float[Tensor, "N R 4"]) -> Float[Tensor, "N R 4"]:
    """Return boxes, cxcywh, that a layer can look at: inside the image, of some size, without a gradient."""
    return boxes.detach().clamp(SMALLEST_REFERENCE, 1.0)


def initial_boxes(num_queries: int) -> Float[Tensor, "{num_queries} 4"]:
    """Return the initial learned references, a grid of boxes over the image: cxcywh before the sigmoid."""
    side = math.ceil(math.sqrt(num_queries))
    cells = torch.linspace(0, side * side - 1, num_queries).round().long()
    centers = torch.stack([cells % side, cells // side], dim=-1).add(0.5) / side  # (Q, 2)
    return torch.logit(torch.cat([centers, torch.full_like(centers, 2 / (side + 1))], dim=-1), eps=1e-3)


def _constant_mlp(width: int, out_features: int, num_layers: int, start: float) -> MLP:
    """Return an MLP whose output is initially `start` for any input."""
    mlp = MLP(width, width, out_features, num_layers)
    nn.init.zeros_(mlp[-1].weight)  # type: ignore[arg-type]
    nn.init.constant_(mlp[-1].bias, start)  # type: ignore[arg-type]
    return mlp


def _outputs(boxes: list[Tensor], logits: list[Tensor], features: Tensor, rows: slice) -> DetectionOutputs:
    layers = [
        DetectionOutputs(box[:, rows], logit[:, rows], features[:, rows])
        for box, logit in zip(boxes, logits, strict=True)
    ]
    last = layers.pop()
    last.aux_outputs = layers
    return last


def attention_mask(queries: DenoisingQueries, num_queries: int, num_groups: int = 1) -> Bool[Tensor, "N 1 total total"]:
    """Return the self-attention mask, denoising queries first: True if row may see column.

    Object queries never see denoising queries, which hold the ground truth. Groups do not see one another, except that
    denoising queries see the first group of object queries. Padding is seen only by itself. `num_queries` counts the
    object queries of all `num_groups` groups.
    """
    device, count = queries.boxes.device, len(queries)
    noised = torch.arange(queries.num_groups, device=device).repeat_interleave(count // queries.num_groups)  # (R,)
    group = torch.cat([noised, group_numbers(num_queries, num_groups, device)])
    visible = torch.ones(len(queries.boxes), len(group), dtype=torch.bool, device=device)
    visible[:, :count] = queries.valid
    sees = group[:, None] == group[None, :]
    sees[:count] |= (group == -1)[None, :]
    itself = torch.eye(len(group), dtype=torch.bool, device=device)
    return (sees & visible[:, None, :] | itself)[:, None]


def group_numbers(num_queries: int, num_groups: int, device: torch.device) -> Int64[Tensor, " {num_queries}"]:
    """Return the group of each object query: -1, -2 and so on."""
    return -1 - torch.arange(num_groups, device=device).repeat_interleave(num_queries // num_groups)


def make_denoising_queries(
    targets: Sequence[Target | None], noise_seeds: Sequence[int], num_groups: int, box_noise: float
) -> DenoisingQueries | None:
    """Return noised ground truth of N images; None if no image has an object or `num_groups` (G) is 0.

    Positives move each corner by less than `box_noise` half sizes, negatives by one to two times as much; then both are
    clipped to the image, as in DINO. The same seed and boxes give the same noise.
    """
    annotated = [target["boxes"] for target in targets if target is not None]
    if num_groups == 0 or not any(map(len, annotated)):
        return None
    device = annotated[0].device
    clean = [torch.zeros(0, 4, device=device) if target is None else target["boxes"] for target in targets]
    noised = [_noise(boxes, seed, num_groups, box_noise) for boxes, seed in zip(clean, noise_seeds, strict=True)]
    noised, counts = [part.transpose(0, 1) for part in noised], [len(boxes) for boxes in clean]
    references = pad_sequence(noised, batch_first=True, padding_value=0.5)  # (N, T, 2G, 4)
    target_boxes = pad_sequence(clean, batch_first=True, padding_value=0.5)  # (N, T, 4)
    num_images, longest = target_boxes.shape[:2]
    valid = torch.arange(longest, device=device) < torch.tensor(counts).to(device, non_blocking=True)[:, None]
    positive = (torch.arange(2 * num_groups, device=device) % 2 == 0).repeat_interleave(longest)
    return DenoisingQueries(
        boxes=references.transpose(1, 2).reshape(num_images, -1, 4),
        valid=valid.repeat(1, 2 * num_groups),
        target_boxes=target_boxes.repeat(1, 2 * num_groups, 1),
        positive=positive.expand(num_images, -1),
        num_groups=num_groups,
    )


def _noise(boxes: Tensor, seed: int, num_groups: int, box_noise: float) -> Tensor:
    """Return boxes (T, 4) cxcywh with noise, as (2G, T, 4): for each group the positives, then the negatives."""
    generator = torch.Generator().manual_seed(seed)
    shape = (num_groups, 2, len(boxes), 4)
    size = torch.rand(shape, generator=generator)
    sign = torch.randint(0, 2, shape, generator=generator) * 2 - 1
    size[:, 1] += 1  # a negative moves at least as far as the farthest positive
    shift = (size * sign * box_noise).to(boxes, non_blocking=True)
    half = boxes[:, 2:] / 2
    corners = torch.cat([boxes[:, :2] - half, boxes[:, :2] + half], dim=-1)
    corners = (corners + shift * torch.cat([half, half], dim=-1)).clamp(0, 1)
    low, high = torch.minimum(corners[..., :2], corners[..., 2:]), torch.maximum(corners[..., :2], corners[..., 2:])
    return torch.cat([(low + high) / 2, high - low], dim=-1).flatten(0, 1)
