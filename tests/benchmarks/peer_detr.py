"""Train the peers of the convergence benchmark from scratch: three of Hugging Face's DETRs and torchvision's FCOS.

All get what helps them. A ResNet-18 of a quarter of its width learns. (Hugging Face freezes batch norm, and under
version 4.57 all of a ResNet's convolutions, which suits pretrained ones only.) Deformable DETR has box refinement, in
one stage: Hugging Face has no loss for the proposals of two. Images are decoded once and kept in memory, shown as ours
sees them and normalised by the training images' own mean and deviation. There are a warm-up and a cosine over the CPU
time that they are given; the last weights are judged. FCOS and RT-DETR have maps of stride 8, Deformable DETR of 16,
Conditional of 32.
"""

import math
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor, nn
from torchvision.models.detection import FCOS
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import FeaturePyramidNetwork, box_convert, nms
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool
from torchvision.transforms.v2 import functional as F
from transformers import (
    ConditionalDetrConfig,
    ConditionalDetrForObjectDetection,
    DeformableDetrConfig,
    DeformableDetrForObjectDetection,
    ResNetBackbone,
    ResNetConfig,
    RTDetrConfig,
    RTDetrForObjectDetection,
    RTDetrResNetConfig,
)

from jobs import Job
from real_sets import REAL, YAML, result_of
from recipe.config import AugmentConfig
from recipe.configure import load_config
from recipe.data.augment import Augmentation, Drawn
from recipe.data.image import shown_pixels
from recipe.data.words import Vocabulary
from recipe.images import open_image
from recipe.metrics.boxes import box_average_precision
from recipe.schema import DetectedObject, ImageSpec, Prediction, Sample

CLIP_NORM = 1.0  # DETR's own 0.1 is for fine-tuning a pretrained backbone
WIDTHS = (16, 32, 64, 128)  # a quarter of ResNet-18's
PYRAMID = 64  # channels of FCOS
LEAST_SCORE = 0.01  # of FCOS: fewer boxes reach non-maximum suppression
NMS_IOU = 0.6  # torchvision's default
RT_DETR_STRIDE = 32  # its maps are enlarged by 2, so sides must be multiples of the coarsest cell
LEARNING_RATE = 1e-3


@dataclass(frozen=True)
class Target:
    """What is true of an image: (n, 4) normalised cxcywh boxes and (n,) classes."""

    boxes: Tensor
    classes: Tensor


@dataclass(frozen=True)
class Budget:
    """How a peer is trained.

    Attributes:
        cpu_seconds: Of training; evaluations are not counted.
        batch_size: Images per step.
        learning_rate: Largest, of AdamW.
        weight_decay: Of AdamW.
        warmup: Share of the time.
    """

    cpu_seconds: float
    batch_size: int
    learning_rate: float
    weight_decay: float = 1e-4
    warmup: float = 0.05


