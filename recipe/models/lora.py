"""Low-rank adapters (LoRA, DoRA) on the linear layers of a frozen trunk, by peft (`pip install -e '.[lora]'`).

peft puts a layer of its own in the place of each adapted one: `q_proj.weight` becomes `q_proj.base_layer.weight`, and
the adapter is `q_proj.lora_A.default.weight`, `q_proj.lora_B.default.weight` and, with DoRA, the lengths of the rows,
`q_proj.lora_magnitude_vector.default.weight`. The model's class and all other names stay.

Token embedding and output matrix get no adapters: the losses and the caption decoder read the weights themselves, and
peft 0.21 adds the change twice to a matrix that is tied.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel

from recipe.config import ConfigError, LoraPartConfig
from recipe.families import Family, family_of

# peft is imported inside functions: it takes a second, and only runs with adapters need it.
if TYPE_CHECKING:
    from peft import LoraConfig

CONFIG_FILE = "adapter_config.json"  # peft's names
WEIGHTS_FILE = "adapter_model.safetensors"
TRUNK = {"llm": "model.language_model", "vision": "model.visual"}  # the submodule of each part
BLOCKS = {"llm": "layers", "vision": "blocks"}  # and its list of blocks


def check_peft() -> None:
    """Raise ConfigError if peft is not installed."""
    if find_spec("peft") is None:
        raise ConfigError("lora needs peft, which is not installed: pip install -e '.[lora]', or set lora=null")


def add_adapters(hf_model: PreTrainedModel, parts: Mapping[str, LoraPartConfig], dtype: torch.dtype) -> None:
    """Put adapters of `dtype` on the parts, in place; they compute 0 at first. The base weights keep their dtype.

    Raises:
        ConfigError: peft is not installed.
    """
    if not parts:
        return
    check_peft()
    from peft import inject_adapter_in_model

    for part, config in parts.items():
        trunk = hf_model.get_submodule(TRUNK[part])
        trained = [(parameter, parameter.requires_grad) for parameter in trunk.parameters()]
        inject_adapter_in_model(peft_config({part: config}, family_of(hf_model.config)), trunk)
        for parameter, is_trained in trained:
            parameter.requires_grad_(is_trained)  # peft freezes all, mergers too; here the rates of groups decide
    for name, parameter in adapters(hf_model).items():
        parameter.data = parameter.data.to(dtype)
        if "lora_magnitude_vector" in name:  # peft rounds the lengths of rows to the base's dtype, and the start is off
            base: Any = hf_model.get_submodule(name.partition(".lora_")[0] + ".base_layer")
            parameter.data = torch.linalg.vector_norm(base.weight.detach().to(dtype), dim=1)


def peft_config(parts: Mapping[str, LoraPartConfig], family: Family, base: str | None = None) -> "LoraConfig":
    """Return peft's configuration of one or both parts on the model that `base` names.

    Raises:
        ValueError: Only one part has DoRA, which peft's configuration cannot say.
    """
    from peft import LoraConfig

    (_, first), *others = parts.items()
    if any(other.dora != first.dora for _, other in others):
        raise ValueError(
            "lora.llm.dora and lora.vision.dora differ, but a folder of peft has one `use_dora` for all adapters: "
            "export without --adapters, which merges them"
        )
    patterns = [
        rf"(.*\.)?{BLOCKS[part]}\.\d+\.(.*\.)?({'|'.join(config.targets or family.lora_targets[part])})"
        for part, config in parts.items()
    ]
    return LoraConfig(
        base_model_name_or_path=base,
        r=first.rank,
        lora_alpha=first.alpha,  # pyright: ignore[reportArgumentType] - peft divides it, so it may be a fraction
        lora_dropout=first.dropout,  # of both parts; only training drops anything
        use_dora=first.dora,
        target_modules="|".join(patterns),
        rank_pattern={rf"{BLOCKS[part]}\..*": config.rank for part, config in others},
        alpha_pattern={rf"{BLOCKS[part]}\..*": config.alpha for part, config in others},
    )


def adapters(hf_model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that belong to adapters, by name."""
    return {name: parameter for name, parameter in hf_model.named_parameters() if ".lora_" in name}


def adapter_layers(module: nn.Module) -> list[tuple[nn.Linear, nn.Linear, bool]]:
    """Return the two matrices of every adapter, into and out of its rank, and whether it has DoRA."""
    return [
        (layer.lora_A["default"], layer.lora_B["default"], len(layer.lora_magnitude_vector) > 0)  # pyright: ignore
        for layer in module.modules()
        if hasattr(layer, "lora_A")
    ]


