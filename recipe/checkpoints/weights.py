"""Read a trained model's weights from a Composer checkpoint; export a model to a folder that transformers reads.

An exported folder holds what `Qwen2_5_VLForConditionalGeneration.from_pretrained` and `AutoProcessor.from_pretrained`
read, the rest of the network (`HEAD_FILE`) and the run's configuration (`CONFIG_FILE`).
"""

import os
import pickle
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals
from torch.torch_version import TorchVersion

from recipe.config import CaptionDecoderConfig, RecipeConfig, lora_parts
from recipe.configure import load_config, save_config
from recipe.data.image import image_spec
from recipe.models.lora import merge_adapters, save_adapters
from recipe.models.network import AVERAGE, JointNetwork
from recipe.models.nf4 import nf4_layers
from recipe.records import PARTIAL
from recipe.redact import redact

HEAD_FILE = "detection_head.safetensors"
CONFIG_FILE = "recipe.yaml"
INDEX_OF_SHARDS = ".metadata"  # torch's
RUN_CONFIG_FILE = "config.yaml"
LANGUAGE_MODEL = "vlm."
EVALUATED = "checkpoint_sha256"  # in `eval.json`: `check.contents_sum` of what was evaluated

# What a genuine Composer checkpoint holds apart from tensors: random generator states and times, as Composer lists
# them (mosaicml/composer#3937). numpy's `_reconstruct` is private, and was moved between numpy 1 and 2.
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


_DTYPES = {"float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool"}
# All that the index of a sharded checkpoint consists of.
_METADATA_GLOBALS = {
    "collections": {"OrderedDict"},
    "pathlib": {"PosixPath"},
    "torch": {"Size", "device", *_DTYPES},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.distributed.checkpoint.metadata": {
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "TensorStorageMetadata",
        "TensorProperties",
        "_MEM_FORMAT_ENCODING",
    },
}


@contextmanager
def explaining(path: Path) -> Iterator[None]:
    """Raise ValueError that says why a file cannot be read as a checkpoint, for all that reading it may raise."""
    try:
        yield
    except (ValueError, RuntimeError, pickle.UnpicklingError, EOFError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path} is not a readable Composer checkpoint: {reason}: give another one") from error


def is_sharded(path: str | Path) -> bool:
    """Return whether a path is a checkpoint of a file per rank."""
    return Path(path, INDEX_OF_SHARDS).is_file()


