"""The joint network: language model, detection memory, detection head and caption decoder in one forward pass."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from itertools import accumulate
from typing import TypeVar, overload

import torch
from jaxtyping import Int64
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.nn import Parameter
from torch.nn.utils.rnn import pad_sequence

from recipe.config import LossConfig, MatcherConfig
from recipe.families import vision_sizes
from recipe.models.caption_decoder import CaptionDecoder
from recipe.models.detection_head import DetectionHead, make_denoising_queries
from recipe.models.frozen_cache import FrozenCache, TrunkReading
from recipe.models.matcher import match
from recipe.models.memory import MemoryBuilder
from recipe.models.pyramid import patches_to_image
from recipe.models.vlm import VisionLanguageModel, VlmOutputs
from recipe.schema import (
    Batch,
    CaptionPlaces,
    DenoisingQueries,
    DetectionOutputs,
    JointOutputs,
    Matches,
    Memory,
    Proposals,
    Target,
)
from recipe.upstream.torch_private import register_dataclass, reshard

Result = TypeVar("Result")

AVERAGE = "average."  # prefix of averaged weights in a network: average.memory.* averages memory.*

# FSDP2 finds the tensors that enter and leave its units only in registered structures.
for kind in (JointOutputs, Memory, DetectionOutputs, DenoisingQueries, Matches, Proposals):
    register_dataclass(kind)


class Sealed:
    """Hide a root unit's input from FSDP, which rounds all it finds to the weights' precision, even target boxes."""

    def __init__(self, content: Batch):
        self.content = content


def is_sharded(module: nn.Module) -> bool:
    """Return whether other ranks hold parts of a module's parameters: all must then run every unit equally often."""
    units = (FSDPModule, FullyShardedDataParallel)
    return distributed.is_initialized() and any(isinstance(part, units) for part in module.modules())


def on_all_ranks(condition: bool, device: torch.device) -> bool:
    """Return whether `condition` holds on every rank; called by all ranks at the same point."""
    flag = torch.tensor(int(condition), device=device)
    if distributed.is_initialized():
        distributed.all_reduce(flag, distributed.ReduceOp.MIN)
    return bool(flag)


