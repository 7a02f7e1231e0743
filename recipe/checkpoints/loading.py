"""Load checkpoints without running any code that they hold."""

import os
import pickle
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import composer.algorithms
from torch.serialization import safe_globals

from recipe.checkpoint import SAFE_GLOBALS, refuse_code

# Composer would make the algorithms that a checkpoint names, evaluating a text of it; none it can name is wanted.
EXCLUDED_ALGORITHMS: Sequence[str] = dir(composer.algorithms)

# All that the index of a sharded checkpoint is made of.
_METADATA_GLOBALS = {
    ("collections", "OrderedDict"),
    ("torch", "Size"),
    ("torch", "device"),
    ("torch.serialization", "_get_layout"),
    ("torch.distributed.checkpoint.metadata", "Metadata"),
    ("torch.distributed.checkpoint.metadata", "MetadataIndex"),
    ("torch.distributed.checkpoint.metadata", "StorageMeta"),
    ("torch.distributed.checkpoint.metadata", "BytesStorageMetadata"),
    ("torch.distributed.checkpoint.metadata", "ChunkStorageMetadata"),
    ("torch.distributed.checkpoint.metadata", "TensorStorageMetadata"),
    ("torch.distributed.checkpoint.metadata", "TensorProperties"),
    ("torch.distributed.checkpoint.metadata", "_MEM_FORMAT_ENCODING"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("pathlib", "PosixPath"),
}


@contextmanager
def safe_loading() -> Iterator[None]:
    """Within it, whatever Composer and torch load is checked by `check_file` and read as plain data.

    Both are asked through switches of their own; a variable that switches the checks off is not heard.
    """
    switches = {
        "CHECKPOINT_VALIDATION_FUNCTION": f"{__name__}.check_file",
        "TORCH_FORCE_WEIGHTS_ONLY_LOAD": "1",
        "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "0",
    }
    before = dict(os.environ)
    os.environ.update(switches)
    try:
        with safe_globals(SAFE_GLOBALS):
            yield
    finally:
        for name in switches:
            os.environ.pop(name)
            if name in before:
                os.environ[name] = before[name]


def check_file(path: str | Path, specs: list[tuple[int, int]] | None = None) -> bool:
    """Composer's hook: called with every file of a checkpoint before it is read.

    Args:
        path: Of a checkpoint, a shard or an index of shards.
        specs: Of a shard, offsets and lengths of what will be read.

    Raises:
        ValueError: The file holds what could run code, or is no checkpoint.
    """
    path = Path(path).resolve()
    if path.name == ".metadata":
        _check_metadata(path)
    elif specs is None:
        try:
            refuse_code(path)
        except (ValueError, RuntimeError, pickle.UnpicklingError, EOFError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise ValueError(f"{path} is no readable Composer checkpoint: {reason}: give another one") from error
    return True


class _Metadata(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _METADATA_GLOBALS and not (module == "torch" and name in _DTYPES):
            raise pickle.UnpicklingError(f"it holds {module}.{name}, which could run code: refused")
        return super().find_class(module, name)


_DTYPES = ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")


def _check_metadata(path: Path) -> None:
    try:
        with path.open("rb") as file:
            _Metadata(file).load()
    except (pickle.UnpicklingError, EOFError, AttributeError, ImportError, IndexError, ValueError) as error:
        raise ValueError(f"{path} is no index of a sharded checkpoint: {error}: give another one") from error
