"""Measure time and memory of `Detector.from_pretrained`, next to transformers' own classes on the same export.

    python tests/benchmarks/loading.py EXPORTED [--repeats 5]
    python tests/benchmarks/loading.py --make BASE EXPORTED   # first: export BASE with a head that learned nothing

Each loads in a process of its own, in turns, from files that are in memory already. Imports are not counted in the
seconds; the peak is of the whole process. transformers loads model and processor, the detector the head too. The last
line is JSON: medians of `seconds` and `peak_gb` of both, and `ratio_seconds`, `ratio_peak` of the detector to
transformers.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parents[2]


def make(base: str, folder: str) -> None:
    """Export a base model with a new head."""
    from recipe.checkpoints.weights import export_model
    from recipe.configure import load_config
    from recipe.data.image import image_spec
    from recipe.load import build_network, load_base, load_processor

    overrides = [f"model.pretrained_model_name_or_path={base}", "caption_decoder.max_caption_tokens=32"]
    config = load_config(str(ROOT / "yamls" / "head.yaml"), overrides)
    processor = load_processor(base)
    network = build_network(config, load_base(config, base), image_spec(processor.image_processor, config.image))
    export_model(network, processor, config, folder)


def load(who: str, folder: str) -> None:
    """Load in this process; print seconds and the peak of its memory in GB."""
    if who == "detector":
        from recipe import Detector

        start = time.perf_counter()
        loaded = Detector.from_pretrained(folder, device="cpu")
    else:
        import torch
        from transformers import AutoModelForImageTextToText, AutoProcessor

        start = time.perf_counter()
        loaded = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.bfloat16)
        loaded = (loaded, AutoProcessor.from_pretrained(folder))
    seconds = time.perf_counter() - start
    assert loaded
    status = Path("/proc/self/status").read_text()
    peak = int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM"))) * 1024 / 1e9
    print(json.dumps({"seconds": seconds, "peak_gb": peak}))


def main() -> None:
    """Measure both and report; or export, or load once, if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("exported")
    parser.add_argument("--make", metavar="BASE")
    parser.add_argument("--load", help=argparse.SUPPRESS)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    if args.load:
        load(args.load, args.exported)
        return
    if args.make:
        make(args.make, args.exported)
        return
    rows: dict[str, list[dict[str, float]]] = {"detector": [], "transformers": []}
    for repeat in range(args.repeats + 1):
        for who, found in rows.items():
            command = [sys.executable, __file__, args.exported, "--load", who]
            done = subprocess.run(command, check=True, text=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
            if repeat:  # the first pass reads the files
                found.append(json.loads(done.stdout.splitlines()[-1]))
    result = {
        f"{key}_{who}": round(median(row[key] for row in found), 2)
        for who, found in rows.items()
        for key in ("seconds", "peak_gb")
    }
    result["ratio_seconds"] = round(result["seconds_detector"] / result["seconds_transformers"], 3)
    result["ratio_peak"] = round(result["peak_gb_detector"] / result["peak_gb_transformers"], 3)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
