"""Define the configuration: one dataclass per yaml section, with all defaults, bounds and choices.

Sections that hold another library's keywords (`trainer`, `callbacks`, `loggers`, `streams`, `dataset`, `dataloader`)
keep that library's spelling. `recipe.configure` reads a configuration, `recipe.rules` checks what needs no other
library, `recipe.checks` the rest.
"""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import inf
from typing import Any

from omegaconf import MISSING

# Of parameters; what each holds: recipe/optim/groups.py. Those of `lora` exist only if it is set.
GROUPS = ("vision", "merger", "llm", "lora_vision", "lora_llm", "adapter", "detection")
HEAD_GROUPS = ("adapter", "detection")  # all others are the trunk
# What each logs: yamls/README.md. Their classes: recipe/callbacks/table.py.
CALLBACK_NAMES = (
    *("early_stopper", "group_metrics", "loss_gradients", "loss_shares", "lr_monitor", "memory_bounds"),
    *("memory_monitor", "oom_observer", "optimizer_monitor", "runtime_estimator", "speed_monitor"),
    *("system_metrics_monitor", "threshold_stopper", "throughput"),
)
DATA_CLASSES = ["data"]  # as `evaluation.classes`: the classes of the training set
LOGGER_NAMES = ("file", "json_lines", "tensorboard", "wandb")


Bound = float | None


def number(
    default: Bound | str = MISSING, *, least: Bound = None, most: Bound = None, above: Bound = None, below: Bound = None
) -> Any:
    """Return a field for a finite number within bounds; null is always allowed."""
    return field(default=default, metadata={"least": least, "most": most, "above": above, "below": below})


def one_of(*choices: Any, default: Any = None) -> Any:
    """Return a field that takes one of the choices; the first is the default unless another is named."""
    return field(default=choices[0] if default is None else default, metadata={"choices": choices})


def duration(default: str) -> Any:
    """Return a field for a duration of Composer, such as 10ep, 500ba, 1000sp, 20000tok or 0.1dur."""
    return field(default=default, metadata={"duration": True})


def span(least: float, most: float) -> Mapping[str, Any]:
    """Return the metadata of a field for a list of two numbers within bounds, the lower first."""
    return {"span": (least, most)}


def in_batches(default: str | None, *, least: int) -> Any:
    """Return a field for a duration in batches, such as 50ba."""
    return field(default=default, metadata={"batches": least})


# Deleted keys: {dotted key: its default}. A yaml of an older run that sets one to its default, which changes nothing,
# still loads; any other value is an error.
REMOVED_KEYS: Mapping[str, Any] = {
    "matcher.cost_caption": 0.0,
    "caption_decoder.tie_word_embeddings": True,
    "evaluation.num_beams": 1,
    "evaluation.length_penalty": 1.0,
}
# Keys of checkpoints and yamls of older versions, read as another one: {dotted key: (new name, new value by old one)}.
REPLACED_KEYS: Mapping[str, tuple[str, Mapping[Any, Any]]] = {
    "evaluation.generate_answer": ("answers", {True: {}, False: None}),
    # Without it, a head of an older version had no pyramid; with it, it has no equal.
    "detection_head.patch_features": ("multi_scale", {False: False}),
}
REMOVED_VALUES: Mapping[str, Sequence[Any]] = {"loss.objectness": ("varifocal",)}  # an error too


@dataclass
class ModelConfig:
    """The language model. Every dimension is read from the checkpoint's own config."""

    pretrained_model_name_or_path: str = MISSING  # a local folder, or a name on the Hugging Face hub
    # auto: flash_attention_2 on CUDA if it is installed, else sdpa
    attn_implementation: str = one_of("auto", "eager", "sdpa", "flash_attention_2")
    dtype: str = one_of("float32", "bfloat16", "float64")  # of the weights that are trained
    frozen_dtype: str = one_of("bfloat16", "same", "nf4")  # of what no stage trains; yamls/README.md
    gradient_checkpointing: bool = False  # recompute activations in the backward pass, to save memory


