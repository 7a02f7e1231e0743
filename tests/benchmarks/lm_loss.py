"""Compare the answers' loss in chunks with full logits: `python tests/benchmarks/lm_loss.py`; memory and CPU time.

Each case runs in a process of its own on one thread, forward and backward; 10 minutes and 11 GB at the default size,
Qwen2.5-VL-3B's. Memory is the peak beyond states, output matrix and, if it is trained, its gradient. Time is the
process's own, so that other work on the machine counts little. The last line is JSON: by case `memory_ratio` and
`time_ratio`, chunks over full logits, and `lm_loss_memory_ratio` and `lm_loss_time_ratio`, the largest of them.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from recipe.models.token_losses import token_losses

CASES = ("float32 trained", "float32 frozen", "bfloat16 trained", "bfloat16 frozen")


def full_logits(states: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Return the same losses, all logits at once."""
    return F.cross_entropy((states @ weight.T).float(), labels, reduction="none")


KINDS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {"full": full_logits, "chunks": token_losses}


def run(kind: str, case: str, positions: int, width: int, vocabulary: int) -> dict[str, float]:
    """Return bytes and seconds of one step in this process."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    dtype, trained = case.split()
    states, weight = (
        torch.empty(n, width, dtype=getattr(torch, dtype)).normal_(0, 0.02) for n in (positions, vocabulary)
    )
    states, weight = states.requires_grad_(), weight.requires_grad_(trained == "trained")
    labels = torch.randint(0, vocabulary, (positions,))
    small = (
        states[:64].detach().requires_grad_(),
        weight[:64].detach().requires_grad_(),
        labels[:64] % min(64, vocabulary),
    )
    KINDS[kind](*small).sum().backward()  # the first use loads kernels, about 0.1 GB
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
    before, start = status("VmRSS"), time.process_time()
    KINDS[kind](states, weight, labels).sum().backward()
    seconds = time.process_time() - start
    kept = sum(t.grad.nbytes for t in (states, weight) if t.grad is not None)
    return {"bytes": status("VmHWM") - before - kept, "seconds": seconds}


def status(name: str) -> int:
    """Return a line of the process's status, in bytes."""
    lines = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[name].split()[0]) * 1024


def compare(case: str, *sizes: int) -> dict[str, float]:
    """Return the ratios of chunks over full logits, each in a new process."""
    found = {}
    for kind in KINDS:
        command = [sys.executable, __file__, "--only", kind, case, "--sizes", *map(str, sizes)]
        found[kind] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        print(f"{case:<18}{kind:<8}{found[kind]['bytes'] / 1e9:>8.2f} GB{found[kind]['seconds']:>8.1f} s", flush=True)
    return {
        "memory_ratio": found["chunks"]["bytes"] / max(found["full"]["bytes"], 1),
        "time_ratio": found["chunks"]["seconds"] / found["full"]["seconds"],
    }


def lm_loss(*sizes: int, cases: tuple[str, ...] = CASES) -> dict[str, object]:
    """Return the figures of all cases, and the worst."""
    ratios = {case: compare(case, *sizes) for case in cases}
    worst = {f"lm_loss_{key}": max(found[key] for found in ratios.values()) for key in ("memory_ratio", "time_ratio")}
    return {**ratios, **worst}


def main(arguments: list[str]) -> None:
    """Run all cases, or one that a parent asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs=3, type=int, default=(4096, 2048, 151936), help="positions, width, vocabulary")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=CASES)
    parser.add_argument("--only", nargs=2, metavar=("KIND", "CASE"), help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    print(json.dumps(run(*args.only, *args.sizes) if args.only else lm_loss(*args.sizes, cases=tuple(args.cases))))


if __name__ == "__main__":
    main(sys.argv[1:])
