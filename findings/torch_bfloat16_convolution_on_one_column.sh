#!/usr/bin/env bash
# On a CPU, torch's gradient of a bfloat16 3 x 3 convolution of stride 2 is wrong if the map is one column wide.
#
# Versions: torch 2.11.0, and 2.7.0 before it, on a processor with AVX-512 (with `ONEDNN_MAX_CPU_ISA=AVX2` it is right).
# Valid use: `nn.Conv2d(64, 64, 3, stride=2, padding=1)` in bfloat16 on maps of 4 x 1; also 1 x 1, 2 x 1, 3 x 1, 5 x 1
#   and 7 x 1, and 16 or 32 channels. Maps two columns wide are right, and so is stride 1.
# Seen: the left and the right column of the kernel see nothing but padding, so their gradient is exactly zero, as it is
#   in float32. In bfloat16 it is not zero in any of 100 backward passes; it is whatever the memory held before, NaN too.
# Whom it hurts: who trains or fine-tunes a strided convolution (a feature pyramid, a downsampling stem) in bfloat16 or
#   under autocast on a CPU, as soon as an image is narrow: the loss is right, and the weights become wrong or NaN.
# Remedy: float32 for such convolutions on a CPU, or images wide enough that no map is one column wide.
# Exits with 0 while this holds, with 1 once it has changed, and with 2 on a processor without AVX-512.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --disable-pip-version-check --quiet 'torch==2.11.0' numpy
cd "$folder"
cat > seen.py <<'PY'
import torch
from torch import nn

if "AVX512" not in torch.backends.cpu.get_cpu_capability():
    print("this processor has no AVX-512")
    raise SystemExit(2)


def wrong(dtype, columns):
    """Of 100 backward passes: how many give a gradient where it must be zero, and how many give NaN."""
    torch.manual_seed(0)
    not_zero = not_a_number = 0
    for _ in range(100):
        used = [torch.full((2**power,), torch.nan) for power in range(6, 18)]
        del used  # as in any training, memory was used before
        conv = nn.Conv2d(64, 64, 3, stride=2, padding=1, bias=False, dtype=dtype)
        conv(torch.randn(2, 64, 4, columns, dtype=dtype)).sum().backward()
        outer = conv.weight.grad[..., ::2]
        not_zero += columns == 1 and bool((outer != 0).any())
        not_a_number += not bool(torch.isfinite(conv.weight.grad).all())
    return not_zero, not_a_number


narrow, exact, wider = wrong(torch.bfloat16, 1), wrong(torch.float32, 1), wrong(torch.bfloat16, 2)
print(f"one column, bfloat16: not zero in {narrow[0]}, NaN in {narrow[1]} of 100; float32: {exact}; two columns: {wider}")
raise SystemExit(0 if narrow[0] == 100 and exact == (0, 0) and wider == (0, 0) else 1)
PY
"$folder/venv/bin/python" seen.py