@dataclass
class LoraPartConfig:
    """Low-rank adapters on the linear layers of one part; see `recipe/models/lora.py`."""

    rank: int = number(16, least=1)
    alpha: float = number(32.0, above=0)  # what an adapter computes counts alpha / rank times
    dropout: float = number(0.0, least=0, below=1)  # of an adapter's input
    targets: list[str] | None = None  # of `lora_targets` in recipe/families.py; null: all
    dora: bool = False  # learn the length of each row of a weight too (DoRA); slower


@dataclass
class LoraConfig:
    """Adapters on a frozen language model and vision tower, by peft; null: none in that part, {}: the defaults."""

    llm: LoraPartConfig | None = None
    vision: LoraPartConfig | None = None


@dataclass
class DetectionHeadConfig:
    """The DETR-style head; see `recipe/models/detection_head.py`."""

    pretrained: bool = True  # start from the head of the base model if that is an export; false: from a new one
    num_queries: int = number(100, least=1)
    width: int | None = number(None, least=1)  # a multiple of 8 and of num_heads; null: the language model's width
    num_heads: int = number(8, least=1)
    num_layers: int = number(2, least=1)
    ffn_factor: int = number(4, least=1)
    dropout: float = number(0.0, least=0, most=1)
    adapter_ratio: int = number(8, least=1)  # the memory adapters' bottleneck is hidden_size / adapter_ratio wide
    memory_positions: bool = True  # 2-D positions on the vision part of the memory
    local_attention: bool = True  # each cross-attention head starts at its own place around the box
    multi_scale: bool = True  # queries read a feature pyramid with cells of 7 to 56 pixels too
    select_queries: bool = True  # the first reference boxes are the best proposals of its finest map (two-stage)
    num_query_groups: int = number(1, least=1)  # in training, each matched separately (Group DETR)
    refine_boxes: bool = True  # each layer refines the reference boxes of the layer before
    aux_loss: bool = True  # compute the losses after every earlier layer too
    num_denoising_groups: int = number(4, least=0)  # noised copies of the ground truth in training
    box_noise: float = number(1.0, least=0, most=1)  # of denoising queries, in half box sizes (D-FINE: 1.0, DINO: 0.4)


@dataclass
class CaptionDecoderConfig:
    """The caption decoder; see `recipe/models/caption_decoder.py`."""

    num_layers: int = number(4, least=1)
    num_heads: int = number(8, least=1)
    ffn_factor: int = number(4, least=1)
    dropout: float = number(0.0, least=0, most=1)
    max_caption_tokens: int | None = number(32, least=2)  # including end-of-sequence; null: of the data's longest


@dataclass
class PromptConfig:
    """The text of the conversation."""

    system: str = "You are a helpful assistant."
    detect: str = "Locate every object in the image and report bounding boxes as JSON."
    candidate_phrases: list[str] = field(default_factory=list[str])  # appended to `detect`
    # absolute: pixels of the resized image; normalized_1000: 0 to 1000; null: as the base model was trained
    box_coordinates: str | None = field(default=None, metadata={"choices": ("absolute", "normalized_1000")})
    student_answer: bool | None = None  # in training; null: while the trunk learns; true: always; false: never


@dataclass
class ImageConfig:
    """The pixel budget per image; one token is two patches wide and high (28 x 28 or 32 x 32 pixels).

    null: the checkpoint's image processor decides.
    """

    min_pixels: int | None = number(None, least=1)
    max_pixels: int | None = number(None, least=1)


@dataclass
class TeacherConfig:
    """Solved examples shown before the student image, drawn from a small MDS pool (`convert/teachers.py`)."""

    stream: dict[str, Any] | None = None  # streaming.Stream keywords of the pool; null: no teachers
    num_teachers: int = number(0, least=0)
    teacher_ratio: float = number(1.0, least=0, most=1)  # share of the samples that get teachers


@dataclass
class PackingConfig:
    """Packs planned before pixels are read, for training only; see `recipe/data/plan.py`."""

    max_tokens: int | None = number(None, least=1)  # per pack; null: max_seq_len
    max_patches: int | None = number(None, least=1)  # image patches per pack; bounds the vision tower's memory
    window: int = number(1024, least=1)  # samples packed together; more: fuller packs, further from the shuffle
    on_long_sample: str = one_of("raise", "skip")  # if one sample alone exceeds the budget