def is_export(path: str | Path) -> bool:
    """Return whether a path is a folder from `export_model`, whole or of adapters."""
    return Path(path, HEAD_FILE).is_file()


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Return the weights of a Composer checkpoint by their names in `JointModel`; no code in the file is run.

    Those of a .pt file stay on disk until they are read; those of a sharded checkpoint are gathered in memory.

    Raises:
        ValueError: The file is missing, is not a Composer checkpoint, or holds classes that a checkpoint never needs.
    """
    path = Path(path)
    if is_sharded(path):
        return _gather_weights(path)
    if not path.is_file():
        raise ValueError(f"checkpoint {path} does not exist: give one from {{run_folder}}/checkpoints")
    with explaining(path), safe_globals(SAFE_GLOBALS):
        refuse_code(path)
        weights = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    for key in ("state", "model"):
        weights = weights.get(key) if isinstance(weights, dict) else None
    if not isinstance(weights, dict) or not all(isinstance(value, Tensor) for value in weights.values()):
        raise ValueError(f"{path} is not a Composer checkpoint: it holds no weights under state.model")
    return dict(weights)


def _gather_weights(folder: Path) -> dict[str, Tensor]:
    check_file(folder / INDEX_OF_SHARDS)
    reader, prefix = FileSystemReader(folder), "state.model."
    entries = reader.read_metadata().state_dict_metadata
    weights = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in entries.items()
        if name.startswith(prefix) and isinstance(entry, TensorStorageMetadata)
    }
    if not weights:
        raise ValueError(f"{folder} is not a Composer checkpoint: it holds no weights under state.model")
    with explaining(folder), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        load(weights, storage_reader=reader, no_dist=True)
    return {name.removeprefix(prefix): value for name, value in weights.items()}


def answering_weights(weights: Mapping[str, Tensor], prefix: str = "") -> dict[str, Tensor]:
    """Return the weights to predict with: each one's average if it has one, by the weight's name.

    `prefix` is in front of the names of a `JointNetwork`.
    """
    start = prefix + AVERAGE
    averages = {prefix + name.removeprefix(start): value for name, value in weights.items() if name.startswith(start)}
    return {name: averages.get(name, value) for name, value in weights.items() if not name.startswith(start)}


def refuse_code(path: Path) -> None:
    """Raise ValueError if unpickling a `torch.save` file would need more than a genuine checkpoint, without doing it.

    Call within `safe_globals(SAFE_GLOBALS)`, which cannot be nested. Raises RuntimeError if the archive is unreadable.
    """
    if foreign := get_unsafe_globals_in_checkpoint(str(path)):
        raise ValueError(f"it holds {', '.join(sorted(foreign))}, which could run code: refused")


def read_remote_weights(address: str) -> dict[str, Tensor]:
    """Fetch a Composer checkpoint from a store and return its weights, as `read_weights` does."""
    from composer.utils import get_file  # takes seconds to import, which local checkpoints can do without

    with TemporaryDirectory() as folder:
        path = Path(folder, "checkpoint.pt")
        try:
            get_file(address, str(path))
        except Exception as error:  # every store raises its own
            raise ValueError(f"cannot fetch {redact(address)}: {redact(str(error))}") from error
        return read_weights(path)  # the removed file stays readable while its tensors are mapped


def find_config(checkpoint: str | Path) -> RecipeConfig:
    """Return the configuration of the run that wrote a checkpoint or export; raise ValueError if none is found."""
    path = Path(checkpoint).absolute()
    if (path / CONFIG_FILE).is_file():
        return load_config(str(path / CONFIG_FILE))
    for folder in list(path.parents)[:3]:
        if (folder / RUN_CONFIG_FILE).is_file():
            return load_config(str(folder / RUN_CONFIG_FILE))
    raise ValueError(
        f"no {RUN_CONFIG_FILE} next to {checkpoint} or in the two folders above: give the run's with --config YAML"
    )


def find_base_model(name: str, checkpoint: str | Path) -> str:
    """Return the folder or hub name of a base model; the run may have named it relative to its working folder."""
    for home in Path(checkpoint).absolute().parents:
        if not Path(name).is_dir() and (home / name / "config.json").is_file():
            return str(home / name)
    return name


def trained_caption_length(decoder: CaptionDecoderConfig, checkpoint: str | None) -> int | None:
    """Return `max_caption_tokens`; if it is null, the checkpoint's, or raise ValueError if that is not found."""
    if decoder.max_caption_tokens is not None or checkpoint is None:
        return decoder.max_caption_tokens
    try:
        trained = find_config(checkpoint)
    except ValueError as error:
        raise ValueError(
            f"caption_decoder.max_caption_tokens is null, and what {redact(checkpoint)} was trained with is "
            f"unknown ({error}): give the number"
        ) from error
    return trained.caption_decoder.max_caption_tokens


def export_model(
    network: JointNetwork,
    processor: Any,
    config: RecipeConfig,
    folder: str | Path,
    only_adapters: bool = False,
    complete: Callable[[Path], None] | None = None,
) -> None:
    """Write a model as a folder that transformers loads, with the head's weights and the configuration next to it.

    If the model has averaged weights, those are written. The image processor gets the run's pixel budget, so that
    transformers shows the model images as training did. Adapters are merged, in the given network too, and the
    configuration written has `lora: null`.

    `only_adapters` writes them as a folder that peft loads on the base model instead of the whole language model.
    `complete` is called with the folder before it has its name: what it adds is there too, and if it raises nothing is.

    Raises:
        ValueError: The folder is not empty; there are no adapters, more than adapters was trained, or peft cannot
            describe them.
    """
    parts, whole = lora_parts(config), "export without --adapters, which writes the whole model"
    if only_adapters and not parts:
        raise ValueError(f"the run has no adapters, as lora is null: {whole}")
    for part in ("llm", "vision"):
        if only_adapters and part not in parts and getattr(config.optimizer, f"lr_{part}"):
            raise ValueError(f"optimizer.lr_{part} is not 0, so more than adapters was trained: {whole}")
    refuse_full(folder)
    folder = Path(folder)
    partial = folder.absolute().with_name(folder.absolute().name + PARTIAL)
    shutil.rmtree(partial, ignore_errors=True)
    try:
        _write_export(network, processor, config, partial, only_adapters)
        if complete is not None:
            complete(partial)
        _give_modes_of_umask(partial)
        partial.replace(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def refuse_full(folder: str | Path) -> None:
    """Raise ValueError if a folder holds anything: a card that its user has completed, for example."""
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} is a file or a folder that is not empty: give the export a folder of its own")


