#!/usr/bin/env bash
# A run that Composer's EarlyStopper has ended trains on when the same command resumes it.
#
# Versions: mosaicml 0.32.1, with the torch 2.7 that it installs.
# Valid use: train with `EarlyStopper`, `save_folder`, `autoresume=True` and a `run_name`; start the same program again.
# Seen: a metric that never improves, patience of two epochs, ten epochs asked: the first start ends after epoch 4. The
#   second resumes there and ends after epoch 8, the third after epoch 10. The checkpoint holds nothing of the stopper
#   (it has no `state_dict`): neither the best value nor when it occurred nor that it stopped the run.
# Whom it hurts: jobs that a scheduler starts again. A preempted run counts its patience from zero, and a finished one
#   goes on, in the same folder, past the checkpoint that was meant to be its last.
# Remedy: a subclass whose `state_dict` holds `best` and `best_occurred`, and that judges them again after loading.
# Exits with 0 while this holds, with 1 once it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --disable-pip-version-check --quiet 'mosaicml==0.32.1' 'setuptools<81'
cd "$folder"
cat > seen.py <<'PY'
import logging
import warnings

import composer
import torch
from composer import ComposerModel, Trainer
from composer.callbacks import EarlyStopper
from torch.utils.data import DataLoader
from torchmetrics import MeanMetric

warnings.filterwarnings("ignore")
logging.disable(logging.WARNING)


class Constant(ComposerModel):
    """Its score is 1 after every epoch."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.score = MeanMetric()

    def forward(self, batch):
        return self.layer(batch)

    def loss(self, outputs, batch):
        return outputs.square().mean()

    def get_metrics(self, is_train):
        return {} if is_train else {"score": self.score}

    def update_metric(self, batch, outputs, metric):
        metric.update(torch.ones(1))


def start():
    """Run the program; return the epochs that are done at its end."""
    loader = DataLoader([torch.ones(1)] * 4, batch_size=2)
    stopper = EarlyStopper("score", "eval", patience="2ep")
    trainer = Trainer(
        model=Constant(),
        train_dataloader=loader,
        eval_dataloader=loader,
        max_duration="10ep",
        callbacks=[stopper],
        run_name="run",
        save_folder="checkpoints",
        save_interval="1ep",
        autoresume=True,
        progress_bar=False,
        device="cpu",
    )
    trainer.fit()
    epochs = int(trainer.state.timestamp.epoch)
    trainer.close()
    return epochs


ended = [start() for _ in range(3)]
print(f"mosaicml {composer.__version__}, torch {torch.__version__}; epochs done after each start: {ended}")
raise SystemExit(0 if ended == [4, 8, 10] else 1)
PY
"$folder/venv/bin/python" seen.py