@dataclass
class CropConfig:
    """Show a part of an image: one that holds a whole object, if there is any."""

    probability: float = number(0.5, least=0, most=1)
    # Share of the image's area; ratio of width to height, relative to the image's own.
    scale: list[float] = field(default_factory=lambda: [0.3, 1.0], metadata=span(0.01, 1))
    ratio: list[float] = field(default_factory=lambda: [0.75, 1.33], metadata=span(0.1, 10))
    least_visible: float = number(0.4, above=0, most=1)  # share of a cut object that must be seen, or it is left out
    least_pixels: float = number(8.0, least=0)  # so must this many of the shorter side of a cut object
    enlarge: bool = True  # show a part with as many pixels as the whole image; false: at its own size
    epochs: int | None = number(None, least=1)  # parts in the first N epochs, then whole images; null: in all


@dataclass
class ColourConfig:
    """Change an image's colours by random factors, such as 0.8 to 1.2 for 0.2."""

    probability: float = number(0.8, least=0, most=1)
    brightness: float = number(0.2, least=0, most=0.9)
    contrast: float = number(0.2, least=0, most=0.9)
    saturation: float = number(0.2, least=0, most=0.9)
    hue: float = number(0.0, least=0, most=0.1)  # share of the colour circle; leave it 0 if captions name colours


@dataclass
class WordsConfig:
    """Words that an augmented image would make untrue, in addition to those in `recipe/data/words.py`."""

    swapped: dict[str, str] = field(default_factory=dict[str, str])  # a flip exchanges the two phrases
    not_flipped: list[str] = field(default_factory=list[str])  # an image whose texts hold one is never flipped
    not_cropped: list[str] = field(default_factory=list[str])  # the same for crops


@dataclass
class AugmentConfig:
    """Random changes of a training image, drawn for each of its occurrences; see `recipe/data/augment.py`."""

    horizontal_flip: float = number(0.0, least=0, most=1)  # probability
    crop: CropConfig | None = None  # {}: the defaults
    # Factor on width and height, such as [0.5, 1.5], within the pixel budget.
    scale_jitter: list[float] | None = field(default=None, metadata=span(0.1, 10))
    colour: ColourConfig | None = None
    teachers: bool = False  # augment the teachers too
    # Those in which a flip exchanges words such as "left side"; words of all others prevent the flip.
    languages: list[str] = field(default_factory=lambda: ["en"])
    words: WordsConfig = field(default_factory=WordsConfig)


@dataclass
class LoaderConfig:
    """Where samples come from and how they are batched."""

    streams: dict[str, Any] = MISSING  # {name: streaming.Stream keywords}
    global_batch_size: int = number(least=1)  # per step, over all ranks: packs with `packing`, else samples
    collator: str = one_of("standard", "packed")  # standard: padded rows; packed: one row without padding
    packing: PackingConfig | None = None  # {}: packs of max_seq_len tokens; null: one sample counts as one
    augment: AugmentConfig | None = None  # of training alone
    on_bad_sample: str = one_of("raise", "skip")  # if a sample is unusable, such as a broken image
    max_bad_samples: int = number(100, least=0)  # skipped per run, or per evaluation; one more stops the run
    dataset: dict[str, Any] = field(default_factory=dict[str, Any])  # streaming.StreamingDataset keywords
    # torch.utils.data.DataLoader keywords; `KEY: null` drops one, num_workers: 0 those that only concern workers.
    dataloader: dict[str, Any] = field(default_factory=dict[str, Any])


@dataclass
class AnswersConfig:
    """The language model's text answers; the last evaluation of a run, `eval.py` and `predict.py` answer all images."""

    images: int = number(64, least=1)  # answered at the other evaluations, the same ones each time


@dataclass
class RetentionConfig:
    """How far the text path has moved from the base model's; see `recipe/models/retention.py`."""

    stream: dict[str, Any] = MISSING  # streaming.Stream keywords of chats that are not trained on
    max_samples: int | None = number(256, least=1)  # the first ones in stored order; null: all


