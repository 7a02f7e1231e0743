"""The loss terms, unweighted and named; each is divided by the whole global batch's count, see `LossCounts`.

    loss_lm_teacher   cross-entropy of the teachers' answers, summed    / their tokens
    loss_lm_student   cross-entropy of the student's answer, summed     / its tokens
    loss_bbox         L1 of matched cxcywh boxes                        / objects
    loss_giou         1 - GIoU of matched boxes                         / objects
    loss_objectness   of every query (see `objectness_loss`), summed    / images
    loss_caption      mean cross-entropy over the tokens of an image's matched captions / images

Those of boxes and objectness repeat: `*_aux` summed over the earlier layers, `*_proposals` for what the queries were
chosen from (`proposals.py`), `*_group` summed over all layers and averaged over the other groups of queries, `*_dn`
summed over all layers of the denoising queries and averaged over their groups.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from torchvision.ops import sigmoid_focal_loss

from recipe.boxes import elementwise_iou
from recipe.config import LossConfig
from recipe.schema import DenoisingQueries, DetectionOutputs, LossCounts, Matches, Role, Target

REPEATS = ("_aux", "_proposals", "_group", "_dn")


def base_term(name: str) -> str:
    """Return the term that a loss repeats: `loss_giou_aux` → `giou`."""
    for suffix in REPEATS:
        name = name.removesuffix(suffix)
    return name.removeprefix("loss_")


def language_losses(
    losses: Float[Tensor, " K"], roles: Int64[Tensor, " K"], counts: LossCounts
) -> dict[str, Float[Tensor, ""]]:
    """Return each role's summed cross-entropy, divided by the role's tokens in the whole global batch.

    `losses` and `roles` (of `Role`) are of the supervised positions only.
    """
    sums = losses.new_zeros(len(Role)).index_add(0, roles, losses)
    return {
        "loss_lm_teacher": sums[Role.TEACHER] / max(counts["teacher_tokens"], 1),
        "loss_lm_student": sums[Role.STUDENT] / max(counts["student_tokens"], 1),
    }


def detection_losses(
    outputs: DetectionOutputs,
    matches: Sequence[Matches],
    targets: Sequence[Target | None],
    counts: LossCounts,
    config: LossConfig,
) -> dict[str, Float[Tensor, ""]]:
    """Return `loss_bbox loss_giou loss_objectness` of the object queries, and each with the suffixes of `layers()`.

    `matches` has one entry for each of `outputs.layers()`, `targets` one per image; None (not annotated) takes no part.
    """
    suffixes, layers = zip(*outputs.layers(), strict=True)
    boxes = torch.stack([layer.pred_boxes for layer in layers])  # (layers, N, Q, 4)
    logits = _widen(torch.stack([layer.pred_objectness for layer in layers]))  # (layers, N, Q)
    fields = ("image", "query", "target")
    image, query, target = (torch.cat([getattr(match, key) for match in matches]) for key in fields)
    lengths = torch.tensor([len(match) for match in matches])
    layer = torch.arange(len(layers)).repeat_interleave(lengths).to(image.device, non_blocking=True)
    objects = [boxes.new_zeros(0, 4) if target is None else target["boxes"].to(boxes) for target in targets]
    predicted, true = boxes[layer, image, query], pad_sequence(objects, batch_first=True)[image, target]
    quality = torch.zeros_like(logits).index_put((layer, image, query), _quality(predicted, true, config).to(logits))
    is_object = torch.zeros_like(logits).index_put((layer, image, query), torch.ones_like(logits[layer, image, query]))
    annotated = torch.tensor([i for i, target in enumerate(targets) if target is not None], dtype=torch.int64)
    annotated = annotated.to(logits.device, non_blocking=True)
    objectness = objectness_loss(logits[:, annotated], is_object[:, annotated], quality[:, annotated], config)
    terms = {
        name: loss.new_zeros(len(layers)).index_add(0, layer, loss) / max(counts["objects"], 1)
        for name, loss in box_losses(predicted, true).items()
    }
    terms["loss_objectness"] = objectness.sum((1, 2)) / max(counts["images"], 1)
    summed = {}  # over the layers of each suffix
    for suffix in dict.fromkeys(reversed(suffixes)):
        rows = [row for row, other in enumerate(suffixes) if other == suffix]
        for name, term in terms.items():
            summed[name + suffix] = term[rows].sum() / (max(1, len(outputs.groups)) if suffix == "_group" else 1)
    return summed


def denoising_losses(
    denoising: tuple[DenoisingQueries, DetectionOutputs] | None,
    detection: DetectionOutputs,
    counts: LossCounts,
    config: LossConfig,
) -> dict[str, Float[Tensor, ""]]:
    """Return `loss_bbox_dn loss_giou_dn loss_objectness_dn` of the denoising queries, which know their targets.

    `denoising` is None if no image of the batch has an object: all terms are 0. Each group counts as its own batch.
    """
    if denoising is None:
        zero = 0.0 * detection.pred_boxes.sum()
        return dict.fromkeys(("loss_bbox_dn", "loss_giou_dn", "loss_objectness_dn"), zero)
    queries, outputs = denoising
    layers = [*outputs.aux_outputs, outputs]
    logits = _widen(torch.stack([layer.pred_objectness for layer in layers]))  # (layers, N, R)
    # Nothing is gathered by a mask: a GPU would wait for the number of its entries.
    repaired = (queries.valid & queries.positive).expand_as(logits)
    predicted = torch.stack([layer.pred_boxes for layer in layers])  # (layers, N, R, 4)
    true = queries.target_boxes.to(predicted)
    quality = _quality(predicted, true, config).to(logits) * repaired
    is_object = queries.positive.to(logits).expand_as(logits)
    objectness = objectness_loss(logits, is_object, quality, config)
    num_objects, num_images = (max(counts[key], 1) * queries.num_groups for key in ("objects", "images"))
    terms = {
        f"{name}_dn": torch.where(repaired, loss, 0.0).sum() / num_objects
        for name, loss in box_losses(predicted, true).items()
    }
    return {**terms, "loss_objectness_dn": torch.where(queries.valid, objectness, 0.0).sum() / num_images}


def box_losses(
    predicted: Float[Tensor, "*pairs 4"], true: Float[Tensor, "*#pairs 4"]
) -> dict[str, Float[Tensor, " *pairs"]]:
    """Return L1 and GIoU of pairs of cxcywh boxes; the true ones may be the same for several predicted ones."""
    l1 = (predicted - true).abs().sum(-1)
    _, giou = elementwise_iou(predicted, true)
    return {"loss_bbox": l1, "loss_giou": 1 - giou}


def objectness_loss(
    logits: Float[Tensor, " *queries"],
    is_object: Float[Tensor, " *queries"],
    quality: Float[Tensor, " *queries"],
    config: LossConfig,
) -> Float[Tensor, " *queries"]:
    """Return the loss of every query's objectness.

    focal: Lin et al. 2017: the target is 1 for a matched query, and easy queries weigh less; `focal_alpha` weighs
        objects, 1 - `focal_alpha` empty queries.
    mal: Huang et al. 2025 (DEIM): the target is IoU ** gamma and the weight 1, so that a poor match is trained too.

    `is_object` is 1 if the query is matched, else 0; `quality` the IoU of matched queries' boxes, else 0.
    """
    gamma = config.focal_gamma
    if config.objectness == "focal":
        return sigmoid_focal_loss(logits, is_object, alpha=config.focal_alpha, gamma=gamma)
    focus = logits.detach().sigmoid() ** gamma * (1 - is_object)
    target, weight = is_object * quality**gamma, focus + is_object
    return weight * F.binary_cross_entropy_with_logits(logits, target, reduction="none")


def caption_loss(
    losses: Float[Tensor, " k"], images: Int64[Tensor, " k"], num_images: int, counts: LossCounts
) -> Float[Tensor, ""]:
    """Return the mean cross-entropy over each image's caption tokens, summed, divided by the batch's images.

    `losses` and `images`, in [0, num_images), are of the tokens of all matched captions.
    """
    sums = losses.new_zeros(num_images).index_add(0, images, losses)
    tokens = losses.new_zeros(num_images).index_add(0, images, torch.ones_like(losses))
    return (sums / tokens.clamp(min=1)).sum() / max(counts["images"], 1)


@torch.no_grad()
def _quality(predicted: Tensor, true: Tensor, config: LossConfig) -> Tensor:
    """Return the IoU of pairs of boxes, (..., 4) cxcywh each → (...); zeros if the objectness loss does not read it."""
    if config.objectness == "focal":
        return predicted.new_zeros(predicted.shape[:-1])
    iou, _ = elementwise_iou(predicted, true)
    return iou.nan_to_num(0.0)


def _widen(logits: Tensor) -> Tensor:
    """Return logits in float32 at least: a target IoU in bfloat16 would be off by up to 0.002."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
