"""The model card of an export: what the run knows of data, scores and versions, and what only its user knows.

Its front matter is Hugging Face's (`ModelCardData`). A licence is never guessed.
"""

import json
import logging
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from PIL import Image

from recipe.checkpoints.base import frozen_groups
from recipe.checkpoints.weights import CONFIG_FILE, EVALUATED, HEAD_FILE
from recipe.config import RecipeConfig
from recipe.metrics.calibration import CALIBRATION_FILE
from recipe.optim.groups import GROUP_PATTERNS
from recipe.publish.hub import is_hub_name
from recipe.publish.trained import TRAINED_FILE
from recipe.records import INDEX_FILE, RECORDS_FILE, DamagedRecordsError, parse_index, read_records
from recipe.redact import redact_text
from recipe.upstream.trainer_section import view_trainer

log = logging.getLogger(__name__)

CARD_FILE, EXAMPLE_FILE = "README.md", "example.png"
UNDEFINED = -1
PACKAGES = ("torch", "transformers", "mosaicml", "mosaicml-streaming", "peft", "bitsandbytes")
# Scores that a card shows, with what they mean; `yamls/README.md` lists all.
DEFINITIONS = {
    "box_ap": "COCO's AP of boxes, mean over IoU 0.50 to 0.95, whatever their captions",
    "box_ap50": "the same at IoU 0.50",
    "box_ap75": "the same at IoU 0.75",
    "box_ar100": "COCO's average recall with 100 boxes per image",
    "category_ap": "COCO's AP over IoU 0.50 to 0.95, of boxes with the right category",
    "category_ap50": "the same at IoU 0.50",
    "densecap_map_meteor_lite2": "dense captioning mAP over IoU and caption similarity (meteor_lite2)",
    "caption_match": "share of matched boxes whose caption equals the true one",
    "refcoco_acc": "share of expressions whose best box has an IoU of 0.50 or more",
    "ece": "expected calibration error of the scores as evaluated, from 0.05 up",
    "best_f1": "F1 of boxes at IoU 0.50, at the threshold that is best on this set",
    "text_f1": "F1 at IoU 0.50 of the boxes in the language model's own answer",
    "retention_kl": "KL(base ∥ model) of an answer token of held-out chats, in nats; 0: the text path has not moved",
    "retention_loss": "cross-entropy of these tokens",
    "retention_base_loss": "the same of the base model",
}
USE = """from recipe import Detector

detector = Detector.from_pretrained("{name}")
print(detector("image.jpg").objects)"""


@dataclass(frozen=True)
class Facts:
    """What a card says next to the configuration.

    Attributes:
        name: Of the model: a name on the hub, else the folder's.
        scores: Of an evaluation, by name; {}: none is known.
        scored: Where they are from.
        steps: Of the training; None: unknown.
        processes: Of the training.
        peak_gib: Memory of the training at its peak, of the GPU or process that took most; None: unknown.
        license: An identifier of the hub; None: unknown.
        example: A drawing, and which image it shows; None: without.
    """

    name: str
    scores: Mapping[str, Any]
    scored: str = ""
    steps: int | None = None
    processes: int = 1
    peak_gib: float | None = None
    license: str | None = None
    example: tuple[Image.Image, str] | None = None