@dataclass
class EvaluationConfig:
    """How predictions are made for metrics, logged images and `predict.py`."""

    score_threshold: float = number(0.3, least=0, most=1)  # least score of a prediction; AP counts all queries
    # score = sigmoid(score_scale * logit + score_shift); eval.py fits both: of ten objects scored 0.8 eight are right
    score_scale: float = number(1.0, above=0)
    score_shift: float = number(0.0, above=-inf)
    nms_iou: float | None = number(None, least=0, most=1)  # drop the worse of two boxes that overlap more; null: none
    max_captions: int = number(100, least=0)  # captions generated per image, best scores first
    answers: AnswersConfig | None = field(default_factory=AnswersConfig)  # null: no text answers
    max_new_tokens: int = number(512, least=1)
    num_logged_images: int = number(8, least=0)
    # Each object gets a probability of each of these, in place of a caption; []: a caption; data: the training set's.
    classes: list[str] = field(default_factory=list[str])
    # Scores of each category at every evaluation, which need the captions of all objects; false: at a run's last.
    every_class: bool = False
    retention: RetentionConfig | None = None  # in training only if adapters alone learn of the trunk


@dataclass
class LossConfig:
    """The weights of the loss terms; total = the weighted sum."""

    weight_lm_teacher: float = number(0.3, least=0)
    weight_lm_student: float = number(1.0, least=0)
    weight_bbox: float = number(5.0, least=0)
    weight_giou: float = number(2.0, least=0)
    weight_objectness: float = number(1.0, least=0)
    weight_caption: float = number(1.0, least=0)
    objectness: str = one_of("focal", "mal")  # mal teaches objectness to be a power of the box's IoU
    focal_alpha: float = number(0.25, least=0, most=1)
    focal_gamma: float = number(2.0, least=0)


@dataclass
class MatcherConfig:
    """The weights of the Hungarian matcher's cost matrix."""

    cost_bbox: float = number(5.0, least=0)
    cost_giou: float = number(2.0, least=0)
    cost_objectness: float = number(2.0, least=0)


@dataclass
class OptimizerConfig:
    """AdamW with one learning rate per parameter group. 0 = frozen: no gradient, not in the optimizer."""

    lr_vision: float = number(2e-6, least=0)
    lr_merger: float = number(1e-5, least=0)
    lr_llm: float = number(1e-5, least=0)
    lr_lora_vision: float = number(1e-4, least=0)  # of the adapters, if `lora.vision` is set; lr_vision is then 0
    lr_lora_llm: float = number(1e-4, least=0)  # if `lora.llm` is set; lr_llm is then 0
    lr_adapter: float = number(1e-4, least=0)
    lr_detection: float = number(1e-4, least=0)
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    eps: float = number(1e-8, least=0)
    moments: str = one_of("full", "8bit")  # full: in the dtype of what is trained; 8bit: recipe/optim/eight_bit.py
    clip_norm: float | None = number(1.0, least=1e-6)  # largest norm of the whole gradient; null: no clipping
    weight_decay: float = number(0.01, least=0)  # of matrices; vectors (biases, norms) get none
    lr_scaling: str = one_of("none", "linear", "sqrt")  # by the ratio of tokens per step to `reference_tokens`
    reference_tokens: int | None = number(None, least=1)  # tokens per step that the rates above are meant for


@dataclass
class CurveConfig:
    """The course of a learning rate: Composer's schedulers with warm-up, by their own names and keywords."""

    name: str = one_of("cosine", "linear", "constant")
    t_warmup: str = duration("0ba")
    alpha_f: float = number(0.0, least=0)  # the last multiplier


@dataclass
class SchedulerConfig(CurveConfig):
    """The course of all learning rates."""

    # {group: its own complete curve}
    groups: dict[str, CurveConfig] = field(default_factory=dict[str, CurveConfig], metadata={"names": GROUPS})


