"""Measure the speed of a packed training step and of the loader, each next to what it replaces.

    python tests/benchmarks/throughput.py [--data SHARED_DATA] [--repeats 5]

Training: real tokens per second of forward, backward and update, of one batch of 8,019 tokens whose padded rows are
36 % padding; packed, padded, and packed with a dense mask, in turns. Loader: images per core-second from JPEG bytes to
tensors, the recipe's encoder next to the Hugging Face processor (`use_fast=True`), the same tensors. Everything runs on
one thread. The last line is JSON: `packed_over_padded`, `packed_over_dense`, `loader_over_hf`.
"""

import argparse
import json
import os
import tempfile
from pathlib import Path

import torch

from loader_speed import loader_rates
from real_sets import read_samples
from recipe.config import ModelConfig, RecipeConfig
from recipe.tiny import build_tiny_checkpoint
from step_speed import make_examples, padding_waste, step_seconds

SETS = ("chess_train", "bccd_trainval", "wagon_train", "coco_cc_train")
IMAGES_OF_A_SET = 40
DATA = Path(__file__).resolve().parents[3] / "shared" / "data"


def measure_training(config: RecipeConfig, repeats: int) -> dict[str, float]:
    """Print and return the tokens per second of each way."""
    examples = make_examples(config)
    num_tokens = sum(len(example.input_ids) for example in examples)
    print(f"{num_tokens} tokens in {len(examples)} samples, padding waste {padding_waste(examples):.3f}")
    rates = {name: num_tokens / seconds for name, seconds in step_seconds(config, examples, repeats).items()}
    print("| step | real tokens per second |\n| --- | ---: |")
    for name, rate in rates.items():
        print(f"| {name} | {rate:.0f} |")
    return rates


def measure_loader(config: RecipeConfig, data: Path, repeats: int) -> float:
    """Print the rates of each set and return the ratio of the core-seconds of all."""
    print("| images | recipe, images per core-second | Hugging Face | ratio |\n| --- | ---: | ---: | ---: |")
    spent_here = spent_there = 0.0
    for name in SETS:
        samples = read_samples(data / name)[:IMAGES_OF_A_SET]
        here, there = loader_rates(config, samples, repeats)
        spent_here, spent_there = spent_here + len(samples) / here, spent_there + len(samples) / there
        print(f"| {name} | {here:.0f} | {there:.0f} | {here / there:.2f} |", flush=True)
    return spent_there / spent_here


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DATA, help="folder of the real sets")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    with tempfile.TemporaryDirectory() as folder:
        build_tiny_checkpoint(folder)
        config = RecipeConfig(model=ModelConfig(pretrained_model_name_or_path=folder))
        ratio = measure_loader(config, args.data, args.repeats)
        rates = measure_training(config, args.repeats)
    report = {
        "packed_over_padded": rates["packed"] / rates["padded"],
        "packed_over_dense": rates["packed"] / rates["dense"],
        "loader_over_hf": ratio,
    }
    print(json.dumps({name: round(value, 2) for name, value in report.items()}))


if __name__ == "__main__":
    main()