def _write_export(
    network: JointNetwork, processor: Any, config: RecipeConfig, folder: Path, only_adapters: bool
) -> None:
    hf_model = network.vlm.hf_model
    if only_adapters:
        folder.mkdir(parents=True)
        with_merger = config.optimizer.lr_merger > 0
        save_adapters(hf_model, lora_parts(config), str(hf_model.name_or_path), folder, with_merger)
    else:
        if nf4_layers(hf_model):
            raise ValueError("the language model is stored in nf4: load it with in_nf4=False to export it")
        merge_adapters(hf_model)
        config = replace(config, lora=None)
        hf_model.save_pretrained(folder)
    spec, processor = image_spec(processor.image_processor, config.image), deepcopy(processor)
    images = processor.image_processor
    images.min_pixels, images.max_pixels = spec.min_pixels, spec.max_pixels
    images.size = {"shortest_edge": spec.min_pixels, "longest_edge": spec.max_pixels}
    processor.save_pretrained(folder)
    weights = answering_weights(network.state_dict())
    head = {name: value.contiguous() for name, value in weights.items() if not name.startswith(LANGUAGE_MODEL)}
    save_file(head, folder / HEAD_FILE, metadata={"format": "pt"})
    save_config(config, folder / CONFIG_FILE, network.max_caption_tokens)


def _give_modes_of_umask(folder: Path) -> None:
    mask = os.umask(0)
    os.umask(mask)
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(0o666 & ~mask)  # safetensors' own is 0600


def fill(module: nn.Module, weights: Mapping[str, Tensor], source: Path) -> None:
    """Load all weights of a module; raise ValueError with some of the names or shapes that differ.

    Averages may be missing: they begin as the weights.
    """
    expected = module.state_dict()
    if not any(AVERAGE in name for name in weights):
        expected = {name: value for name, value in expected.items() if AVERAGE not in name}
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
    found = [f"{what} {some(names)}" for what, names in problems.items() if names]
    if found:
        raise ValueError(
            f"{source} does not fit the model: it {'; it '.join(found)}: give the configuration it was trained with, "
            "or read it by the version of the recipe that wrote it"
        )
    module.load_state_dict(weights)


def some(names: list[str], shown: int = 3) -> str:
    """Return the first names and the number of the rest."""
    rest = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + rest


def check_file(path: str | Path, specs: list[tuple[int, int]] | None = None) -> bool:
    """Return True, or raise ValueError if a checkpoint's file holds what could run code or is damaged.

    Composer calls it with every file before reading it.

    Args:
        path: Of a checkpoint, a shard or an index of shards.
        specs: Of a shard: offsets and lengths of what will be read.
    """
    path = Path(path).resolve()
    if path.name == INDEX_OF_SHARDS:
        try:
            with path.open("rb") as file:
                _Metadata(file).load()
        except (pickle.UnpicklingError, EOFError, AttributeError, ImportError, IndexError, ValueError) as error:
            raise ValueError(f"{path} is not an index of a sharded checkpoint: {error}: give another one") from error
    elif specs is None:
        with explaining(path):
            refuse_code(path)
    return True


class _Metadata(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name not in _METADATA_GLOBALS.get(module, set()):
            raise pickle.UnpicklingError(f"it holds {module}.{name}, which could run code: refused")
        return super().find_class(module, name)