@dataclass
class StagedFreezingConfig:
    """When groups are frozen or learn at another rate; see `recipe/optim/schedule.py`.

    The latest entry whose start (2ep, 500ba, 0.75dur) has passed applies; before the first: `lr: 1.0`.
    """

    # {group: [{from: time, lr: factor | frozen, warmup: time}, ...]}; warmup may be left out; null drops a group
    groups: dict[str, Any] = field(default_factory=dict[str, Any], metadata={"names": GROUPS})
    detection_freeze_epochs: int | None = number(None, least=0)  # short for freezing adapter and detection for N epochs


FROZEN = "frozen"


@dataclass(frozen=True)
class StageEntry:
    """A factor on a group's learning rate from a time on."""

    start: str  # such as 2ep or 0.75dur
    factor: float | None  # None: frozen
    warmup: str | None = None  # the rate rises from 0 over that long


@dataclass
class CacheFrozenConfig:
    """Keep what the head reads of a trunk that never learns on disk; see `recipe/models/frozen_cache.py`."""

    local: str = MISSING  # a folder; other runs may share it
    size_limit: str = "50gb"  # of the folder; what no longer fits is computed in every epoch


@dataclass
class EmaConfig:
    """An exponential moving average of adapter and head, as `composer.algorithms.EMA`; see `algorithms/head_ema.py`."""

    half_life: str | None = in_batches("100ba", least=1)  # steps until a weight counts half; null with `smoothing`
    smoothing: float | None = number(None, above=0, below=1)  # share of the average that an update keeps, such as 0.99
    update_interval: str = in_batches("1ba", least=1)  # steps between updates


@dataclass
class RunWatchConfig:
    """Triggers after `count` consecutive batches."""

    action: str = one_of("log", "skip", "rollback")
    count: int = number(10, least=1)


@dataclass
class RatioWatchConfig:
    """Triggers if the share `ratio` of the last `window` batches is reached."""

    action: str = one_of("log", "skip", "rollback", default="rollback")
    window: int = number(50, least=1)
    ratio: float = number(0.2, above=0, most=1)


@dataclass
class ExplosionWatchConfig:
    """Triggers above `factor` medians of the last `window` batches; judged once half of them are known."""

    action: str = one_of("log", "skip", "rollback")
    window: int = number(50, least=1)
    factor: float = number(100.0, above=0)


@dataclass
class SpikeWatchConfig:
    """Triggers `z_score` robust deviations above the median of the last `window`; judged once half are known."""

    action: str = one_of("log", "skip", "rollback")
    window: int = number(100, least=1)
    z_score: float = number(10.0, above=0)


@dataclass
class AnomalyConfig:
    """torch's anomaly mode for a few batches: slow and ends the run, but names the operation that made a NaN."""

    start: str = in_batches("0ba", least=0)
    batches: int = number(5, least=1)


@dataclass
class NaNRollbackConfig:
    """How a run reacts to non-finite numbers; null switches a watcher off. See `recipe/algorithms/nan_rollback.py`."""

    # Where what is trained, and the optimizer's state, are copied to; off: a rollback ends the run with exit code 65.
    snapshot: str = one_of("memory", "disk", "off")
    snapshot_interval: str = in_batches("50ba", least=1)  # between copies
    strikes: int = number(3, least=1)  # consecutive bad batches before a restore; bad weights restore at once
    lr_factor: float = number(0.5, least=1e-6, most=1)  # on all learning rates at each rollback
    clip_factor: float = number(0.5, least=1e-6, most=1)  # on `optimizer.clip_norm` at each rollback
    max_rollbacks: int = number(5, least=0)  # one more ends the run with exit code 65
    max_skipped: int = number(20, least=0)  # bad batches of the last `skipped_window`; one more ends the run with 65
    skipped_window: int = number(1000, least=1)
    quarantine_after: int = number(2, least=1)  # bad batches before a sample is excluded from the next epoch
    consecutive_nan: RunWatchConfig | None = field(default_factory=lambda: RunWatchConfig("log", 2))
    nan_ratio: RatioWatchConfig | None = field(default_factory=RatioWatchConfig)
    consecutive_zero_losses: RunWatchConfig | None = field(default_factory=RunWatchConfig)
    gradient_explosion: ExplosionWatchConfig | None = field(default_factory=ExplosionWatchConfig)
    loss_spike: SpikeWatchConfig | None = field(default_factory=SpikeWatchConfig)
    detect_anomaly: AnomalyConfig | None = None


