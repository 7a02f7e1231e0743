"""The configuration: one dataclass a yaml section. Defaults live here and nowhere else.

Sections that hold another library's keywords (`trainer`, `callbacks`, `loggers`, `streams`, `dataset`, `dataloader`)
keep that library's spelling. `recipe.configure` reads a configuration and checks keys, types and presence;
`recipe.checks` checks values and combinations, `recipe.checks` other libraries' keywords.
"""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

GROUPS = ("vision", "merger", "llm", "adapter", "detection")  # of parameters; what is in each: recipe/optim/groups.py

# Keys that were deleted: {dotted key: its default}. A yaml of an older run that holds one still loads if it holds this
# value, which changes nothing; with any other it is refused.
REMOVED_KEYS: Mapping[str, Any] = {
    "matcher.cost_caption": 0.0,
    "evaluation.num_beams": 1,
    "evaluation.length_penalty": 1.0,
}
REMOVED_VALUES: Mapping[str, Sequence[Any]] = {"loss.objectness": ("varifocal",)}  # refused by name, as such keys are


@dataclass
class ModelConfig:
    """The language model. Every dimension is read from the checkpoint's own config."""

    pretrained_model_name_or_path: str = MISSING  # a local folder, or a name on the Hugging Face hub
    attn_implementation: str = "auto"  # auto: flash_attention_2 on CUDA where installed, else sdpa
    dtype: str = "float32"  # of the weights: float32 | bfloat16 | float64
    gradient_checkpointing: bool = False  # recompute activations in the backward pass, to save memory


@dataclass
class DetectionHeadConfig:
    """The DETR-style head; see `recipe/models/detection_head.py`."""

    num_queries: int = 100
    width: int | None = None  # default: the language model's hidden size
    num_heads: int = 8
    num_layers: int = 2
    ffn_factor: int = 4
    dropout: float = 0.0
    adapter_ratio: int = 8  # the bottleneck of the memory adapters is hidden_size / adapter_ratio
    memory_positions: bool = True  # 2-D positions on the vision part of the memory
    local_attention: bool = True  # at first each head of the cross-attention looks at its own place around the box
    patch_features: bool = False  # the vision tower's features before the merger (stride 14) beside the merged ones
    select_queries: bool = False  # the first reference boxes are the best proposals of the vision tokens (two-stage)
    num_query_groups: int = 1  # groups of queries in training, each matched apart: one object teaches many (Group DETR)
    refine_boxes: bool = True  # each layer refines the reference boxes of the layer before
    aux_loss: bool = True  # the losses also after every earlier layer
    num_denoising_groups: int = 4  # copies of the noised ground truth in training; 0: no denoising queries
    box_noise: float = 1.0  # of the denoising queries, in half box sizes (as in DINO)


@dataclass
class CaptionDecoderConfig:
    """The caption decoder; see `recipe/models/caption_decoder.py`."""

    num_layers: int = 4
    num_heads: int = 8
    ffn_factor: int = 4
    dropout: float = 0.0
    max_caption_tokens: int | None = 32  # longest caption, end-of-sequence counted; null: of the longest in the data
    tie_word_embeddings: bool = True  # read and write tokens by the language model's; false: by one matrix of its own


@dataclass
class PromptConfig:
    """The text of the conversation."""

    system: str = "You are a helpful assistant."
    detect: str = "Locate every object in the image and report bounding boxes as JSON."
    candidate_phrases: list[str] = field(default_factory=list[str])  # appended to `detect` where given
    box_coordinates: str = "absolute"  # absolute: pixels of the resized image | normalized_1000: 0 to 1000
    student_answer: bool = True  # false: objects give no answer to learn, for the head alone: sequences are far shorter


@dataclass
class ImageConfig:
    """The pixel budget of one picture. null: what the checkpoint's image processor says."""

    min_pixels: int | None = None
    max_pixels: int | None = None


@dataclass
class TeacherConfig:
    """Solved examples shown before the student image, drawn from a small MDS pool (`convert/teachers.py`)."""

    stream: dict[str, Any] | None = None  # streaming.Stream keywords of the pool; null: no teachers
    num_teachers: int = 0
    teacher_ratio: float = 1.0  # share of the samples that get teachers


@dataclass
class PackingConfig:
    """Packs planned before pixels are read; see `recipe/data/plan.py`. For training only."""

    max_tokens: int | None = None  # of a pack; default: max_seq_len
    max_patches: int | None = None  # image patches of a pack, which bound the vision tower's memory; null: any number
    window: int = 1024  # shuffled samples packed together: more fill packs better, fewer keep nearer to the shuffle
    on_long_sample: str = "raise"  # raise | skip: where one sample alone is over the budget