def write_card(folder: Path, config: RecipeConfig, facts: Facts, only_adapters: bool) -> None:
    """Write the card and its drawing into a new export."""
    base = config.model.pretrained_model_name_or_path
    data = ModelCardData(
        license=facts.license or "unknown",
        base_model=base if is_hub_name(base) else None,
        library_name="peft" if only_adapters else "transformers",
        pipeline_tag="image-text-to-text" if config.detection_head is None else "object-detection",
        tags=["qwen-vl", *([] if config.detection_head is None else ["object-detection", "detr"])],
    )
    if facts.example is not None:
        facts.example[0].save(folder / EXAMPLE_FILE)
    sections = [
        f"# {facts.name.split('/')[-1]}",
        _introduction(config, base),
        f"## Use\n\n```python\n{USE.format(name=facts.name)}\n```\n\n{_loading(only_adapters)}",
        *_example(facts),
        f"## Data\n\n{_data(config)}",
        f"## Scores\n\n{_scores(facts, (folder / CALIBRATION_FILE).is_file())}",
        f"## Training\n\n{_training(config, facts)}",
        _LIMITS,
        _LICENSES if facts.license is None else f"{_LICENSES}\n- This model: {facts.license}, as its exporter states.",
        f"## Files\n\n{_files(folder)}",
    ]
    card = ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + redact_text("\n\n".join(sections)) + "\n")
    card.save(folder / CARD_FILE)


def _introduction(config: RecipeConfig, base: str) -> str:
    what = "answers questions about images in text"
    if config.detection_head is not None:
        queries = config.detection_head.num_queries
        captions = "one of its classes" if config.evaluation.classes else "a generated caption"
        what = f"finds up to {queries} objects of an image, each with a box, a score and {captions}, and {what}"
    name = base if is_hub_name(base) else Path(base).name
    question = f'It was trained to be asked: "{config.prompt.detect}"'
    classes = ", ".join(config.evaluation.classes)
    return f"A model that {what}. Its base is {name}.\n\n{question}" + (f"\n\nClasses: {classes}." if classes else "")


def _loading(only_adapters: bool) -> str:
    if only_adapters:
        return (
            "`peft.PeftModel.from_pretrained` puts the adapters on the base model, which then gives the text only; the "
            "lines above give the boxes."
        )
    return (
        "transformers alone (`AutoModelForImageTextToText`, `AutoProcessor`) reads images and gives the text only; the "
        "lines above give the boxes. Servers of the text path read the folder as any Qwen-VL, such as "
        "`vllm serve FOLDER` (not run by us)."
    )


def _example(facts: Facts) -> list[str]:
    if facts.example is None:
        return []
    return [f"![{facts.example[1]}]({EXAMPLE_FILE})\n\n{facts.example[1]}, as this model predicts it."]


def _data(config: RecipeConfig) -> str:
    rows = ["| set | stream | samples | images | objects |", "| --- | --- | ---: | ---: | ---: |"]
    for name, loader in (("training", config.train_loader), ("evaluation", config.eval_loader)):
        for stream, keywords in (loader.streams or {}).items():
            counts = _counts(keywords)
            rows.append(
                f"| {name} | {stream} | " + " | ".join("unknown" if n is None else str(n) for n in counts) + " |"
            )
    text = "\n".join(rows)
    if config.val_fraction is not None:
        text += f"\n\n{config.val_fraction:.2g} of the training images are held out for evaluation."
    return (
        text + "\n\nWhat the images show, who made them and who may use them: not known to the recipe, please add it."
    )


def _counts(stream: Mapping[str, Any]) -> tuple[int | None, int | None, int | None]:
    """Return samples, images and objects of a stream's local folder; None if it is not there."""
    folder = Path(str(stream.get("local") or ""), str(stream.get("split") or ""))
    try:
        index = parse_index(folder / INDEX_FILE)
    except (OSError, ValueError):
        return None, None, None
    num_samples, images, objects = sum(shard["samples"] for shard in index["shards"]), 0, 0
    try:
        for sample in read_records(folder / RECORDS_FILE, index):
            views = sample.per_image() if sample.has_image else ()
            images += len(views)
            objects += sum(len(view.objects or ()) for view in views)
    except (OSError, DamagedRecordsError):
        return num_samples, None, None
    return num_samples, images, objects


