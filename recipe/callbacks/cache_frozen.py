"""Open the cache of a trunk that never learns, and report on it."""

import hashlib
import logging
import re
import uuid
from pathlib import Path

from composer import Callback
from composer.core import State
from composer.loggers import Logger
from composer.utils import dist
from torch.utils.data import DataLoader

from recipe.algorithms.staged_freezing import bit_sums
from recipe.callbacks.measures import joint_model
from recipe.config import CacheFrozenConfig, ConfigError
from recipe.data.stream import PackStream
from recipe.families import vision_sizes
from recipe.models.frozen_cache import FrozenCache, bytes_of, free_bytes
from recipe.models.network import JointNetwork
from recipe.optim.groups import local
from recipe.upstream.agreement import agree

log = logging.getLogger(__name__)

_UNITS = {"b": 1, "kb": 1e3, "mb": 1e6, "gb": 1e9, "tb": 1e12}
GB = 1e9


def parse_size(text: str) -> int | None:
    """Return the bytes of a size such as 50gb or 1.5 TB; None if it is not one."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]?b)", text.strip().lower())
    return int(float(found[1]) * _UNITS[found[2]]) if found else None


def trunk_fingerprint(network: JointNetwork) -> str:
    """Return 16 hex digits of the trunk's names, shapes and bits; reads all its weights once."""
    entries = {**dict(network.vlm.named_parameters()), **dict(network.vlm.named_buffers())}
    content = hashlib.sha256()
    for (name, tensor), bits in zip(entries.items(), bit_sums(list(entries.values())).tolist(), strict=True):
        content.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} {bits};".encode())
    return content.hexdigest()[:16]


class CacheFrozen(Callback):
    """Lets training read from disk what the head reads of the trunk, from the second epoch on.

    Logged per step: `cache/read_share`, the share of this run's microbatches on rank 0 for which the trunk did not run.

    Args:
        config: Folder and size.
    """

    def __init__(self, config: CacheFrozenConfig):
        self.folder = Path(config.local)
        self.size_limit = config.size_limit

    def fit_start(self, state: State, logger: Logger) -> None:
        """Open the cache once the weights are loaded; raise on all ranks if the folder cannot be written."""
        network = joint_model(state).model
        limit = parse_size(self.size_limit)
        assert limit is not None, "recipe.checks has judged it"
        there = free = 0
        mark, error = self.folder / f"rank{dist.get_global_rank()}.{uuid.uuid4().hex}", None
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            mark.touch()
            there, free = bytes_of(self.folder), free_bytes(self.folder)
        except OSError as raised:
            error = ConfigError(f"cache_frozen.local {self.folder} cannot be used ({raised}): give another folder")
        agree(error)
        # Ranks that see each other's marks share the folder, and so its limit.
        sharing = sum((self.folder / name).exists() for name in dist.all_gather_object(mark.name))
        dist.barrier()
        mark.unlink(missing_ok=True)
        trunk = f"{trunk_fingerprint(network)} {network.vlm.hf_model.dtype} {state.precision.value}"
        base = f"{trunk} {'patches' if network.memory.pyramid is not None else ''}"
        network.cache = FrozenCache(self.folder, base, max(0, limit - there) // max(1, sharing))
        if dist.get_global_rank() == 0:
            self._log_size(state, network, limit, there, free)

    def batch_end(self, state: State, logger: Logger) -> None:
        """Log how often the trunk did not have to run."""
        cache = joint_model(state).model.cache
        if cache is not None:
            logger.log_metrics({"cache/read_share": cache.num_read / max(1, cache.num_read + cache.num_computed)})

    def fit_end(self, state: State, logger: Logger) -> None:
        """Close the cache: what the model does next is not training."""
        joint_model(state).model.cache = None

    def _log_size(self, state: State, network: JointNetwork, limit: int, there: int, free: int) -> None:
        loader = state.train_dataloader
        assert isinstance(loader, DataLoader) and isinstance(loader.dataset, PackStream)
        num_images, prompt_tokens, patches = loader.dataset.prompt_sizes()
        vision = network.vlm.hf_model.config.vision_config
        width = network.vlm.text_config.hidden_size
        numbers = (prompt_tokens + patches / vision.spatial_merge_size**2) * width
        if network.memory.pyramid is not None:
            numbers += patches * vision_sizes(network.vlm.hf_model.config)[0]
        needed = numbers * local(next(network.vlm.parameters())).element_size()
        log.info(
            "cache_frozen: %d images need about %.3g GB in %s, which holds %.3g of at most %.3g GB; %.3g GB are free",
            *(num_images, needed / GB, self.folder, there / GB, limit / GB, free / GB),
        )
        if needed > min(limit, there + free):
            log.warning(
                "cache_frozen holds only a part of the images, and the trunk runs for every microbatch with another: "
                "raise cache_frozen.size_limit to %.0fgb or more, or lower image.max_pixels",
                needed / GB + 1,
            )