@dataclass
class SaveBestConfig:
    """Keep the checkpoint of the best evaluation as `best-rank0.pt`, next to those of `trainer.save_interval`."""

    metric: str | None = None  # such as eval/box_ap50; null: keep none
    mode: str = one_of("max", "min")  # which value of it is the best


@dataclass
class DebugConfig:
    """Checks that cost time."""

    check_shapes: bool = False  # of what functions of recipe.data, recipe.models and recipe.losses take and return


@dataclass
class RecipeConfig:
    """A run: `composer recipe/train.py YAML [key.sub=value ...]`."""

    seed: int = 17
    run_folder: str = MISSING  # checkpoints, logs, images and the resolved config; `trainer.save_folder` may differ
    load_path: str | None = None  # a checkpoint or export: train.py starts from it, eval.py evaluates it
    autoresume: bool = True  # continue from the run's newest valid checkpoint; `load_path` is then not read
    max_seq_len: int = number(4096, least=1)  # tokens per sample; a longer one is an error that names it
    # Share of the training images held out for evaluation, instead of `eval_loader.streams`; recipe/data/split.py
    val_fraction: float | None = number(None, above=0, below=1)
    model: ModelConfig = field(default_factory=ModelConfig)
    lora: LoraConfig | None = None
    detection_head: DetectionHeadConfig | None = field(default_factory=DetectionHeadConfig)  # null: no head
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
    cache_frozen: CacheFrozenConfig | None = None
    ema: EmaConfig | None = None  # {}: evaluation, predict and export use averaged weights of the head
    nan_rollback: NaNRollbackConfig = field(default_factory=NaNRollbackConfig)
    save_best: SaveBestConfig = field(default_factory=SaveBestConfig)
    debug: DebugConfig = field(default_factory=DebugConfig)
    fsdp_version: int = one_of(1, 2, default=2)  # if `trainer.parallelism_config.fsdp` is set; recipe/optim/fsdp.py
    trainer: dict[str, Any] = field(default_factory=dict[str, Any])  # composer.Trainer keywords
    # {name: keywords}; {name: null} switches one off
    callbacks: dict[str, Any] = field(default_factory=dict[str, Any], metadata={"names": CALLBACK_NAMES})
    loggers: dict[str, Any] = field(default_factory=dict[str, Any], metadata={"names": LOGGER_NAMES})


def lora_parts(config: RecipeConfig) -> dict[str, LoraPartConfig]:
    """Return the parts (`llm`, `vision`) that have adapters."""
    return {part: value for part, value in vars(config.lora or LoraConfig()).items() if value is not None}


def groups_of(config: RecipeConfig) -> list[str]:
    """Return the parameter groups that the run's model has."""
    parts = lora_parts(config)
    return [group for group in GROUPS if not group.startswith("lora_") or group.removeprefix("lora_") in parts]


def trained_trunk(config: RecipeConfig) -> list[str]:
    """Return the groups of the trunk, which are all but adapter and detection, that have a learning rate."""
    return [name for name in groups_of(config) if name not in HEAD_GROUPS and getattr(config.optimizer, f"lr_{name}")]


def is_base_below_adapters(config: RecipeConfig) -> bool:
    """Return whether adapters alone learn of the trunk, so that it is the base's again without them."""
    trained = trained_trunk(config)
    return bool(trained) and all(group.startswith("lora_") for group in trained)


# Starts over from what a checkpoint's weights have learned; without another folder, its own checkpoints come first.
NEW_RUN = "run_folder=ANOTHER load_path=CHECKPOINT trainer.load_weights_only=true"


class ConfigError(ValueError):
    """A mistake in the yaml or on the command line; the message names key, value and remedy."""


def nearest(name: str, allowed: Sequence[str]) -> str:
    """Return the end of an error message: the allowed name most similar to `name`, or all if none is similar."""
    close = difflib.get_close_matches(name, allowed, n=1)
    return f"did you mean {close[0]}?" if close else f"one of: {', '.join(sorted(allowed))}"