def _scores(facts: Facts, calibrated: bool) -> str:
    shown = {name: facts.scores.get(name, UNDEFINED) for name in DEFINITIONS}
    shown = {name: value for name, value in shown.items() if value != UNDEFINED}
    text = "No evaluation is known to the export; give one with `--evaluation`."
    if shown:
        rows = ["| score | value | definition |", "| --- | ---: | --- |"]
        rows += [f"| {name} | {value:.3f} | {DEFINITIONS[name]} |" for name, value in shown.items()]
        text = f"On the evaluation sets above, {facts.scored}.\n\n" + "\n".join(rows)
    calibration = "The scores of boxes are not calibrated."
    if calibrated:
        calibration = (
            "The scores of boxes are calibrated, and their threshold is that of the best F1: "
            f"`{CALIBRATION_FILE}` has the values, already in `{CONFIG_FILE}`, and the reliability on held-out images."
        )
    return f"{text}\n\n{calibration}"


def _training(config: RecipeConfig, facts: Facts) -> str:
    frozen = ", ".join(sorted(frozen_groups(config))) or "none"
    launch = f"composer -n {facts.processes} recipe/train.py" if facts.processes > 1 else "composer recipe/train.py"
    versions = []
    for package in PACKAGES:
        try:
            versions.append(f"{package} {version(package)}")
        except ModuleNotFoundError:
            continue
    rates = {name: getattr(config.optimizer, f"lr_{name}") for name in GROUP_PATTERNS}
    trained = [f"{name} {rate:g}" for name, rate in rates.items() if rate and (config.lora or "lora" not in name)]
    lines = [
        f"- Command: `{launch} {CONFIG_FILE}`, the run's configuration, with the paths of your machine.",
        f"- Steps: {'unknown' if facts.steps is None else facts.steps}, each of "
        f"{config.train_loader.global_batch_size} samples or packs; seed {config.seed}.",
        f"- Learning rates: {', '.join(trained)}. Frozen parts of the base: {frozen}.",
        f"- Precision: weights {config.model.dtype}, computation {view_trainer(config).precision or 'amp_fp16'}.",
        f"- Exported with Python {platform.python_version()}, {', '.join(versions)}.",
        f"- Memory: {_memory(facts.peak_gib)}.",
    ]
    return "\n".join(lines)


def _memory(peak: float | None) -> str:
    if peak is None:
        return "unknown, as the training did not end or its metrics.jsonl is not next to the checkpoint"
    return f"at its peak {peak:.3g} GiB of the GPU (without one: of the process) that took most"


_LIMITS = """## Intended use and limits

- For images like those of its training set, at sizes within its pixel budget. Other images were not measured.
- Boxes, captions and answers can be wrong or missing. A score says how often only if it is calibrated, and only for
  images like those it was calibrated on. Captions can be fluent and wrong.
- It has the biases of its base and of its data. Do not use it to decide about people, or where nobody checks its
  errors."""

_LICENSES = """## Licences

- Base model: see its own card; its licence applies to this model too.
- Data: not known to the recipe, please add it.
- `license` at the top of this file: please set it once both are known."""


def _files(folder: Path) -> str:
    known = {
        HEAD_FILE: "detection head, memory and caption decoder",
        CONFIG_FILE: "the run's configuration: prompt, classes, pixel budget, calibrated scores",
        CALIBRATION_FILE: "how well the scores are calibrated",
        TRAINED_FILE: "SHA-256 of every tensor that the run trained, each found in this folder",
        "adapter_model.safetensors": "adapters, as peft reads them",
        "model.safetensors": "the language model",
        "model.safetensors.index.json": "the language model, in parts",
    }
    return "\n".join(f"- `{name}`: {what}" for name, what in known.items() if (folder / name).is_file())


def read_scores(path: Path) -> tuple[dict[str, Any], str | None]:
    """Return the scores of an `eval.json`, and what names its checkpoint; raise ValueError if it is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read {path}: {error}: give the run folder of recipe/eval.py") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} is not what recipe/eval.py writes: give its run folder")
    scores = {name: value for name, value in found.items() if isinstance(value, int | float)}
    return scores, found.get(EVALUATED)
