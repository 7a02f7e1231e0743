#!/usr/bin/env bash
# Where bitsandbytes is installed, `import peft` imports torch's compiler with its code generators, though nothing is compiled.
#
# Versions: bitsandbytes 0.50.2 and peft 0.21.2 with torch 2.15.0 and transformers 5.24.0; peft imports bitsandbytes
#   in its module of helpers.
# Valid use: `import peft`, no adapter, no quantised layer.
# Seen: bitsandbytes decorates its fallback kernels with `torch.compile` while it is imported, and torch builds the
#   compiler's configuration then, so `torch._inductor.compile_fx` and over 500 further modules are loaded: on two shared
#   cores `import peft` takes half as much CPU time again (7.4 s, 4.9 without). Where torch is told not to compile, none
#   of them is loaded. With torch 2.7.0 the import also starts a process that waits for something to compile (not
#   checked here).
# Whom it hurts: every process that imports peft, as transformers' and Composer's models of the hub do: each rank, each
#   command of some seconds, each worker of a test suite, next to a quantised run or not.
# Remedy: set TORCHDYNAMO_DISABLE=1 until bitsandbytes is imported, and delete it afterwards; the variable is read when a
#   function is decorated, so later calls of `torch.compile` work.
# Exits with 0 while this holds, with 1 once it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --disable-pip-version-check --quiet \
    'torch==2.15.0' 'transformers==5.24.0' 'peft==0.21.2' 'bitsandbytes==0.50.2' 'numpy<3'
cd "$folder"
cat > seen.py <<'PY'
import os
import sys
import time

import torch

before, start = len(sys.modules), time.process_time()
import peft

seconds, modules = time.process_time() - start, len(sys.modules) - before
has_compiler = "torch._inductor.compile_fx" in sys.modules
os.environ.pop("TORCHDYNAMO_DISABLE", None)
compiles = hasattr(torch.compile(torch.sin), "_torchdynamo_orig_callable")
print(int("bitsandbytes" in sys.modules), int(has_compiler), int(compiles), modules, f"{seconds:.1f}")
PY
"$folder/venv/bin/python" seen.py > /dev/null  # the first run compiles Python files
plain=$("$folder/venv/bin/python" seen.py)
switched_off=$(TORCHDYNAMO_DISABLE=1 "$folder/venv/bin/python" seen.py)
echo "imports bitsandbytes, imports the compiler, can compile afterwards, modules, CPU seconds"
echo "import peft:                          $plain"
echo "without the compiler:                 $switched_off"
read -r -a first <<< "$plain"
read -r -a second <<< "$switched_off"
[[ ${first[*]:0:3} == "1 1 1" && ${second[*]:0:3} == "1 0 1" && $((first[3] - second[3])) -gt 400 ]]
