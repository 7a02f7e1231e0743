#!/usr/bin/env bash
# On some CPUs one evaluation pass cuts a 4-bit layer of bitsandbytes out of training: all layers before it stop learning.
#
# Versions: bitsandbytes 0.50.2 with torch 2.13.0, on an x86 CPU with AVX512-BF16 (the flag avx512_bf16 in /proc/cpuinfo).
# Valid use: a `Linear4bit` layer (nf4, computing in bfloat16) behind a layer that learns, as in QLoRA. Train a step,
#   evaluate under `no_grad` after `.eval()`, then `.train()` and train again, on the CPU.
# Seen: before the evaluation the earlier layer gets its gradient. The evaluation repacks the 4-bit weight for a faster
#   kernel, and that kernel is used in training from then on, though it has no backward pass: `backward()` ends without an
#   error, the earlier layer's gradient stays None, and torch warns once that the operator has no autograd kernel. With 96
#   input features, no multiple of 128, the evaluation itself raises (a shape that does not fit).
# Whom it hurts: tests and small trainings with adapters on a quantised model that run on a CPU and evaluate between
#   epochs. Adapters in front of such a layer keep their values from the first evaluation on; the loss still moves.
# Remedy: evaluate a copy of the model, or compute with `bitsandbytes.functional.dequantize_4bit` and a plain product.
# Exits with 0 while this holds, with 1 once it has changed, with 2 on another CPU.
set -euo pipefail
grep -q avx512_bf16 /proc/cpuinfo || { echo "this CPU has no AVX512-BF16"; exit 2; }
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --disable-pip-version-check --quiet 'torch==2.13.0' 'numpy<3' 'bitsandbytes==0.50.2'
cd "$folder"
cat > seen.py <<'PY'
import warnings

import bitsandbytes
import torch
from bitsandbytes.nn import Linear4bit
from torch import nn

warnings.simplefilter("ignore")


def model(features):
    torch.manual_seed(0)
    quantised = Linear4bit(features, 64, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4")
    return nn.Sequential(nn.Linear(16, features, dtype=torch.bfloat16), quantised).to("cpu")


def learns(network, rows):
    network.train().zero_grad(set_to_none=True)
    output = network(rows)
    if output.requires_grad:
        output.float().sum().backward()
    return network[0].weight.grad is not None


def evaluate(network, rows):
    with torch.no_grad():
        network.eval()(rows)


rows = torch.randn(4, 16, dtype=torch.bfloat16)
network = model(128)
before = learns(network, rows)
evaluate(network, rows)
after = learns(network, rows)
try:
    evaluate(model(96), rows)
    raised = False
except RuntimeError as error:
    raised = True
    print(f"evaluation with 96 features: {error}")
print(f"bitsandbytes {bitsandbytes.__version__}, torch {torch.__version__}")
print(f"the layer before learns: {before} before an evaluation, {after} after it")
raise SystemExit(0 if (before, after, raised) == (True, False, True) else 1)
PY
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" seen.py
