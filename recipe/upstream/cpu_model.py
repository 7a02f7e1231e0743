"""The processor's name, for which every Trainer of Composer waits more than a second.

`Trainer.__init__` of Composer 0.32.1 collects what `composer.utils.collect_env` knows of the machine and logs the
version and commit alone. The processor's name among it comes from py-cpuinfo 9.0, which starts a Python process that
sleeps a second to measure the clock. Linux on x86 has the name, the same one, in a file. Delete once Composer asks for
what it logs.
"""

from functools import cache
from pathlib import Path

from composer.utils import collect_env

CPUINFO = Path("/proc/cpuinfo")


def read_cpu_model() -> bool:
    """Let Composer take the processor's name from `CPUINFO`; return False if it is not there, as on ARM."""
    lines = CPUINFO.read_text(errors="replace").splitlines() if CPUINFO.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    if not names:
        return False
    collect_env.get_cpu_model = cache(lambda: names[0])
    return True