@contextmanager
def without_adapters(hf_model: nn.Module) -> Iterator[None]:
    """Let the model compute as its base does, without gradients of adapters; then adapters are as they were."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    trained = [(parameter, parameter.requires_grad) for parameter in adapters(hf_model).values()]
    layers = [module for module in hf_model.modules() if isinstance(module, BaseTunerLayer)]
    try:
        for layer in layers:
            layer.enable_adapters(False)
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)
        for parameter, is_trained in trained:
            parameter.requires_grad_(is_trained)  # peft thaws all; here the stages decide


@torch.no_grad()
def merge_adapters(hf_model: nn.Module) -> None:
    """Add every adapter to its weight and put the plain layers back, in place.

    The sum is rounded to the weight's dtype: in bfloat16 that loses most of a small adapter's digits.
    """
    if not adapters(hf_model):
        return
    from peft.tuners.lora import LoraLayer

    for name, layer in [*hf_model.named_modules()]:
        if isinstance(layer, LoraLayer):
            merging: Any = layer
            merging.merge()
            parent, _, child = name.rpartition(".")
            setattr(hf_model.get_submodule(parent), child, layer.get_base_layer())
    for trunk in TRUNK.values():
        vars(hf_model.get_submodule(trunk)).pop("peft_config", None)


def _mergers(hf_model: nn.Module) -> list[str]:
    """Return the names of the vision tower's mergers, each of one list alone, as peft saves no lists."""
    visual, found = hf_model.get_submodule(TRUNK["vision"]), list[str]()
    for name in family_of(hf_model.config).mergers:
        part = visual.get_submodule(name)
        found += [f"{name}.{place}" for place in range(len(part))] if isinstance(part, nn.ModuleList) else [name]
    return found


def _saved_parameters(hf_model: nn.Module, with_merger: bool) -> dict[str, nn.Parameter]:
    """Return adapters, and the mergers if they are trained, by their names in a folder of peft."""
    saved: dict[str, nn.Parameter] = {}
    mergers = tuple(f"{TRUNK['vision']}.{name}." for name in _mergers(hf_model))
    for name, parameter in hf_model.named_parameters():
        if ".lora_" in name or (with_merger and name.startswith(mergers)):
            name = f"base_model.model.{name.replace('.default', '')}"
            saved[name.removesuffix(".weight") if "lora_magnitude_vector" in name else name] = parameter
    return saved


def save_adapters(
    hf_model: nn.Module, parts: Mapping[str, LoraPartConfig], base: str, folder: Path, with_merger: bool
) -> None:
    """Write the adapters as `peft.PeftModel.from_pretrained` reads them, on the model that `base` names.

    `with_merger`: with the mergers as a whole, which were trained too.

    Raises:
        ValueError: peft cannot describe them; see `peft_config`.
    """
    config = peft_config(parts, family_of(hf_model.config), base)
    config.inference_mode = True
    config.modules_to_save = _mergers(hf_model) if with_merger else None
    config.save_pretrained(str(folder))
    saved = _saved_parameters(hf_model, with_merger).items()
    weights = {name: parameter.detach().contiguous() for name, parameter in saved}
    save_file(weights, folder / WEIGHTS_FILE, metadata={"format": "pt"})


def read_base(folder: str | Path) -> str | None:
    """Return the base model that a folder of adapters names; None if it is not one."""
    return _read_config(folder)["base_model_name_or_path"] if Path(folder, CONFIG_FILE).is_file() else None


def holds_only_adapters(folder: str | Path) -> bool:
    """Return whether a folder holds adapters, and no merger that was trained with them."""
    return read_base(folder) is not None and not _read_config(folder)["modules_to_save"]


def _read_config(folder: str | Path) -> dict[str, Any]:
    return json.loads(Path(folder, CONFIG_FILE).read_text(encoding="utf-8"))


@torch.no_grad()
def load_adapters(hf_model: nn.Module, folder: Path) -> None:
    """Load the adapters of a folder, and its mergers; raise ValueError unless it holds exactly those of the model."""
    weights = load_file(folder / WEIGHTS_FILE)
    expected = _saved_parameters(hf_model, with_merger=bool(_read_config(folder)["modules_to_save"]))
    both = weights.keys() & expected.keys()
    wrong = {
        "lacks": expected.keys() - both,
        "has beyond the model": weights.keys() - both,
        "has of another shape": {name for name in both if weights[name].shape != expected[name].shape},
    }
    found = [f"{what} {min(names)} ({len(names)} in all)" for what, names in wrong.items() if names]
    if found:
        raise ValueError(
            f"{folder / WEIGHTS_FILE} does not fit the adapters that `lora` describes: it {'; it '.join(found)}: give "
            "the configuration they were trained with"
        )
    for name, parameter in expected.items():
        parameter.copy_(weights[name])
