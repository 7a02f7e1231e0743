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

CPU_PIECE = 2**17  # pairs whose costs a CPU computes at once: its caches hold a few such arrays
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
        cost = boxes.new_empty(*logits.shape, boxes.shape[1], dtype=torch.float32)  # (layers, N, Q, T)
        costs = (cost_bbox, cost_giou, cost_objectness, focal_alpha, focal_gamma)
        for images, longest in _parts(counts, logits[:, 0].numel(), device):
            made = cost_matrix(pred_boxes[:, images], logits[:, images], boxes[images, :longest], *costs)
            cost[:, images, :, :longest] = made
        for rows, layer_cost in zip(parts, cost.cpu().numpy(), strict=True):
            for image, count in enumerate(counts):
                queries, objects = linear_sum_assignment(layer_cost[image, :, :count])
                rows.append(np.stack([np.full_like(queries, image), queries, objects], axis=1))
    lengths = [sum(map(len, rows)) for rows in parts]
    packed = torch.from_numpy(np.concatenate([row for rows in parts for row in rows])).to(device, non_blocking=True)
    return [Matches(*part.unbind(1)) for part in packed.split(lengths)]


def _parts(
    counts: Sequence[int], num_rows: int, device: torch.device
) -> list[tuple[slice, int] | tuple[list[int], int]]:
    """Return which images are computed at once, with the most objects of one: all on a GPU, else what a cache holds.

    `num_rows` is the number of queries of an image in all layers. Images of like counts come together, so that little
    is computed for padding; those without objects are left out.
    """
    if device.type != "cpu":
        return [(slice(None), max(counts))]
    parts: list[tuple[slice, int] | tuple[list[int], int]] = []
    images: list[int] = []
    for image in sorted((image for image, count in enumerate(counts) if count), key=lambda image: counts[image]):
        if images and num_rows * (len(images) + 1) * counts[image] > CPU_PIECE:
            parts.append((images, counts[images[-1]]))
            images = []
        images.append(image)
    return [*parts, (images, counts[images[-1]])]


@torch.no_grad()
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
    probability = pred_objectness.float().sigmoid()[..., None]
    object_cost = focal_alpha * (1 - probability) ** focal_gamma * -(probability + 1e-8).log()
    empty_cost = (1 - focal_alpha) * probability**focal_gamma * -(1 - probability + 1e-8).log()
    # From here on in place: each further temporary of this size costs more than the arithmetic. (layers, N, Q, T)
    _, giou = elementwise_iou(queries, objects)
    cost = (1 - giou).mul_(cost_giou).add_(cost_objectness * (object_cost - empty_cost))
    distance = torch.empty_like(cost)
    for own, other in zip(queries.unbind(-1), objects.unbind(-1), strict=True):
        cost.add_(torch.sub(own, other, out=distance).abs_(), alpha=cost_bbox)
    return cost.nan_to_num_(nan=UNUSABLE, posinf=UNUSABLE, neginf=UNUSABLE)