@dataclass
class LoaderConfig:
    """Where samples come from and how they are batched."""

    streams: dict[str, Any] = MISSING  # {name: streaming.Stream keywords}
    global_batch_size: int = MISSING  # of one optimizer step, over all ranks: samples, or packs where `packing` is set
    collator: str = "standard"  # standard: padded rows | packed: one row without padding
    packing: PackingConfig | None = None  # {}: packs of max_seq_len tokens; null: one sample counts as one
    on_bad_sample: str = "raise"  # raise | skip: where a training sample cannot be used, such as a broken picture
    max_bad_samples: int = 100  # skipped in a run, over all ranks; one more stops it
    dataset: dict[str, Any] = field(default_factory=dict[str, Any])  # streaming.StreamingDataset keywords
    dataloader: dict[str, Any] = field(default_factory=dict[str, Any])  # torch.utils.data.DataLoader keywords


@dataclass
class EvaluationConfig:
    """How predictions are made for the metrics, the logged pictures and `predict.py`."""

    score_threshold: float = 0.3  # objects below it are no predictions and are not drawn; AP counts all queries
    score_scale: float = 1.0  # score = sigmoid(score_scale * logit + score_shift): what eval.py finds and writes to
    score_shift: float = 0.0  # calibration.yaml, so that of the objects scored 0.8 eight of ten are right
    nms_iou: float | None = None  # of two boxes that overlap more only the better is an object; null: all are
    max_captions: int = 100  # captions generated per image at most, best scores first
    generate_answer: bool = True  # let the language model write its answer too
    max_new_tokens: int = 512
    num_logged_images: int = 8


@dataclass
class LossConfig:
    """The weights of the loss terms; total = the weighted sum."""

    weight_lm_teacher: float = 0.3
    weight_lm_student: float = 1.0
    weight_bbox: float = 5.0
    weight_giou: float = 2.0
    weight_objectness: float = 1.0
    weight_caption: float = 1.0
    objectness: str = "focal"  # focal | mal: the second teaches objectness to be a power of the box's IoU
    focal_alpha: float = 0.25
    focal_gamma: float = 2.0


@dataclass
class MatcherConfig:
    """The weights of the Hungarian matcher's cost matrix."""

    cost_bbox: float = 5.0
    cost_giou: float = 2.0
    cost_objectness: float = 2.0


@dataclass
class OptimizerConfig:
    """AdamW with a learning rate a parameter group. 0 = frozen: no gradient, not in the optimizer."""

    lr_vision: float = 2e-6
    lr_merger: float = 1e-5
    lr_llm: float = 1e-5
    lr_adapter: float = 1e-4
    lr_detection: float = 1e-4
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    eps: float = 1e-8
    clip_norm: float | None = 1.0  # largest norm of the whole gradient; null: no clipping
    weight_decay: float = 0.01  # of matrices; vectors (biases, norms) get none
    lr_scaling: str = "none"  # none | linear | sqrt, in the ratio of the batch's tokens to `reference_tokens`
    reference_tokens: int | None = None  # tokens per optimizer step that the rates above are meant for


@dataclass
class CurveConfig:
    """The course of a learning rate: Composer's schedulers, by their own names and keywords."""

    name: str = "cosine"  # cosine | linear | constant, each with warm-up
    t_warmup: str = "0ba"
    alpha_f: float = 0.0  # the last multiplier


@dataclass
class SchedulerConfig(CurveConfig):
    """The course of all learning rates."""

    groups: dict[str, CurveConfig] = field(default_factory=dict[str, CurveConfig])  # {group: a whole curve of its own}


@dataclass
class StagedFreezingConfig:
    """Which groups are frozen, or learn at another rate, in which part of the run; see `recipe/optim/schedule.py`.

    Of a group's list the last entry whose time (2ep, 500ba, 0.75dur) has come holds; before the first: `lr: 1.0`.
    """

    groups: dict[str, Any] = field(default_factory=dict[str, Any])  # {group: [{from: time, lr: factor | frozen}, ...]}
    detection_freeze_epochs: int | None = None  # short for: adapter and detection are frozen for so many epochs


@dataclass
class EmaConfig:
    """An exponential moving average of adapter and head, as `composer.algorithms.EMA`; see `algorithms/head_ema.py`."""

    half_life: str | None = "100ba"  # steps after which a weight counts half; null where `smoothing` is given
    smoothing: float | None = None  # share of the old average that an update keeps, such as 0.99
    update_interval: str = "1ba"  # steps between updates


@dataclass
class RunWatchConfig:
    """So many batches in a row."""

    action: str = "log"  # log | skip | rollback
    count: int = 10


@dataclass
class RatioWatchConfig:
    """Such a share of the last `window` batches."""

    action: str = "rollback"
    window: int = 50
    ratio: float = 0.2


