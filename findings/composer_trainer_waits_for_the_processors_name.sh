#!/usr/bin/env bash
# Building a Composer Trainer starts a process that sleeps a second to measure the clock, for a name that nobody reads.
#
# Versions: mosaicml 0.32.1, with the py-cpuinfo 9.0.0 and torch 2.7 that it installs.
# Valid use: `Trainer(model=..., train_dataloader=..., max_duration=...)`, on x86 Linux.
# Seen: `Trainer.__init__` calls `get_composer_env_dict()`, which asks py-cpuinfo for the processor's name. py-cpuinfo
#   starts a Python process; that one reads the name from the system at once, and then sleeps a second between two
#   readings of the clock. Of all that is collected the Trainer logs Composer's version and commit; the name is logged
#   nowhere. The wait was 1.6 s; each rank builds a Trainer, so each waits, at every start.
# Whom it hurts: whoever starts often: tests, resumed jobs, short evaluations.
# Remedy: replace `composer.utils.collect_env.get_cpu_model` before a Trainer is built.
# Exits with 0 while this holds, with 1 once it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --disable-pip-version-check --quiet 'mosaicml==0.32.1' 'py-cpuinfo==9.0.0' \
    'setuptools<81'
cd "$folder"
cat > seen.py <<'PY'
import logging
import subprocess
import time
import warnings

import composer
import torch
from composer import ComposerModel, Trainer
from composer.loggers import LoggerDestination
from torch.utils.data import DataLoader

warnings.filterwarnings("ignore")
logging.disable(logging.WARNING)
waits = {}  # seconds by command
logged = {}
communicate = subprocess.Popen.communicate


def timed(self, *args, **kwargs):
    start = time.perf_counter()
    try:
        return communicate(self, *args, **kwargs)
    finally:
        waits[" ".join(map(str, self.args))] = time.perf_counter() - start


class Keeper(LoggerDestination):
    """Keeps the hyperparameters."""

    def log_hyperparameters(self, hyperparameters):
        logged.update(hyperparameters)


class Linear(ComposerModel):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)

    def forward(self, batch):
        return self.layer(batch)

    def loss(self, outputs, batch):
        return outputs.square().mean()


subprocess.Popen.communicate = timed
loader = DataLoader([torch.ones(1)] * 4, batch_size=2)
trainer = Trainer(
    model=Linear(), train_dataloader=loader, max_duration="1ep", loggers=[Keeper()], progress_bar=False, device="cpu"
)
trainer.close()
seconds = next((wait for command, wait in waits.items() if "cpuinfo.py --json" in command), 0.0)
name = composer.utils.collect_env.get_cpu_model()
is_logged = any(name == value for value in logged.values())
print(
    f"mosaicml {composer.__version__}: Trainer() waited {seconds:.1f} s for a process of py-cpuinfo; "
    f"logged {sorted(logged)}, the processor's name {'among them' if is_logged else 'not'}"
)
raise SystemExit(0 if seconds >= 1 and not is_logged and "composer_version" in logged else 1)
PY
"$folder/venv/bin/python" seen.py
