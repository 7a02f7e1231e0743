"""A trained model out of a Composer checkpoint, and into a folder that transformers reads; and back.

An exported folder holds what `Qwen2_5_VLForConditionalGeneration.from_pretrained` and `AutoProcessor.from_pretrained`
read, and beside it the rest of the network (`HEAD_FILE`) and the run's configuration (`CONFIG_FILE`).
"""

import pickle
from collections.abc import Mapping
from copy import deepcopy
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals
from torch.torch_version import TorchVersion

from recipe.config import CaptionDecoderConfig, ImageConfig, RecipeConfig
from recipe.configure import load_config, save_config
from recipe.data.image import image_spec
from recipe.models.network import AVERAGE, JointNetwork
from recipe.redact import redact

HEAD_FILE = "detection_head.safetensors"
CONFIG_FILE = "recipe.yaml"
RUN_CONFIG_FILE = "config.yaml"
LANGUAGE_MODEL = "vlm."


# What a genuine checkpoint of Composer holds beside tensors, after Composer's own list (mosaicml/composer#3937): random
# generator states and times. numpy's `_reconstruct` is private, and was moved between numpy 1 and 2.
_RECONSTRUCT: Any = np.empty(0).__reduce__()[0]
SAFE_GLOBALS: list[Any] = [
    timedelta,
    TorchVersion,
    np.ndarray,
    np.dtype,
    *(kind for kind in vars(np.dtypes).values() if isinstance(kind, type) and issubclass(kind, np.dtype)),
    (_RECONSTRUCT, "numpy._core.multiarray._reconstruct"),
    (_RECONSTRUCT, "numpy.core.multiarray._reconstruct"),
]


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """The model's weights in a Composer checkpoint, by their names in `JointModel`; no code in the file is run.

    The tensors stay on disk until they are read.

    Raises:
        ValueError: There is no such file, it is no Composer checkpoint, or it holds classes that none needs.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"checkpoint {path} does not exist: give a .pt file from {{run_folder}}/checkpoints")
    try:
        with safe_globals(SAFE_GLOBALS):
            refuse_code(path)
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (ValueError, RuntimeError, pickle.UnpicklingError, EOFError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path} is no readable Composer checkpoint: {reason}") from error
    state = loaded.get("state") if isinstance(loaded, dict) else None
    weights = state.get("model") if isinstance(state, dict) else None
    if not isinstance(weights, dict) or not all(isinstance(value, Tensor) for value in weights.values()):
        raise ValueError(f"{path} is no Composer checkpoint: it holds no weights under state.model")
    return dict(weights)


def answering_weights(weights: Mapping[str, Tensor], prefix: str = "") -> dict[str, Tensor]:
    """The weights that answers are made with: of those that have an average, the average, under their names.

    Args:
        weights: By their names in a model.
        prefix: Of the names in a `JointNetwork`.
    """
    start = prefix + AVERAGE
    averages = {prefix + name.removeprefix(start): value for name, value in weights.items() if name.startswith(start)}
    return {name: averages.get(name, value) for name, value in weights.items() if not name.startswith(start)}


def refuse_code(path: Path) -> None:
    """Looks at what a file of `torch.save` would need to be unpickled, without unpickling it.

    To be called within `safe_globals(SAFE_GLOBALS)`, which cannot be nested.

    Raises:
        ValueError: It needs more than a genuine checkpoint of Composer.
        RuntimeError: It is no readable archive.
    """
    foreign = get_unsafe_globals_in_checkpoint(str(path))
    if foreign:
        raise ValueError(f"it holds {', '.join(sorted(foreign))}, which could run code: refused")


def read_remote_weights(address: str) -> dict[str, Tensor]:
    """Fetch a Composer checkpoint from a store and return its weights, as `read_weights` does."""
    from composer.utils import get_file  # takes seconds to import, which local checkpoints can do without

    with TemporaryDirectory() as folder:
        path = Path(folder, "checkpoint.pt")
        try:
            get_file(address, str(path))
        except Exception as error:  # each store has its own
            raise ValueError(f"cannot fetch {redact(address)}: {redact(str(error))}") from error
        return read_weights(path)  # the system keeps the removed file for as long as its tensors are read


def find_config(checkpoint: str | Path) -> RecipeConfig:
    """Return the configuration of the run that wrote a checkpoint: next to it, or in one of the two folders above.

    Raises:
        ValueError: There is none.
    """
    path = Path(checkpoint).absolute()
    for folder in list(path.parents)[:3]:
        if (folder / RUN_CONFIG_FILE).is_file():
            return load_config(str(folder / RUN_CONFIG_FILE))
    raise ValueError(
        f"no {RUN_CONFIG_FILE} next to {checkpoint} or in the two folders above: give the run's with --config YAML"
    )


def find_base_model(name: str, checkpoint: str | Path) -> str:
    """Return the folder or hub name of a base model; the run may have named it relative to where it was started."""
    for home in Path(checkpoint).absolute().parents:
        if not Path(name).is_dir() and (home / name / "config.json").is_file():
            return str(home / name)
    return name


def trained_caption_length(decoder: CaptionDecoderConfig, checkpoint: str | None) -> int | None:
    """Return `max_caption_tokens`; if it is null, that of the run that wrote the checkpoint.

    Raises:
        ValueError: The run's configuration is not there.
    """
    if decoder.max_caption_tokens is not None or checkpoint is None:
        return decoder.max_caption_tokens
    exported = Path(checkpoint, CONFIG_FILE)
    try:
        trained = load_config(str(exported)) if exported.is_file() else find_config(checkpoint)
    except ValueError as error:
        raise ValueError(
            f"caption_decoder.max_caption_tokens is null, and what {redact(checkpoint)} was trained with is not "
            f"known ({error}): give the number"
        ) from error
    return trained.caption_decoder.max_caption_tokens


def export_model(network: JointNetwork, processor: Any, config: RecipeConfig, folder: str | Path) -> None:
    """Write a model as a folder that transformers loads, with the head's weights and the configuration next to it.

    If the model has averaged weights, those are written. The image processor gets the run's pixel budget, so that
    transformers shows the model images as training did.

    Raises:
        ValueError: The folder is not empty.
    """
    folder = Path(folder)
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise ValueError(f"{folder} is a file or a folder that is not empty: give the export a folder of its own")
    network.vlm.hf_model.save_pretrained(folder)
    _with_pixel_budget(processor, config.image).save_pretrained(folder)
    weights = answering_weights(network.state_dict())
    head = {name: value.contiguous() for name, value in weights.items() if not name.startswith(LANGUAGE_MODEL)}
    save_file(head, folder / HEAD_FILE, metadata={"format": "pt"})
    # Last: only a whole export has one.
    save_config(config, folder / CONFIG_FILE, network.caption_decoder.max_caption_tokens)


def fill(module: nn.Module, weights: Mapping[str, Tensor], source: Path) -> None:
    """Loads all weights of a module.

    Raises:
        ValueError: Names or shapes differ; some of them are told.
    """
    expected = module.state_dict()
    differing = [
        f"{name} {tuple(weights[name].shape)} instead of {tuple(value.shape)}"
        for name, value in expected.items()
        if name in weights and weights[name].shape != value.shape
    ]
    problems = {
        "lacks": [name for name in expected if name not in weights],
        "has beyond the model": [name for name in weights if name not in expected],
        "has of another shape": differing,
    }
    told = [f"{what} {_some(names)}" for what, names in problems.items() if names]
    if told:
        raise ValueError(
            f"{source} does not fit the model: it {'; it '.join(told)}: give the configuration it was trained with"
        )
    module.load_state_dict(weights)


def _some(names: list[str], shown: int = 3) -> str:
    rest = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + rest


def _with_pixel_budget(processor: Any, image: ImageConfig) -> Any:
    spec = image_spec(processor.image_processor, image)
    processor = deepcopy(processor)
    image_processor = processor.image_processor
    image_processor.min_pixels, image_processor.max_pixels = spec.min_pixels, spec.max_pixels
    image_processor.size = {"shortest_edge": spec.min_pixels, "longest_edge": spec.max_pixels}
    return processor