class HuggingFaceDetr(nn.Module):
    """A DETR that takes images padded at the right and at the bottom.

    With a mask of their pixels its boxes are relative to the images, else to the padded ones, whose sides are then
    multiples of `stride`.
    """

    def __init__(self, model: nn.Module, takes_mask: bool = True, stride: int = 1):
        super().__init__()
        self.model = model
        self.takes_mask = takes_mask
        self.stride = stride

    def _padded_size(self, images: Sequence[Tensor]) -> tuple[int, int]:
        """Return the common rows and columns of images."""
        sides = (max(image.shape[side] for image in images) for side in (1, 2))
        rows, columns = (math.ceil(side / self.stride) * self.stride for side in sides)
        return rows, columns

    def _shares(self, images: Sequence[Tensor]) -> list[Tensor]:
        """Return what (4,) boxes of each image are multiplied by to be relative to what the model takes them for."""
        if self.takes_mask:
            return [torch.ones(4)] * len(images)
        rows, columns = self._padded_size(images)
        return [torch.tensor([image.shape[2] / columns, image.shape[1] / rows] * 2) for image in images]

    def _inputs(self, images: Sequence[Tensor]) -> dict[str, Tensor]:
        rows, columns = self._padded_size(images)
        pixels = torch.zeros(len(images), 3, rows, columns)
        mask = torch.zeros(len(images), rows, columns, dtype=torch.int64)
        for index, image in enumerate(images):
            pixels[index, :, : image.shape[1], : image.shape[2]] = image
            mask[index, : image.shape[1], : image.shape[2]] = 1
        return {"pixel_values": pixels, "pixel_mask": mask} if self.takes_mask else {"pixel_values": pixels}

    def loss(self, images: Sequence[Tensor], targets: Sequence[Target]) -> Tensor:
        """Return the model's own loss of normalised (3, rows, columns) images; boxes are relative to each image."""
        labels = [
            {"class_labels": target.classes, "boxes": target.boxes * share}
            for target, share in zip(targets, self._shares(images), strict=True)
        ]
        return self.model(**self._inputs(images), labels=labels).loss

    def detect(self, images: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
        """Return (n, 4) normalised xyxy boxes and (n,) scores of each: a query's is that of its likeliest class."""
        outputs = self.model(**self._inputs(images))
        boxes = box_convert(outputs.pred_boxes, "cxcywh", "xyxy") / torch.stack(self._shares(images))[:, None]
        return list(zip(boxes, outputs.logits.sigmoid().amax(-1), strict=True))


class Pyramid(nn.Module):
    """A ResNet with a feature pyramid: maps of strides 8, 16, 32 and 64."""

    def __init__(self):
        super().__init__()
        self.body = ResNetBackbone(resnet_config(["stage2", "stage3", "stage4"]))
        self.pyramid = FeaturePyramidNetwork(list(WIDTHS[1:]), PYRAMID, LastLevelMaxPool())
        self.out_channels = PYRAMID

    def forward(self, images: Tensor) -> Mapping[str, Tensor]:
        maps = self.body(images).feature_maps
        return self.pyramid(OrderedDict((str(index), features) for index, features in enumerate(maps)))


class Batching(GeneralizedRCNNTransform):
    """Pads images to a batch; torchvision's own also resizes them, in evaluation even if asked not to."""

    def resize(self, image: Tensor, target: dict[str, Tensor] | None = None) -> tuple[Tensor, dict[str, Tensor] | None]:
        """Leave an image as it is."""
        return image, target


class TorchvisionFcos(nn.Module):
    """FCOS on a small pyramid (1.1 million parameters)."""

    def __init__(self, num_labels: int):
        super().__init__()
        strides = (8, 16, 32, 64)
        self.model = FCOS(
            Pyramid(),
            num_labels,
            anchor_generator=AnchorGenerator(tuple((stride,) for stride in strides), ((1.0,),) * len(strides)),
            score_thresh=LEAST_SCORE,
            nms_thresh=NMS_IOU,
        )
        self.model.transform = Batching(min_size=1, max_size=1, image_mean=[0.0] * 3, image_std=[1.0] * 3)

    def loss(self, images: Sequence[Tensor], targets: Sequence[Target]) -> Tensor:
        """Return the sum of its losses, as torchvision's own training script does."""
        labels = [
            {
                "boxes": box_convert(target.boxes, "cxcywh", "xyxy") * torch.tensor(image.shape[:0:-1] * 2),
                "labels": target.classes,
            }
            for image, target in zip(images, targets, strict=True)
        ]
        return torch.stack(list(self.model(list(images), labels).values())).sum()

    def detect(self, images: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
        """Return normalised boxes and scores; of boxes that overlap the best, whatever their classes."""
        found = []
        for image, row in zip(images, self.model(list(images)), strict=True):
            kept = nms(row["boxes"], row["scores"], NMS_IOU)
            found.append((row["boxes"][kept] / torch.tensor(image.shape[:0:-1] * 2), row["scores"][kept]))
        return found


Peer = HuggingFaceDetr | TorchvisionFcos


def resnet_config(out_features: list[str]) -> ResNetConfig:
    """Return a ResNet-18 of a quarter of its width (0.7 million parameters)."""
    return ResNetConfig(
        embedding_size=WIDTHS[0],
        hidden_sizes=list(WIDTHS),
        depths=[2, 2, 2, 2],
        layer_type="basic",
        out_features=out_features,
    )


def build_detr(kind: str, num_labels: int, num_queries: int, width: int, num_layers: int, num_heads: int) -> Peer:
    """Return a random `deformable` or `conditional` DETR."""
    stages = ["stage3", "stage4"] if kind == "deformable" else ["stage4"]
    shared: dict[str, Any] = {
        "use_timm_backbone": False,
        "backbone": None,
        "use_pretrained_backbone": False,
        "backbone_config": resnet_config(stages),
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
    return HuggingFaceDetr(model)


def build_rt_detr(num_labels: int, num_queries: int, width: int, num_layers: int, num_heads: int) -> Peer:
    """Return a random RT-DETR, with its own denoising and query selection."""
    backbone = RTDetrResNetConfig(
        embedding_size=WIDTHS[0],
        hidden_sizes=list(WIDTHS),
        depths=[2, 2, 2, 2],
        layer_type="basic",
        out_features=["stage2", "stage3", "stage4"],
    )
    config = RTDetrConfig(
        backbone_config=backbone,
        freeze_backbone_batch_norms=False,
        encoder_in_channels=list(WIDTHS[1:]),
        encoder_hidden_dim=width // 2,  # its convolutions are most of the cost
        encoder_attention_heads=num_heads,
        encoder_ffn_dim=4 * width,
        decoder_in_channels=[width // 2] * 3,
        d_model=width,
        decoder_layers=num_layers,
        decoder_attention_heads=num_heads,
        decoder_ffn_dim=4 * width,
        num_labels=num_labels,
        num_queries=num_queries,
    )
    return HuggingFaceDetr(RTDetrForObjectDetection(config), takes_mask=False, stride=RT_DETR_STRIDE)


def build_peer(kind: str, num_labels: int, num_queries: int, width: int, num_layers: int, num_heads: int) -> Peer:
    """Return a random peer, one of `PEERS`, all of whose parameters learn."""
    sizes = (num_labels, num_queries, width, num_layers, num_heads)
    builds: dict[str, Callable[[], Peer]] = {
        "deformable": lambda: build_detr(kind, *sizes),
        "conditional": lambda: build_detr(kind, *sizes),
        "rt_detr": lambda: build_rt_detr(*sizes),
        "fcos": lambda: TorchvisionFcos(num_labels),
    }
    model = builds[kind]()
    thaw_batch_norm(model)
    return model.requires_grad_(True)


PEERS = ("deformable", "conditional", "rt_detr", "fcos")


def thaw_batch_norm(module: nn.Module) -> None:
    """Put a trainable batch norm where Hugging Face put a frozen one."""
    for name, child in module.named_children():
        if type(child).__name__.endswith("FrozenBatchNorm2d"):
            setattr(module, name, nn.BatchNorm2d(child.get_buffer("weight").numel()))
        else:
            thaw_batch_norm(child)


@dataclass(frozen=True)
class View:
    """How a peer is shown images: as ours, by the recipe's own functions.

    Attributes:
        spec: The resize rule, and the normalisation.
        augmentation: Of training; None: every image as it is.
    """

    spec: ImageSpec
    augmentation: Augmentation | None = None

    @classmethod
    def of(cls, kind: str, spec: ImageSpec, augment: AugmentConfig | None, seed: int) -> "View":
        """Return the view of a kind of peer; sides for RT-DETR are multiples of 32, so that little is padded."""
        if kind == "rt_detr":
            spec = replace(spec, patch_size=RT_DETR_STRIDE // spec.merge_size)
        return cls(spec, None if augment is None else Augmentation.of(augment, spec, seed))

    def pixels(self, image: Image, drawn: Drawn | None = None) -> Tensor:
        """Return (3, rows, columns) uint8 pixels of a decoded image."""
        return shown_pixels(image, self.spec, drawn)

    def normalize(self, pixels: Tensor) -> Tensor:
        """Return normalised float pixels."""
        return F.normalize(pixels.float() / 255, list(self.spec.image_mean), list(self.spec.image_std))


class TrainingImages:
    """Images and targets of training, drawn for each occurrence as ours are, if they are augmented."""

    def __init__(self, samples: Sequence[Sample], view: View, names: Sequence[str]):
        self.samples = samples
        self.view = view
        self.names = {name: index for index, name in enumerate(names)}
        self.images = [open_image(sample.image) for sample in samples]
        self.pixels = [] if view.augmentation else [view.pixels(image) for image in self.images]

    def get(self, row: int, epoch: int) -> tuple[Tensor, Target]:
        """Return a normalised image and its target."""
        sample, augmentation = self.samples[row], self.view.augmentation
        if augmentation is None:
            pixels = self.pixels[row]
        else:
            sample, drawn = augmentation.draw(sample, augmentation.words(epoch, row, 1)[0])
            pixels = self.view.pixels(self.images[row], drawn)
        return self.view.normalize(pixels), self.target(sample)

    def target(self, sample: Sample) -> Target:
        """Return the target of a sample, without crowds; without names all objects are of one class."""
        objects = [item for item in sample.objects or () if not item.iscrowd]
        scale = torch.tensor([sample.width, sample.height] * 2)
        boxes = torch.tensor([item.box for item in objects]).reshape(-1, 4) / scale
        classes = [self.names[item.caption] if self.names else 0 for item in objects]
        return Target(box_convert(boxes, "xyxy", "cxcywh"), torch.tensor(classes, dtype=torch.int64))


def train_peer(
    model: Peer, train: Sequence[Sample], view: View, budget: Budget, seed: int, names: Sequence[str] = ()
) -> tuple[int, float]:
    """Train for a CPU time; return the steps made and the CPU seconds they took.

    `names` are the captions that are its classes; none: all objects are of one.
    """
    images = TrainingImages(train, view, names)
    optimizer = torch.optim.AdamW(model.parameters(), lr=budget.learning_rate, weight_decay=budget.weight_decay)
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = []
    epoch = -1
    start, steps, spent = time.process_time(), 0, 0.0
    model.train()
    while (progress := spent / budget.cpu_seconds) < 1:
        for group in optimizer.param_groups:
            group["lr"] = budget.learning_rate * _factor(progress, budget.warmup)
        if len(order) < min(budget.batch_size, len(train)):
            order, epoch = torch.randperm(len(train), generator=generator).tolist(), epoch + 1
        rows, order = order[: budget.batch_size], order[budget.batch_size :]
        batch, targets = zip(*(images.get(row, epoch) for row in rows), strict=True)
        optimizer.zero_grad()
        model.loss(batch, targets).backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
        optimizer.step()
        steps, spent = steps + 1, time.process_time() - start
    return steps, spent


@torch.no_grad()
def evaluate_peer(model: Peer, samples: Sequence[Sample], view: View) -> dict[str, float]:
    """Return the scores of `box_average_precision`, which ignores classes."""
    model.eval()
    predictions: list[Prediction] = []
    for sample in samples:  # one by one: what is padded does not depend on the others
        image = view.normalize(view.pixels(open_image(sample.image)))
        predictions.append(_prediction(sample, *model.detect([image])[0]))
    model.train()
    return box_average_precision(predictions, samples)


def train_and_judge(job: Job, train: Sequence[Sample], held_out: Sequence[Sample], spec: ImageSpec) -> dict[str, Any]:
    """Train a peer on real images until its CPU time is over; return what a job stores."""
    torch.manual_seed(job.seed)
    augment = load_config(str(YAML), [f"train_loader.augment={job.settings['augment']}"]).train_loader.augment
    view = View.of(job.model, spec, augment, job.seed)
    names = class_names([*train, *held_out], augment) if job.task == "captions" else []
    num_queries = REAL["detection_head.num_queries"]
    peer = build_peer(job.model, max(len(names), 1), num_queries, width=128, num_layers=2, num_heads=4)
    budget = Budget(job.settings["cpu_seconds"], job.settings["batch_size"], LEARNING_RATE * job.rate)
    steps, spent = train_peer(peer, train, view, budget, job.seed, names)
    return result_of(evaluate_peer(peer, held_out, view), steps, spent)


def class_names(samples: Sequence[Sample], augment: AugmentConfig | None) -> list[str]:
    """Return the captions of all objects; if images may be flipped, also what they then are, such as a right arm."""
    names = {item.caption for sample in samples for item in sample.objects or () if not item.iscrowd}
    if augment is not None and augment.horizontal_flip:
        vocabulary = Vocabulary(augment.languages, augment.words)
        names |= {vocabulary.mirrored(name) or name for name in names}
    return sorted(names)


def _prediction(sample: Sample, boxes: Tensor, scores: Tensor) -> Prediction:
    scale = torch.tensor([sample.width, sample.height] * 2)
    ranked = scores.argsort(descending=True)
    rows = zip((boxes * scale)[ranked].tolist(), scores[ranked].tolist(), strict=True)
    objects = tuple(DetectedObject((box[0], box[1], box[2], box[3]), score, "") for box, score in rows)
    return Prediction(sample.id, sample.width, sample.height, objects)


def _factor(progress: float, warmup: float) -> float:
    return min(1.0, progress / warmup) * 0.5 * (1 + math.cos(math.pi * progress))