class JointNetwork(nn.Module):
    """One forward pass from a batch to everything the losses and predictions need.

    Every parameter takes part in every step, even if a batch has no image, object or text: otherwise ranks wait for one
    another indefinitely. Such parts run on a blank row that no loss term counts.

    If memory, detection head and caption decoder are all frozen, they run without autograd: their losses are reported
    but train nothing, because an untrained head would mislead the vision tower. A trainable memory under a frozen head
    still passes gradients.

    Attributes:
        has_head: Whether there are memory, detection head and caption decoder.
        average: Averages of memory, detection head and caption decoder, which replace them in evaluation; or None.
        cache: In training, holds what the memory reads of the trunk, which then runs only for new images; or None.

    Args:
        loss: For the focal parameters of the matching cost.
        num_denoising_groups: 0: no denoising queries.
        aux_loss: False: earlier layers' outputs are dropped.
    """

    has_head = True

    def __init__(
        self,
        vlm: VisionLanguageModel,
        memory: MemoryBuilder,
        detection_head: DetectionHead,
        caption_decoder: CaptionDecoder,
        matcher: MatcherConfig,
        loss: LossConfig,
        num_denoising_groups: int,
        box_noise: float,
        aux_loss: bool,
    ):
        super().__init__()
        self.vlm = vlm
        self.memory = memory
        self.detection_head = detection_head
        self.caption_decoder = caption_decoder
        self.matcher = matcher
        self.focal = (loss.focal_alpha, loss.focal_gamma)
        self.num_denoising_groups = num_denoising_groups
        self.box_noise = box_noise
        self.aux_loss = aux_loss
        self.average: nn.ModuleDict | None = None
        self.cache: FrozenCache | None = None

    @property
    def max_caption_tokens(self) -> int | None:
        """Return the length of the longest caption that can be learned; None: captions are not read."""
        return self.caption_decoder.max_caption_tokens

    def add_average(self) -> None:
        """Create `average` from the current weights; `recipe.algorithms.head_ema` updates it.

        Its parameters are frozen ones of this network, so that whatever holds the weights holds them too: all
        checkpoints, the snapshot of the NaN rollback, FSDP's shards.
        """
        parts = {name: deepcopy(getattr(self, name)) for name in ("memory", "detection_head", "caption_decoder")}
        self.average = nn.ModuleDict(parts).requires_grad_(False)
        self.register_load_state_dict_pre_hook(_begin_averages)

    def averaged_parameters(self) -> list[tuple[Parameter, Parameter]]:
        """Return each averaged parameter with its average."""
        parts = {} if self.average is None else self.average
        return [
            pair
            for name, part in parts.items()
            for pair in zip(getattr(self, name).parameters(), part.parameters(), strict=True)
        ]

    @overload
    def forward(self, batch: Sealed) -> JointOutputs: ...
    @overload
    def forward(self, batch: Sealed, then: Callable[[JointOutputs], Result]) -> tuple[JointOutputs, Result]: ...
    @overload
    def forward(self, batch: Sealed, *, instead: Callable[[Batch], Result]) -> Result: ...

    def forward(
        self,
        batch: Sealed,
        then: Callable[[JointOutputs], Result] | None = None,
        instead: Callable[[Batch], Result] | None = None,
    ) -> JointOutputs | tuple[JointOutputs, Result] | Result:
        """Return the outputs of a collated microbatch.

        If given, `then` is called with the outputs and its result returned with them, or `instead` with the batch in
        place of the pass. Any further use of the network's parameters must be in one of them: outside, FSDP has sharded
        them.
        """
        if instead is not None:
            return instead(batch.content)
        with self._average_in_evaluation():
            outputs = self._outputs(batch.content)
            return outputs if then is None else (outputs, then(outputs))

    @contextmanager
    def _average_in_evaluation(self) -> Iterator[None]:
        """In evaluation mode, use the averages instead of the trained modules."""
        if self.training or self.average is None:
            yield
            return
        trained = {name: getattr(self, name) for name in self.average}
        try:
            for name, part in self.average.items():
                setattr(self, name, part)
            yield
        finally:
            for name, part in trained.items():
                setattr(self, name, part)
            for part in self.average.modules():
                reshard(part)  # no backward pass follows that would do so

    def _outputs(self, batch: Batch) -> JointOutputs:
        # Read now: after the language model's pass is queued, the host would wait until a GPU has finished it.
        grids = batch["image_grid_thw"].tolist()
        student_grids = {image: grids[image] for image in batch["student_images"].tolist()}
        images = [] if self.memory.pyramid is None else self._student_pixels(batch, grids, student_grids)
        if self.training and self.cache is not None:
            states, prompt_index, student_grids = self._cached_states(self.cache, batch, student_grids)
        else:
            states, prompt_index = self._run_trunk(batch), batch["prompt_index"]
        label_losses = self.vlm.token_losses(states.last_hidden_state[batch["label_index"]], batch["labels"])
        parts = (self.memory, self.detection_head, self.caption_decoder)
        head_trains = any(parameter.requires_grad for part in parts for parameter in part.parameters())
        with torch.set_grad_enabled(torch.is_grad_enabled() and head_trains):
            memory = self._build_memory(states, prompt_index, student_grids, images)
            targets: Sequence[Target | None] = batch["targets"] or [None]
            noise_seeds, queries = batch["noise_seeds"] or [0], None
            if self.training:
                queries = make_denoising_queries(targets, noise_seeds, self.num_denoising_groups, self.box_noise)
            detection, denoised = self.detection_head(memory, queries)
            if not self.aux_loss:
                for queried in (detection, *detection.groups, *([] if denoised is None else [denoised])):
                    queried.aux_outputs.clear()
            layers = [layer for _, layer in detection.layers()]
            costs = (self.matcher.cost_bbox, self.matcher.cost_giou, self.matcher.cost_objectness)
            matches = match(layers, targets, *costs, *self.focal)
            captions = self._caption_losses(detection, memory, matches[-1], targets)
        denoising = None if queries is None or denoised is None else (queries, denoised)
        return JointOutputs(label_losses, memory, detection, denoising, matches, targets, *captions)

    def _run_trunk(self, batch: Batch) -> VlmOutputs:
        return run_trunk(self.vlm, batch, with_patches=self.has_head and self.memory.pyramid is not None)

    def _cached_states(
        self, cache: FrozenCache, batch: Batch, student_grids: Mapping[int, Sequence[int]]
    ) -> tuple[VlmOutputs, Tensor, Mapping[int, Sequence[int]]]:
        """Return states, prompt index and grids for `_build_memory`, of the cache if it has all of the batch's images.

        Else the trunk runs, and the cache gets what is new. Read states hold the prompts of the N images alone, and
        their features; without images, they are one blank row.
        """
        assert len(batch["labels"]) == 0, "a trunk that never learns reads no answers"
        device = batch["input_ids"].device
        readings = cache.read(batch["contents"], device)
        if readings is None:
            states = self._run_trunk(batch)
            prompts = [states.last_hidden_state[index[index >= 0]] for index in batch["prompt_index"]]
            features = [states.image_features[image] for image in student_grids]
            patches = [states.patch_features[image] if states.patch_features else None for image in student_grids]
            cache.write(batch["contents"], list(map(TrunkReading, features, prompts, patches)))
            return states, batch["prompt_index"], student_grids
        prompts = [reading.prompt for reading in readings]
        ends = accumulate((len(prompt) for prompt in prompts), initial=0)
        rows = [torch.arange(len(prompt), device=device) + end for prompt, end in zip(prompts, ends, strict=False)]
        states = VlmOutputs(
            torch.cat(prompts or [next(self.vlm.parameters()).new_zeros(1, self.vlm.text_config.hidden_size)]),
            tuple(reading.vision for reading in readings),
            tuple(reading.patches for reading in readings if reading.patches is not None),
        )
        index = pad_sequence(rows, batch_first=True, padding_value=-1) if rows else batch["prompt_index"]
        return states, index, dict(enumerate(student_grids.values()))

    def _build_memory(
        self,
        states: VlmOutputs,
        prompt_index: Tensor,
        student_grids: Mapping[int, Sequence[int]],
        images: Sequence[Tensor],
    ) -> Memory:
        """Return the memory of the batch's N student images, or of one blank image if there are none.

        `prompt_index` is (N, S) int64, -1 for padding; `student_grids` maps each student image's index among all images
        to its time, height and width in patches. `images` are the normalized pixels of each, if there is a pyramid.
        """
        hidden, vision = states.last_hidden_state, self.vlm.hf_model.config.vision_config
        merge = vision.spatial_merge_size
        if not student_grids:
            # Needs a gradient as an image's row does: FSDP reduces a unit's gradients when its inputs' gradients come.
            blank = 0.0 * hidden[:1]
            patches = hidden.new_zeros(1, merge**2, vision_sizes(self.vlm.hf_model.config)[0])
            mask = torch.ones(1, 1, dtype=torch.bool, device=hidden.device)
            pixels = hidden.new_zeros(3, *[merge * vision.patch_size] * 2)
            return self.memory([blank], [(1, 1)], blank[None], mask, [patches], [pixels])
        return self.memory(
            [states.image_features[image] for image in student_grids],
            [(height // merge, width // merge) for _, height, width in student_grids.values()],
            hidden[prompt_index.clamp(min=0)],
            prompt_index >= 0,
            [states.patch_features[image] for image in student_grids] if states.patch_features else (),
            images,
        )

    def _student_pixels(
        self, batch: Batch, grids: Sequence[Sequence[int]], student_images: Iterable[int]
    ) -> list[Tensor]:
        """Return the student images (3, height, width), normalized; `grids` are those of all images, in patches."""
        patches = batch["pixel_patches"].split([math.prod(grid) for grid in grids])
        merge, chosen = self.vlm.hf_model.config.vision_config.spatial_merge_size, list(student_images)
        if not chosen:
            return []
        pixels = self.vlm.normalizer(torch.cat([patches[image] for image in chosen]))  # one call for all images
        parts = pixels.split([len(patches[image]) for image in chosen])
        return [
            patches_to_image(part, grids[image][1], grids[image][2], merge)
            for part, image in zip(parts, chosen, strict=True)
        ]

    def _caption_losses(
        self, detection: DetectionOutputs, memory: Memory, matches: Matches, targets: Sequence[Target | None]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return losses (k,) under teacher forcing, labels (k,) and images (k,) of the matched queries' captions."""
        # Prediction has no captions to learn from, but ranks that share weights must call the decoder together.
        if not (any(targets) or self.training or is_sharded(self)):
            return detection.pred_boxes.new_zeros(0), matches.image[:0], matches.image[:0]
        captions = padded_captions(targets, memory.mask.device)  # (N, T, C)
        image, query, slot = matches.image, matches.query, matches.target
        if len(matches) == 0:  # one caption without words, so that the decoder takes part
            image = query = slot = torch.zeros(1, dtype=torch.int64, device=captions.device)
        labels = captions[image, slot]  # (R, C)
        row, token = (labels != -100).nonzero(as_tuple=True)
        hidden = self.caption_decoder(
            detection.query_features[image, query],
            detection.pred_boxes[image, query],
            CaptionPlaces(image, slot, *captions.shape[:2]),
            memory,
            self.vlm.embed_tokens(labels[:, :-1].clamp(min=0)),  # (R, C - 1, D)
        )
        labels = labels[row, token]
        return self.vlm.token_losses(hidden[row, token], labels), labels, image[row]


class LanguageNetwork(JointNetwork):
    """The language model alone, for `detection_head: null`: its outputs hold no query, match or caption."""

    has_head = False

    def __init__(self, vlm: VisionLanguageModel):
        nn.Module.__init__(self)
        self.vlm = vlm
        self.num_denoising_groups = 0
        self.average = None
        self.cache = None

    @property
    def max_caption_tokens(self) -> None:
        """Return None: captions are not read."""

    def _outputs(self, batch: Batch) -> JointOutputs:
        states = self._run_trunk(batch)
        losses = self.vlm.token_losses(states.last_hidden_state[batch["label_index"]], batch["labels"])
        targets: Sequence[Target | None] = batch["targets"] or [None]
        boxes = losses.new_zeros(len(targets), 0, 4)
        nothing = DetectionOutputs(boxes, boxes[..., 0], boxes)
        memory = Memory(boxes, boxes, torch.zeros(boxes.shape[:2], dtype=torch.bool, device=boxes.device), boxes)
        none = torch.zeros(0, dtype=torch.int64, device=boxes.device)
        no_losses = losses.new_zeros(0)
        return JointOutputs(losses, memory, nothing, None, [Matches(none, none, none)], targets, no_losses, none, none)


def run_trunk(vlm: VisionLanguageModel, batch: Batch, with_patches: bool = False) -> VlmOutputs:
    """Return the hidden states and vision features of a batch."""
    return vlm(
        batch["input_ids"],
        batch["attention_mask"],
        batch["position_ids"],
        batch["segment_lengths"],
        batch["pixel_patches"],
        batch["image_grid_thw"],
        with_patches=with_patches,
    )


def padded_captions(targets: Sequence[Target | None], device: torch.device) -> Int64[Tensor, "N T C"]:
    """Return the captions of all objects, padded with -100; T and C are at least 1."""
    captions = [torch.empty(0, 1, dtype=torch.int64) if t is None else t["caption_ids"] for t in targets]
    num_slots = max(1, *(len(ids) for ids in captions))
    length = max(1, *(ids.shape[1] for ids in captions if len(ids)), 1)
    labels = torch.full((len(captions), num_slots, length), -100, device=device)
    for row, ids in zip(labels, captions, strict=True):
        if len(ids):
            row[: len(ids), : ids.shape[1]] = ids
    return labels


def _begin_averages(module: nn.Module, state: dict[str, Tensor], prefix: str, *_: object) -> None:
    """Let averages begin as the weights if those loaded have none."""
    assert isinstance(module, JointNetwork) and module.average is not None
    names = [name for name in module.average.state_dict() if prefix + name in state]
    if not any(key.startswith(prefix + AVERAGE) for key in state):
        state.update({f"{prefix}{AVERAGE}{name}": state[prefix + name] for name in names})
