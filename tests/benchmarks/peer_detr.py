"""The peers of the convergence benchmark: Hugging Face's Deformable and Conditional DETR, trained from scratch.

Both get what helps them: a backbone that learns (Hugging Face freezes its batch norm, and under version 4.57 all of a
ResNet's convolutions, which suits pretrained ones only), box refinement in Deformable DETR (in one stage: Hugging Face
has no loss for the proposals of two), pictures decoded once and kept in memory, pixels normalised by the training
pictures' own mean and deviation, a warm-up and a cosine over the CPU time they are given, the last weights judged.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.ops import box_convert
from torchvision.transforms.v2 import functional as F
from transformers import (
    ConditionalDetrConfig,
    ConditionalDetrForObjectDetection,
    DeformableDetrConfig,
    DeformableDetrForObjectDetection,
    ResNetConfig,
)

from recipe.images import open_image
from recipe.metrics.boxes import box_average_precision
from recipe.schema import DetectedObject, Prediction, Sample

CLIP_NORM = 1.0  # DETR's own 0.1 is for fine-tuning a pretrained backbone


@dataclass(frozen=True)
class Budget:
    """How a peer is trained.

    Attributes:
        cpu_seconds: Of training; evaluations are not counted.
        batch_size: Pictures a step.
        learning_rate: Largest, of AdamW.
        weight_decay: Of AdamW.
        warmup: Share of the time.
    """

    cpu_seconds: float
    batch_size: int
    learning_rate: float
    weight_decay: float = 1e-4
    warmup: float = 0.05


def build_peer(kind: str, num_labels: int, num_queries: int, width: int, num_layers: int, num_heads: int) -> nn.Module:
    """A random `deformable` or `conditional` DETR on a ResNet-18 of a quarter of its width (0.7 million parameters)."""
    backbone = ResNetConfig(
        embedding_size=16,
        hidden_sizes=[16, 32, 64, 128],
        depths=[2, 2, 2, 2],
        layer_type="basic",
        out_features=["stage3", "stage4"] if kind == "deformable" else ["stage4"],
    )
    shared: dict[str, Any] = {
        "use_timm_backbone": False,
        "backbone": None,
        "use_pretrained_backbone": False,
        "backbone_config": backbone,
        "num_labels": num_labels,
        "num_queries": num_queries,
        "d_model": width,
        "encoder_layers": num_layers,
        "decoder_layers": num_layers,
        "encoder_attention_heads": num_heads,
        "decoder_attention_heads": num_heads,
        "encoder_ffn_dim": 4 * width,
        "decoder_ffn_dim": 4 * width,
        "dropout": 0.0,
        "auxiliary_loss": True,
    }
    if kind == "deformable":
        config = DeformableDetrConfig(**shared, with_box_refine=True, num_feature_levels=3)
        model: nn.Module = DeformableDetrForObjectDetection(config)
    else:
        model = ConditionalDetrForObjectDetection(ConditionalDetrConfig(**shared))
    thaw_batch_norm(model)
    return model.requires_grad_(True)


def thaw_batch_norm(module: nn.Module) -> None:
    """Trainable batch norm where Hugging Face put a frozen one."""
    for name, child in module.named_children():
        if type(child).__name__.endswith("FrozenBatchNorm2d"):
            setattr(module, name, nn.BatchNorm2d(child.get_buffer("weight").numel()))
        else:
            thaw_batch_norm(child)


def read_pictures(samples: Sequence[Sample], size: tuple[int, int]) -> Tensor:
    """All pictures at one size (rows, columns): (n, 3, rows, columns) uint8."""
    return torch.stack([F.resize(F.pil_to_tensor(open_image(s.image)), list(size), antialias=True) for s in samples])


def pixel_statistics(samples: Sequence[Sample]) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each channel, of values in [0, 1], over all pictures."""
    thumbnails = read_pictures(samples, (96, 128)).double().div(255).transpose(0, 1).flatten(1)  # (3, pixels)
    return thumbnails.mean(1).tolist(), thumbnails.std(1).tolist()


def train_peer(
    model: nn.Module,
    train: Sequence[Sample],
    val: Sequence[Sample],
    size: tuple[int, int],
    budget: Budget,
    seed: int,
    names: Sequence[str] = (),
) -> tuple[float, int]:
    """Trains for a CPU time; class-agnostic AP50 on `val` at its end, and the steps made.

    `names` are the captions that are its classes; none: all objects are of one.
    """
    statistics = pixel_statistics(train)
    labels = [_labels(sample, names) for sample in train]
    pictures, held_out = read_pictures(train, size), read_pictures(val, size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=budget.learning_rate, weight_decay=budget.weight_decay)
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = []
    start, steps = time.process_time(), 0
    model.train()
    while (progress := (time.process_time() - start) / budget.cpu_seconds) < 1:
        for group in optimizer.param_groups:
            group["lr"] = budget.learning_rate * _factor(progress, budget.warmup)
        if len(order) < budget.batch_size:
            order = torch.randperm(len(train), generator=generator).tolist()
        rows, order = order[: budget.batch_size], order[budget.batch_size :]
        outputs = model(
            pixel_values=F.normalize(pictures[rows].float() / 255, *statistics), labels=[labels[row] for row in rows]
        )
        optimizer.zero_grad()
        outputs.loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
        optimizer.step()
        steps += 1
    return evaluate_peer(model, val, F.normalize(held_out.float() / 255, *statistics)), steps


@torch.no_grad()
def evaluate_peer(model: nn.Module, samples: Sequence[Sample], pictures: Tensor) -> float:
    """AP50 without classes, on normalised pictures: a query's score is that of its likeliest class."""
    model.eval()
    predictions: list[Prediction] = []
    for first in range(0, len(samples), 8):
        part = samples[first : first + 8]
        outputs = model(pixel_values=pictures[first : first + 8])
        scores = outputs.logits.sigmoid().amax(-1)
        boxes = box_convert(outputs.pred_boxes, "cxcywh", "xyxy")
        predictions += [_prediction(*row) for row in zip(part, boxes, scores, strict=True)]
    model.train()
    return box_average_precision(predictions, samples)["box_ap50"]


def _prediction(sample: Sample, boxes: Tensor, scores: Tensor) -> Prediction:
    scale = torch.tensor([sample.width, sample.height] * 2)
    ranked = scores.argsort(descending=True)
    rows = zip((boxes * scale)[ranked].tolist(), scores[ranked].tolist(), strict=True)
    objects = tuple(DetectedObject((box[0], box[1], box[2], box[3]), score, "") for box, score in rows)
    return Prediction(sample.id, sample.width, sample.height, objects)


def _labels(sample: Sample, names: Sequence[str]) -> dict[str, Tensor]:
    objects = [item for item in sample.objects or () if not item.iscrowd]
    scale = torch.tensor([sample.width, sample.height] * 2)
    boxes = torch.tensor([item.box for item in objects]).reshape(-1, 4) / scale
    classes = torch.tensor([names.index(item.caption) if names else 0 for item in objects], dtype=torch.int64)
    return {"class_labels": classes, "boxes": box_convert(boxes, "xyxy", "cxcywh")}


def _factor(progress: float, warmup: float) -> float:
    return min(1.0, progress / warmup) * 0.5 * (1 + math.cos(math.pi * progress))
