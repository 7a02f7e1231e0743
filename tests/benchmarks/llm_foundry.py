"""Run LLM Foundry's packer on lengths alone: its own `packing.py`, loaded from a checkout, with its automatic ratio.

The ratio is searched in steps of 0.1, finer than its default of about 2, which favours it.
"""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

DEVICE_BATCH_SIZE = 8
NUM_RATIOS = 400
MOST_PROFILED = 8000  # examples; each is padded to the longest, as the packer wants


def load_packing(checkout: Path) -> ModuleType:
    """Load `llmfoundry/data/packing.py`, without the package around it (whose pins are others than ours)."""
    consts = ModuleType("llmfoundry.utils.consts")
    vars(consts)["CROSS_ENTROPY_IGNORE_INDEX"] = -100
    for name in ("llmfoundry", "llmfoundry.utils", "llmfoundry.data"):
        sys.modules[name] = ModuleType(name)
    sys.modules |= {consts.__name__: consts, "llmfoundry.data.dataloader": ModuleType("llmfoundry.data.dataloader")}
    path = checkout / "llmfoundry" / "data" / "packing.py"
    spec = importlib.util.spec_from_file_location("llm_foundry_packing", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def foundry_fill(packing: Any, lengths: NDArray[np.int64], max_tokens: int) -> float:
    """Return how full the packs are that it fills; what it keeps to the end is not counted against it.

    The packing ratio is the largest that left nothing over in its own profile of the first examples.
    """

    def build_dataloader(config: Any, tokenizer: Any, num_examples: int) -> Any:
        profiled = torch.from_numpy(lengths[: min(num_examples, MOST_PROFILED)])
        mask = torch.arange(int(profiled.max())) < profiled[:, None]
        batch = {"input_ids": mask.to(torch.uint8), "attention_mask": mask.to(torch.uint8)}
        return SimpleNamespace(dataloader=[batch])

    vars(sys.modules["llmfoundry.data.dataloader"])["build_dataloader"] = build_dataloader
    config: Any = {"dataset": {"max_seq_len": max_tokens}}
    ratio = packing.auto_packing_ratio(config, None, DEVICE_BATCH_SIZE, NUM_RATIOS)
    packer = packing.BinPackCollator(lambda batch: batch, DEVICE_BATCH_SIZE, max_tokens, 0, "left", is_profiling=True)
    raw_batch_size = int(ratio * DEVICE_BATCH_SIZE)
    sizes = lengths.tolist()
    for start in range(0, len(sizes) - raw_batch_size + 1, raw_batch_size):
        batch = sizes[start : start + raw_batch_size]
        packer._pack_trimmed_examples([{} for _ in batch], batch)
    return packer.efficiency
