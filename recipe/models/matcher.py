"""Hungarian matching of queries and objects (Carion et al. 2020, section 3.1), all layers and images at once.

The cost matrix is one batched float32 expression on the device, copied to the host once.
"""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float, Float32
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from recipe.boxes import elementwise_iou
from recipe.schema import DetectionOutputs, Matches, Target

UNUSABLE = 1e6  # cost of a pair whose prediction is not finite: chosen only if nothing else is left


@torch.no_grad()
def match(
    layers: Sequence[DetectionOutputs],
    targets: Sequence[Target | None],
    cost_bbox: float,
    cost_giou: float,
    cost_objectness: float,
    focal_alpha: float = 0.25,
    focal_gamma: float = 2.0,
) -> list[Matches]:
    """Return the cheapest one-to-one assignment for every layer, all images together.

    A pair costs `cost_bbox` times the L1 distance of its cxcywh boxes, `cost_giou` times 1 - GIoU and `cost_objectness`
    times the focal cost of calling the query an object (Deformable DETR's class cost). There may be more objects than
    queries: the best are matched. Non-finite predictions never reach scipy.

    `layers` are for N images and Q queries each; of N `targets`, None (not annotated) and no objects match nothing.
    """
    device = layers[0].pred_boxes.device
    counts = [0 if target is None else len(target["boxes"]) for target in targets]
    parts: list[list[np.ndarray]] = [[np.empty((0, 3), dtype=np.int64)] for _ in layers]
    if any(counts):
        boxes = pad_sequence(
            [torch.zeros(0, 4, device=device) if t is None else t["boxes"] for t in targets], batch_first=True
        )
        pred_boxes = torch.stack([layer.pred_boxes for layer in layers])  # (layers, N, Q, 4)
        logits = torch.stack([layer.pred_objectness for layer in layers])
        cost = cost_matrix(pred_boxes, logits, boxes, cost_bbox, cost_giou, cost_objectness, focal_alpha, focal_gamma)
        for rows, layer_cost in zip(parts, cost.cpu().numpy(), strict=True):
            for image, count in enumerate(counts):
                queries, objects = linear_sum_assignment(layer_cost[image, :, :count])
                rows.append(np.stack([np.full_like(queries, image), queries, objects], axis=1))
    lengths = [sum(map(len, rows)) for rows in parts]
    packed = torch.from_numpy(np.concatenate([row for rows in parts for row in rows])).to(device, non_blocking=True)
    return [Matches(*part.unbind(1)) for part in packed.split(lengths)]


def cost_matrix(
    pred_boxes: Float[Tensor, "layers N Q 4"],
    pred_objectness: Float[Tensor, "layers N Q"],
    target_boxes: Float[Tensor, "#N T 4"],
    cost_bbox: float,
    cost_giou: float,
    cost_objectness: float,
    focal_alpha: float,
    focal_gamma: float,
) -> Float32[Tensor, "layers N Q T"]:
    """Return the cost of every (query, object) pair, always finite; weights as in `match`.

    Boxes are cxcywh; `target_boxes` are padded.
    """
    queries = pred_boxes.float()[..., None, :]  # (layers, N, Q, 1, 4)
    objects = target_boxes.float()[:, None]  # (N, 1, T, 4)
    l1 = (queries - objects).abs().sum(-1)  # (layers, N, Q, T)
    _, giou = elementwise_iou(queries, objects)
    probability = pred_objectness.float().sigmoid()[..., None]
    object_cost = focal_alpha * (1 - probability) ** focal_gamma * -(probability + 1e-8).log()
    empty_cost = (1 - focal_alpha) * probability**focal_gamma * -(1 - probability + 1e-8).log()
    cost = cost_bbox * l1 + cost_giou * (1 - giou) + cost_objectness * (object_cost - empty_cost)
    return cost.nan_to_num(nan=UNUSABLE, posinf=UNUSABLE, neginf=UNUSABLE)
