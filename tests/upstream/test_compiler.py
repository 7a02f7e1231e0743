"""That torch's compiler is not imported with bitsandbytes, and is there for who asks for it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CODE = """
import os, sys
from recipe.upstream.compiler import import_bitsandbytes_without_compiler
if {hooked}:
    import_bitsandbytes_without_compiler()
import torch, bitsandbytes
print("torch._inductor.compile_fx" in sys.modules, os.environ.get("TORCHDYNAMO_DISABLE"))
print(hasattr(torch.compile(torch.sin), "_torchdynamo_orig_callable"), os.environ.get("TORCH_WARM_POOL"))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("hooked", "given", "lines"),
    [
        (False, None, ["True None", "True None"]),  # if not, recipe.upstream.compiler may be deleted
        (True, None, ["False None", "True 0"]),
        (True, "0", ["False 0", "True 0"]),
    ],
)
def test_bitsandbytes_is_imported_without_the_compiler(hooked: bool, given: str | None, lines: list[str]) -> None:
    switches = ("TORCHDYNAMO_DISABLE", "TORCH_WARM_POOL")
    environment = {name: value for name, value in os.environ.items() if name not in switches}
    environment |= {} if given is None else {"TORCHDYNAMO_DISABLE": given}
    command = [sys.executable, "-c", CODE.format(hooked=hooked)]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    assert result.stdout.split("\n")[:-1] == lines
