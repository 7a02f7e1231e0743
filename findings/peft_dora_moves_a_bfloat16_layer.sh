#!/usr/bin/env bash
# A new DoRA adapter of peft changes the output of a bfloat16 layer before anything is trained; a LoRA adapter does not.
#
# Versions: peft 0.21.2 with torch 2.7.0 and transformers 4.57.6.
# Valid use: `get_peft_model` with `LoraConfig(use_dora=True)` on a linear layer in bfloat16, peft's defaults otherwise.
# Seen: of the outputs of a layer of 256 x 256, 15 % differ from those without the adapter, by 0.18 % in norm. In float32
#   none differs. The lengths of the weight's rows are stored after rounding to bfloat16 (the parameter itself is
#   float32), but each pass measures them again in float32, and their ratio is not 1.
# Whom it hurts: who trains DoRA on a bfloat16 base begins at another model than the base, in every adapted layer; an
#   evaluation before training is not the base's.
# Remedy: after making the adapter, set each `lora_magnitude_vector` to the row norms of the base weight in float32.
# Exits with 0 while this holds, with 1 once it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --disable-pip-version-check --quiet \
    'torch==2.7.0' 'transformers==4.57.6' 'peft==0.21.2' 'numpy<2.3'
cd "$folder"
cat > seen.py <<'PY'
import warnings

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

warnings.filterwarnings("ignore")


class Net(nn.Module):
    def __init__(self, dtype):
        super().__init__()
        self.linear = nn.Linear(256, 256, bias=False, dtype=dtype)

    def forward(self, x):
        return self.linear(x)


@torch.no_grad()
def changed(dtype, use_dora, mended=False):
    """The share of outputs that differ, and by how much in norm."""
    torch.manual_seed(0)
    net = Net(dtype)
    x = torch.randn(64, 256, dtype=dtype)
    before = net(x).float()
    rows = net.linear.weight.float().norm(dim=1)
    adapted = get_peft_model(net, LoraConfig(r=8, target_modules=["linear"], use_dora=use_dora))
    for name, parameter in adapted.named_parameters() if mended else ():
        if "magnitude" in name:
            parameter.copy_(rows)
    after = adapted(x).float()
    return float((after != before).float().mean()), float((after - before).norm() / before.norm())


plain = [changed(torch.float32, True), changed(torch.bfloat16, False)]
share, size = changed(torch.bfloat16, True)
mended = changed(torch.bfloat16, True, mended=True)
print("DoRA in float32, LoRA in bfloat16:", plain)
print(f"DoRA in bfloat16: {share:.1%} of the outputs differ, by {size:.2%} in norm; with float32 row norms: {mended}")
raise SystemExit(0 if plain == [(0.0, 0.0)] * 2 and share > 0.05 and size > 5e-4 and mended[0] < share / 10 else 1)
PY
"$folder/venv/bin/python" seen.py
