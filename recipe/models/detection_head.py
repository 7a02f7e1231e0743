"""The detection head: object queries with reference boxes that read an image's memory, layer by layer.

DETR's set prediction (Carion et al. 2020) with anchor boxes as queries (DAB-DETR), positions matched apart from
contents in cross-attention (Conditional DETR), boxes refined by each layer (Deformable DETR) and denoising queries
(DN-DETR, DINO). There is no class list: a query has one objectness logit, and its words come from the caption decoder.
"""

import math

import torch
from torch import Tensor, nn

from recipe.models.denoising import DenoisingQueries
from recipe.models.layers import MLP, Attention, FeedForward
from recipe.models.memory import Memory, sine_embedding
from recipe.schema import DetectionOutputs

PRIOR_PROBABILITY = 0.01  # of objectness at the start (focal loss, Lin et al. 2017, section 3.3)


class DecoderLayer(nn.Module):
    """Self-attention among queries, cross-attention to the memory, feed-forward; pre-norm.

    Args:
        width: Of the queries and the memory.
        num_heads: Heads.
        ffn_factor: Width of the feed-forward block in widths.
        dropout: Of each block's result.
    """

    def __init__(self, width: int, num_heads: int, ffn_factor: int, dropout: float):
        super().__init__()
        self.self_norm = nn.LayerNorm(width)
        self.self_attention = Attention(width, num_heads, positional=True)
        self.cross_norm = nn.LayerNorm(width)
        self.cross_attention = Attention(width, num_heads, positional=True)
        self.ffn_norm = nn.LayerNorm(width)
        self.ffn = FeedForward(width, ffn_factor, dropout)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, queries: Tensor, box_positions: Tensor, center_positions: Tensor, memory: Memory, mask: Tensor | None
    ) -> Tensor:
        """(N, Q, W) → (N, Q, W).

        Args:
            queries: (N, Q, W).
            box_positions: (N, Q, W) embedding of the reference boxes, for self-attention.
            center_positions: (N, Q, W) embedding of their centres, comparable to `memory.positions`.
            memory: Of the N images.
            mask: (N, 1, Q, Q) bool for self-attention, or None.
        """
        states = self.self_norm(queries)
        keys_values = self.self_attention.keys_values(states, box_positions)
        queries = queries + self.dropout(self.self_attention(states, keys_values, box_positions, mask))
        states = self.cross_norm(queries)
        keys_values = self.cross_attention.keys_values(memory.tokens, memory.positions)
        memory_mask = memory.mask[:, None, None, :]
        queries = queries + self.dropout(self.cross_attention(states, keys_values, center_positions, memory_mask))
        return queries + self.dropout(self.ffn(self.ffn_norm(queries)))


class DetectionHead(nn.Module):
    """`num_queries` objects an image: box, objectness logit and the features a caption is written from.

    Args:
        width: Of the memory; a multiple of 8 and of `num_heads`.
        num_queries: Objects an image at most.
        num_heads: Heads of each attention.
        num_layers: Decoder layers.
        ffn_factor: Width of the feed-forward blocks in widths.
        dropout: Of each block's result.
        refine_boxes: Each layer's boxes are the next one's references; else all layers share the learned ones.
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
    ):
        super().__init__()
        self.width = width
        self.refine_boxes = refine_boxes
        self.query_content = nn.Embedding(num_queries, width)
        self.query_boxes = nn.Parameter(initial_boxes(num_queries))
        self.denoising_content = nn.Parameter(torch.zeros(width))
        self.box_position = MLP(width, width, width, 2)
        self.center_scale = MLP(width, width, width, 2)
        self.layers = nn.ModuleList(DecoderLayer(width, num_heads, ffn_factor, dropout) for _ in range(num_layers))
        self.norm = nn.LayerNorm(width)
        self.objectness = nn.Linear(width, 1)
        self.box_delta = MLP(width, width, 4, 3)
        nn.init.constant_(self.objectness.bias, -math.log((1 - PRIOR_PROBABILITY) / PRIOR_PROBABILITY))
        nn.init.zeros_(self.box_delta[-1].weight)  # type: ignore[arg-type]
        nn.init.zeros_(self.box_delta[-1].bias)  # type: ignore[arg-type]

    def forward(
        self, memory: Memory, denoising: DenoisingQueries | None = None
    ) -> tuple[DetectionOutputs, DetectionOutputs | None]:
        """Decodes N images.

        Args:
            memory: Of the N images.
            denoising: Training only.

        Returns:
            The outputs of the object queries, and those of the denoising queries where given.
        """
        num_images = len(memory.tokens)
        queries = self.query_content.weight.expand(num_images, -1, -1)  # (N, Q, W)
        references = self.query_boxes.expand(num_images, -1, -1)  # (N, Q, 4), before the sigmoid
        num_denoising, mask = 0, None
        if denoising is not None:
            num_denoising = len(denoising)
            mask = denoising.attention_mask(queries.shape[1])
            content = self.denoising_content.expand(num_images, num_denoising, -1)
            queries = torch.cat([content, queries], dim=1)
            references = torch.cat([torch.logit(denoising.boxes, eps=1e-3).to(references), references], dim=1)
        else:
            queries = queries + 0.0 * self.denoising_content  # every parameter has a gradient in every step
        boxes, logits = [], []
        for layer in self.layers:
            queries = layer(queries, *self._positions(queries, references), memory, mask)
            features = self.norm(queries)
            raw = references + self.box_delta(features)
            boxes.append(raw)
            logits.append(self.objectness(features).squeeze(-1))
            if self.refine_boxes:
                references = raw.detach()
        features = self.norm(queries)
        matched = _outputs(boxes, logits, features, slice(num_denoising, None))
        return matched, None if denoising is None else _outputs(boxes, logits, features, slice(0, num_denoising))

    def _positions(self, queries: Tensor, references: Tensor) -> tuple[Tensor, Tensor]:
        """Embeddings of the reference boxes and of their centres, (N, Q, W) each (DAB-DETR, section 4.3)."""
        boxes = references.sigmoid()
        box_positions = self.box_position(sine_embedding(boxes, self.width))
        centers = sine_embedding(boxes[..., :2], self.width) * self.center_scale(queries)
        return box_positions, centers


def initial_boxes(num_queries: int) -> Tensor:
    """Learned references start as a grid of boxes over the picture: (Q, 4) cxcywh before the sigmoid."""
    side = math.ceil(math.sqrt(num_queries))
    cells = torch.linspace(0, side * side - 1, num_queries).round().long()
    centers = torch.stack([cells % side, cells // side], dim=-1).add(0.5) / side  # (Q, 2)
    return torch.logit(torch.cat([centers, torch.full_like(centers, 2 / (side + 1))], dim=-1), eps=1e-3)


def _outputs(boxes: list[Tensor], logits: list[Tensor], features: Tensor, rows: slice) -> DetectionOutputs:
    layers = [
        DetectionOutputs(raw[:, rows].sigmoid(), raw[:, rows], logit[:, rows], features[:, rows])
        for raw, logit in zip(boxes, logits, strict=True)
    ]
    last = layers.pop()
    last.aux_outputs = layers
    return last