@dataclass
class ExplosionWatchConfig:
    """Above so many medians of the last `window` batches; judged once half of them are known."""

    action: str = "log"
    window: int = 50
    factor: float = 100.0


@dataclass
class SpikeWatchConfig:
    """So many robust standard deviations above the median of the last `window`; judged once half are known."""

    action: str = "log"
    window: int = 100
    z_score: float = 10.0


@dataclass
class AnomalyConfig:
    """torch's anomaly mode for some batches: slow, and it ends the run, but names the operation that made a NaN."""

    start: str = "0ba"
    batches: int = 5


@dataclass
class NaNRollbackConfig:
    """What is done about losses, gradients and weights that are not finite; see `recipe/algorithms/nan_rollback.py`.

    A bad batch is skipped. Any watcher can be switched off with null.
    """

    snapshot_interval: str = "50ba"  # between copies of weights and optimizer in host memory
    strikes: int = 3  # bad batches in a row after which the last copy is restored; at once where weights are bad
    lr_factor: float = 0.5  # on all learning rates at each rollback
    clip_factor: float = 0.5  # on `optimizer.clip_norm` at each rollback
    max_rollbacks: int = 5  # one more ends the run with exit code 65
    max_skipped: int = 20  # bad batches among the last `skipped_window`; one more ends the run with exit code 65
    skipped_window: int = 1000
    quarantine_after: int = 2  # bad batches after which a sample is left out, from the next epoch on
    consecutive_nan: RunWatchConfig | None = field(default_factory=lambda: RunWatchConfig("log", 2))
    nan_ratio: RatioWatchConfig | None = field(default_factory=RatioWatchConfig)
    consecutive_zero_losses: RunWatchConfig | None = field(default_factory=RunWatchConfig)
    gradient_explosion: ExplosionWatchConfig | None = field(default_factory=ExplosionWatchConfig)
    loss_spike: SpikeWatchConfig | None = field(default_factory=SpikeWatchConfig)
    detect_anomaly: AnomalyConfig | None = None


@dataclass
class SaveBestConfig:
    """Keep the checkpoint of the best evaluation as `best-rank0.pt`, beside those of `trainer.save_interval`."""

    metric: str | None = None  # such as eval/box_ap50; null: keep none
    mode: str = "max"  # max | min: which value of it is the best


@dataclass
class RecipeConfig:
    """A run. `composer recipe/train.py YAML [key.sub=value ...]`."""

    seed: int = 17
    run_folder: str = MISSING  # checkpoints, logs, pictures and the resolved config; `trainer.save_folder` may differ
    load_path: str | None = (
        None  # a Composer checkpoint: of eval.py the one to judge, of train.py the one to start from
    )
    autoresume: bool = True  # go on from the run's newest valid checkpoint, where it has any; `load_path` then rests
    max_seq_len: int = 4096  # tokens of one sample; a longer one is an error that names it
    model: ModelConfig = field(default_factory=ModelConfig)
    detection_head: DetectionHeadConfig = field(default_factory=DetectionHeadConfig)
    caption_decoder: CaptionDecoderConfig = field(default_factory=CaptionDecoderConfig)
    prompt: PromptConfig = field(default_factory=PromptConfig)
    image: ImageConfig = field(default_factory=ImageConfig)
    teachers: TeacherConfig = field(default_factory=TeacherConfig)
    train_loader: LoaderConfig = field(default_factory=LoaderConfig)
    eval_loader: LoaderConfig = field(default_factory=LoaderConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    matcher: MatcherConfig = field(default_factory=MatcherConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    staged_freezing: StagedFreezingConfig = field(default_factory=StagedFreezingConfig)
    ema: EmaConfig | None = None  # {}: evaluation, checkpoints' readers and export use averaged weights of the head
    nan_rollback: NaNRollbackConfig = field(default_factory=NaNRollbackConfig)
    save_best: SaveBestConfig = field(default_factory=SaveBestConfig)
    fsdp_version: int = 2  # 1 | 2, where `trainer.parallelism_config.fsdp` is set; see recipe/optim/fsdp.py
    trainer: dict[str, Any] = field(default_factory=dict[str, Any])  # composer.Trainer keywords
    callbacks: dict[str, Any] = field(default_factory=dict[str, Any])  # {name: keywords}, {name: null} switches one off
    loggers: dict[str, Any] = field(default_factory=dict[str, Any])  # {name: keywords}, {name: null} switches one off


class ConfigError(ValueError):
    """A mistake in the yaml or on the command line, told in one line that names the key and the remedy."""


def nearest(name: str, allowed: Sequence[str]) -> str:
    """The end of an error message: the likeliest of the `allowed` names, or all of them where none is like `name`."""
    close = difflib.get_close_matches(name, allowed, n=1)
    return f"did you mean {close[0]}?" if close else f"one of: {', '.join(sorted(allowed))}"
