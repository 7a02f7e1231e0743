"""Python imports this first in every process of a soaked run: it shifts the clock and adds the NaNs; see `soak.py`.

Nothing in the recipe knows of it. It is in a folder of its own, which the soak puts on PYTHONPATH.
"""

import datetime
import importlib.abc
import importlib.util
import os
import sys
import time
from typing import Any

from tests.drills.soak_control import Control

CONTROL = Control(os.environ["SOAK_CONTROL"])

_real_time, _real_time_ns, _real_datetime = time.time, time.time_ns, datetime.datetime


class _Kind(type):
    """Makes moments of C code, which are not of the class below, count as its own."""

    def __instancecheck__(cls, instance: object) -> bool:
        return isinstance(instance, _real_datetime)


class _ShiftedDatetime(_real_datetime, metaclass=_Kind):
    @classmethod
    def now(cls, tz: Any = None) -> "_ShiftedDatetime":
        return super().now(tz) + datetime.timedelta(seconds=CONTROL.clock_offset)

    @classmethod
    def utcnow(cls) -> "_ShiftedDatetime":
        return super().utcnow() + datetime.timedelta(seconds=CONTROL.clock_offset)


_ShiftedDatetime.__module__, _ShiftedDatetime.__name__, _ShiftedDatetime.__qualname__ = (
    "datetime",
    "datetime",
    "datetime",
)
time.time = lambda: _real_time() + CONTROL.clock_offset
time.time_ns = lambda: _real_time_ns() + int(CONTROL.clock_offset * 1e9)
datetime.datetime = _ShiftedDatetime


class _AddAlgorithms(importlib.abc.MetaPathFinder):
    """Wraps `recipe.build.build_algorithms` once a rank has imported it."""

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> Any:
        if fullname != "recipe.build":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        assert spec is not None and spec.loader is not None
        execute = spec.loader.exec_module

        def execute_and_wrap(module: Any) -> None:
            execute(module)
            from tests.drills.soak_inside import with_disturbance  # which imports this module

            module.build_algorithms = with_disturbance(module.build_algorithms, CONTROL)

        spec.loader.exec_module = execute_and_wrap
        return spec


sys.meta_path.insert(0, _AddAlgorithms())
