"""torch's compiler, which nothing here uses and which was a quarter of the CPU time that Composer's import took.

Composer imports peft where it is installed, peft 0.21 (`helpers.py`) imports bitsandbytes where it is installed, and
bitsandbytes 0.50.2 (`backends/default/ops.py`) decorates four functions with `torch.compile`. That imports torch's
inductor, and with torch 2.7 starts a process that waits for something to compile. Those four, for devices without
kernels of their own, run uncompiled then. Can be deleted once bitsandbytes decorates them when they are first called.
"""

import os
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

_SWITCH = "TORCHDYNAMO_DISABLE"  # torch.compile reads it and returns the function as it is


class _Finder(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        spec = PathFinder.find_spec(fullname, path, target) if fullname == "bitsandbytes" else None
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            given = os.environ.get(_SWITCH)
            os.environ[_SWITCH] = "1"
            try:
                execute(module)
            finally:
                del os.environ[_SWITCH]
                if given is not None:
                    os.environ[_SWITCH] = given

        spec.loader.exec_module = exec_module
        return spec


def import_bitsandbytes_without_compiler() -> None:
    """Switch `torch.compile` off while bitsandbytes is imported, should it ever be; not afterwards.

    Processes that this one spawns, such as Composer's uploaders, import the compiler, but start none that wait for it.
    """
    os.environ.setdefault("TORCH_WARM_POOL", "0")
    sys.meta_path.insert(0, _Finder())
