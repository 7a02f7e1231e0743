"""What the machine offers to this process."""

import os


def usable_cores() -> int:
    """Return how many cores this process may use, which a scheduler can make fewer than there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
