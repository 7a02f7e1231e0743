#!/usr/bin/env bash
# FSDP2Config(device_mesh=...) of Composer takes a mesh of two dimensions, and trains on one of one dimension.
#
# Versions: mosaicml 0.32.1, with the torch 2.7 that it installs.
# Valid use: FSDP2Config's docstring: "For 2D mesh, parameters are sharded across the 1st dimension and replicated
#   across the 0th dimension (HSDP)". Four processes, a mesh of 2 x 2, one Trainer.
# Seen: the Trainer made, the config holds a mesh of four ranks in a row, and every weight is sharded over all four:
#   `State.__init__` replaces the mesh by one that it makes of `data_parallel_shard_degree` and
#   `data_parallel_replicate_degree`, which are read-only properties of FSDP2Config: -1 and None. There is no warning.
# Whom it hurts: a job on several machines that is meant to gather weights within a machine gathers them across all, in
#   every layer, and is as slow as the network. The numbers are right, so nothing shows it but the speed.
# Remedy: a subclass of FSDP2Config that has the two degrees as fields; State then makes the right mesh itself.
# Exits with 0 while this holds, with 1 once it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --disable-pip-version-check --quiet 'mosaicml==0.32.1' 'setuptools<81'
cd "$folder"
cat > seen.py <<'PY'
import logging
import os
import warnings

import torch
from composer import ComposerModel, Trainer
from composer.utils.parallelism import FSDP2Config
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh

warnings.filterwarnings("ignore")
logging.disable(logging.WARNING)


class Small(ComposerModel):
    """One layer, in the child module that Composer shards."""

    def __init__(self):
        super().__init__()
        self.model = torch.nn.Sequential(torch.nn.Linear(8, 8))

    def forward(self, batch):
        return self.model(batch)

    def loss(self, outputs, batch):
        return outputs.square().mean()


distributed.init_process_group("gloo")
config = FSDP2Config(device_mesh=init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard")))
asked = tuple(config.device_mesh.shape)
model = Small()
Trainer(model=model, parallelism_config={"fsdp": config}, device="cpu", progress_bar=False)
weight = next(model.parameters())
if distributed.get_rank() == 0:
    print(f"asked for a mesh of {asked}; got {tuple(config.device_mesh.shape)}; a weight is {weight.placements}")
    print(f"rank 0 holds {weight.to_local().shape[0]} of its 8 rows; 4 were asked for")
has_changed = tuple(weight.device_mesh.shape) == (2, 2)
distributed.barrier()
os._exit(int(has_changed))
PY
CUDA_VISIBLE_DEVICES="" OMP_NUM_THREADS=1 "$folder/venv/bin/python" -m torch.distributed.run --nproc-per-node 4 seen.py
