"""Run the real job at its real size, on a CPU: memory, sizes and speed of a 3B or 7B with random weights.

    python tests/benchmarks/real_size.py [--size 3b] [--legs head lora] [--source SHARED_DATA/chess_train]
                                         [--tokenizer SHARED_DATA/tokenizer] [--against OTHER_TREE]

It writes a random checkpoint of the published size in the hub's layout (bfloat16, sharded safetensors with an index,
the key prefixes of releases before 4.52) and converts real images. For each leg it runs the commands of a user: two
steps of training, one image evaluated, a checkpoint, a third step after a resume, export, predict. `head` is
yamls/head.yaml, `lora` yamls/lora.yaml, `full` yamls/joint.yaml, of which only the estimate is made. `--size tiny` does
all of it with the tiny model, as the tests do.

Then the head's step is timed with answers kept and left out, from the cache in a second epoch, and with `--against`
also by another tree of this repository, all on the same samples.

Everything is written below `bench/real_size/SIZE`. The last line is JSON: `legs` (by name: `seconds_per_step`,
`tokens_per_s`, `peak_rss_gb`, `estimate_gb`, `checkpoint_gb`, `export_peak_gb`), `head_speedup_without_answers`,
`head_speedup_cached`, `lm_loss_memory_ratio`. GB are 10^9 bytes. 3B takes about twenty minutes on two cores and needs
16 GB of memory and 30 GB of disk.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoProcessor, GenerationConfig, Qwen2_5_VLForConditionalGeneration

from quickstart import ROOT
from real_sets import build_qwen_tokenizer
from recipe.estimate import model_config
from recipe.tiny import CHAT_TEMPLATE, SPECIAL_TOKENS, build_tiny_checkpoint

FOLDER = Path("bench", "real_size")
NAMES = {"3b": "Qwen/Qwen2.5-VL-3B-Instruct", "7b": "Qwen/Qwen2.5-VL-7B-Instruct"}
YAMLS = {"head": "yamls/head.yaml", "lora": "yamls/lora.yaml", "full": "yamls/joint.yaml"}
SHARD_BYTES = 2 * 10**9
NUM_IMAGES = 4  # of the source, the last of them to evaluate; the others are one epoch, a pack each
GB = 10**9


def write_checkpoint(size: str, folder: Path, tokenizer: Path) -> None:
    """Write random weights in the hub's layout, one shard in memory at a time, with the true tokenizer if it is there.

    Args:
        size: A key of `NAMES`, or tiny.
        folder: Created; kept if it is there already.
        tokenizer: Folder for `build_qwen_tokenizer`; if it is absent, the tiny model's tokenizer is written.
    """
    if (folder / "config.json").exists():
        return
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    write_processor(size, partial, tokenizer)
    if size != "tiny":
        write_weights(NAMES[size], partial)
    partial.replace(folder)


def write_processor(size: str, folder: Path, tokenizer: Path) -> None:
    """Write the tiny checkpoint; for another size without its weights, and with the true tokenizer if it is there."""
    build_tiny_checkpoint(str(folder))
    if size == "tiny":
        return
    (folder / "model.safetensors").unlink()
    if tokenizer.is_dir():
        processor = AutoProcessor.from_pretrained(folder, use_fast=True)
        made = build_qwen_tokenizer(tokenizer, folder / "tokenizer")
        made.add_special_tokens({"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"})
        made.add_special_tokens({"additional_special_tokens": SPECIAL_TOKENS[1:]})  # pyright: ignore[reportArgumentType]
        made.chat_template = processor.tokenizer.chat_template = CHAT_TEMPLATE
        processor.tokenizer = made
        processor.save_pretrained(folder)
        shutil.rmtree(folder / "tokenizer")


def write_config(name: str, folder: Path) -> Any:
    """Write the configuration of a published size with the ids of the folder's tokenizer; return it."""
    config = model_config(name)
    config.dtype = torch.bfloat16
    processor = AutoProcessor.from_pretrained(folder, use_fast=True)
    ids = processor.tokenizer.convert_tokens_to_ids
    config.image_token_id, config.video_token_id = ids("<|image_pad|>"), ids("<|video_pad|>")
    config.vision_start_token_id = ids("<|vision_start|>")
    config.save_pretrained(folder)
    ends = [ids("<|im_end|>"), ids("<|endoftext|>")]
    GenerationConfig(eos_token_id=ends, pad_token_id=ends[1], do_sample=False).save_pretrained(folder)
    return config


def write_weights(name: str, folder: Path) -> None:
    """Write configuration, weights and their index."""
    config = write_config(name, folder)
    with torch.device("meta"):
        model = Qwen2_5_VLForConditionalGeneration(config)
    shapes = {key: value.shape for key, value in model.state_dict().items()}
    if config.tie_word_embeddings:
        del shapes["lm_head.weight"]
    old = {"model.language_model.": "model.", "model.visual.": "visual."}
    generator = torch.Generator().manual_seed(0)
    shards: list[dict[str, torch.Tensor]] = [{}]
    index: dict[str, int] = {}
    total = 0

    def flush() -> None:
        save_file(shards[-1], folder / f"shard-{len(shards)}.safetensors", metadata={"format": "pt"})
        shards[-1] = {}

    for key, shape in shapes.items():
        (stored,) = [new + key.removeprefix(prefix) for prefix, new in old.items() if key.startswith(prefix)] or [key]
        made = torch.empty(shape, dtype=torch.bfloat16)
        if len(shape) == 1:
            made.fill_(0.0 if key.endswith("bias") else 1.0)
        else:
            made.normal_(0, 0.02, generator=generator)
        size = made.numel() * 2
        if sum(value.numel() * 2 for value in shards[-1].values()) + size > SHARD_BYTES and shards[-1]:
            flush()
            shards.append({})
        shards[-1][stored] = made
        index[stored] = len(shards)
        total += size
    flush()
    names = [f"model-{number:05}-of-{len(shards):05}.safetensors" for number in range(1, len(shards) + 1)]
    for number, name_of_shard in enumerate(names, 1):
        (folder / f"shard-{number}.safetensors").replace(folder / name_of_shard)
    weight_map = {key: names[number - 1] for key, number in index.items()}
    text = json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2)
    (folder / "model.safetensors.index.json").write_text(text)


def convert(source: Path, folder: Path) -> Path:
    """Convert the first images into the splits `train` and `val`; return one of them as a file."""
    truth = json.loads((source / "instances.json").read_text())
    images = truth["images"][:NUM_IMAGES]
    for split, part in {"train": images[:-1], "val": images[-1:]}.items():
        ids = {image["id"] for image in part}
        rows = [row for row in truth["annotations"] if row["image_id"] in ids]
        path = folder / f"{split}.json"
        path.write_text(json.dumps({**truth, "images": part, "annotations": rows}))
        command = ["-m", "convert.coco", "--images", str(source / "images"), "--annotations", str(path)]
        if not (folder / "data" / split / "index.json").exists():
            measure(*command, "--out", str(folder / "data"), "--split", split)
    return source / "images" / images[-1]["file_name"]


def measure(*command: str, tree: Path = ROOT) -> tuple[float, float, str]:
    """Run Python in a tree; return the seconds, the peak of its memory in GB and its output.

    Raises:
        RuntimeError: It failed; its last lines are shown.
    """
    print(f"$ python {' '.join(command)}", flush=True)
    environment = {**os.environ, "PYTHONPATH": str(tree), "HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled"}
    started = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, *command],
        cwd=tree,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout is not None
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"{command} ended with {process.returncode}:\n" + "\n".join(output.splitlines()[-20:]))
    return time.monotonic() - started, usage.ru_maxrss * 1024 / GB, output


def settings(model: Path, data: Path, run: Path, tokens: int) -> list[str]:
    """Return the overrides that all legs share: places, a CPU, and the size of the packs."""
    values: Mapping[str, Any] = {
        "run_folder": run,
        "model.pretrained_model_name_or_path": model,
        "train_loader.streams.main.local": data,
        "eval_loader.streams.main.local": data,
        "train_loader.packing.max_tokens": tokens,
        "max_seq_len": tokens,
        "train_loader.global_batch_size": 1,
        "train_loader.dataloader": "{num_workers: 0}",
        "eval_loader.dataloader": "{num_workers: 0}",
        "eval_loader.global_batch_size": 1,
        "evaluation.answers": "null",
        "trainer.precision": "fp32",
        "trainer.device": "cpu",
        "trainer.parallelism_config": "null",
        "loggers.tensorboard": "null",
        "loggers.wandb": "null",
    }
    return [f"{key}={value}" for key, value in values.items()]


def steps(run: Path) -> list[tuple[float, int]]:
    """Return the seconds and tokens of each step of a run, as `callbacks.throughput` and Composer logged them."""
    rows: dict[int, dict[str, float]] = {}
    for line in (run / "metrics.jsonl").read_text().splitlines():
        entry = json.loads(line)
        rows.setdefault(entry["step"], {}).update(entry["metrics"])
    found: list[tuple[float, int]] = []
    seen = 0
    for _, row in sorted(rows.items()):
        if "flops/per_second" in row:
            flops = sum(value for name, value in row.items() if name.startswith("flops/step/"))
            found.append((flops / row["flops/per_second"], int(row["time/token"]) - seen))
            seen = int(row["time/token"])
    return found


def run_leg(leg: str, overrides: Sequence[str], run: Path, image: Path) -> dict[str, float]:
    """Train two steps, evaluate, save, resume for a third, export and predict; return the figures."""
    trainer = ["trainer.eval_interval=2ba", "trainer.save_interval=1ba", "callbacks.throughput.interval=1ba"]
    command = ["recipe/train.py", YAMLS[leg], *overrides, *trainer]
    _, first, _ = measure(*command, "trainer.max_duration=2ba")
    _, second, _ = measure(*command, "trainer.max_duration=3ba")
    checkpoint = (run / "checkpoints" / "latest-rank0.pt").resolve()
    exported = run / "exported"
    _, export_peak, _ = measure("recipe/export.py", "--checkpoint", str(checkpoint), "--out", str(exported))
    places = ("--checkpoint", str(exported), "--out", str(run / "predictions"))
    seconds, predict_peak, _ = measure("recipe/predict.py", *places, "--answer", "boxes", str(image))
    print(f"{leg}: predict {seconds:.0f} s, peak {predict_peak:.1f} GB")
    done = steps(run)
    return {
        "seconds_per_step": round(statistics.median(seconds for seconds, _ in done), 3),
        "tokens_per_s": round(sum(tokens for _, tokens in done) / sum(seconds for seconds, _ in done), 1),
        "peak_rss_gb": round(max(first, second), 2),
        "estimate_gb": estimated(leg, overrides),
        "checkpoint_gb": round(checkpoint.stat().st_size / GB, 3),
        "export_peak_gb": round(export_peak, 2),
    }


def estimated(leg: str, overrides: Sequence[str]) -> float:
    """Return what `recipe.estimate` says of the host's memory, in GB."""
    _, _, output = measure("-m", "recipe.estimate", YAMLS[leg], *overrides, "--json")
    return round(json.loads(output.splitlines()[-1])["host"] * 2**30 / GB, 2)


def seconds_of_head(overrides: Sequence[str], run: Path, *more: str, tree: Path = ROOT) -> list[float]:
    """Return the seconds of each step of yamls/head.yaml, one sample each, in the order of the data."""
    shutil.rmtree(run, ignore_errors=True)
    fixed = ["train_loader.packing=null", "train_loader.dataset.shuffle=false", "callbacks.throughput.interval=1ba"]
    once = ["trainer.eval_interval=0", "trainer.save_interval=1000ba", "nan_rollback.snapshot_interval=1000ba"]
    path = run.with_suffix(".yaml")
    path.write_text((ROOT / YAMLS["head"]).read_text())
    measure("recipe/train.py", str(path), *overrides, f"run_folder={run}", *fixed, *once, *more, tree=tree)
    return [seconds for seconds, _ in steps(run)]


def head_speeds(overrides: Sequence[str], folder: Path, against: Path | None) -> dict[str, float]:
    """Time the head's step on the same samples: with answers, without, from the cache, and by another tree.

    Without another tree the cache is compared with this one's step with answers.
    """
    others = [override for override in overrides if not override.startswith("run_folder")]
    epoch = NUM_IMAGES - 1
    kept = seconds_of_head(others, folder / "kept", "prompt.student_answer=true", f"trainer.max_duration={epoch}ba")
    cache = f"cache_frozen.local={folder / 'cache'}"
    shutil.rmtree(folder / "cache", ignore_errors=True)
    left_out = seconds_of_head(others, folder / "cached", cache, f"trainer.max_duration={3 * epoch}ba")
    first, later = statistics.median(left_out[:epoch]), statistics.median(left_out[epoch:])
    found = {"with_answers": statistics.median(kept), "without_answers": first, "cached": later}
    base = found["with_answers"]
    if against is not None:
        old = [override for override in others if "frozen_dtype" not in override]
        # Earlier releases take neither key next to `num_workers: 0`.
        loader = [f"train_loader.dataloader.{key}" for key in ("prefetch_factor=null", "persistent_workers=false")]
        more = ("model.dtype=bfloat16", "prompt.student_answer=true", f"trainer.max_duration={epoch}ba", *loader)
        found["other_tree"] = base = statistics.median(seconds_of_head(old, folder / "other", *more, tree=against))
    print(json.dumps({"head_seconds": {name: round(seconds, 3) for name, seconds in found.items()}}), flush=True)
    return {
        "head_speedup_without_answers": round(found["with_answers"] / first, 2),
        "head_speedup_cached": round(base / later, 1),
    }


def lm_loss_memory(arguments: Sequence[str]) -> float:
    """Return the worst ratio of `lm_loss.py`."""
    _, _, output = measure("tests/benchmarks/lm_loss.py", *arguments)
    return json.loads(output.splitlines()[-1])["lm_loss_memory_ratio"]


def main(arguments: Sequence[str]) -> dict[str, Any]:
    """Run everything, print the figures, and return them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shared = ROOT.parent / "shared" / "data"
    parser.add_argument("--size", choices=(*NAMES, "tiny"), default="3b")
    parser.add_argument("--legs", nargs="+", choices=tuple(YAMLS), default=("head", "lora"))
    parser.add_argument("--source", type=Path, default=shared / "chess_train", help="`images` and `instances.json`")
    parser.add_argument("--tokenizer", type=Path, default=shared / "tokenizer")
    parser.add_argument("--against", type=Path, help="another tree of this repository, whose head step is timed too")
    parser.add_argument("--tokens", type=int, default=2048, help="of a pack")
    parser.add_argument("--folder", type=Path, default=ROOT / FOLDER)
    args = parser.parse_args(arguments)
    folder = (args.folder / args.size).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    write_checkpoint(args.size, folder / "model", args.tokenizer)
    image = convert(args.source, folder)
    legs: dict[str, dict[str, float]] = {}
    for leg in args.legs:
        run = folder / leg
        shutil.rmtree(run, ignore_errors=True)
        overrides = settings(folder / "model", folder / "data", run, args.tokens)
        legs[leg] = {"estimate_gb": estimated(leg, overrides)} if leg == "full" else run_leg(leg, overrides, run, image)
        print(json.dumps({leg: legs[leg]}), flush=True)
    result: dict[str, Any] = {"legs": legs}
    if "head" in args.legs:
        result |= head_speeds(settings(folder / "model", folder / "data", folder, args.tokens), folder, args.against)
    sizes = ["--sizes", "256", "64", "2048"] if args.size == "tiny" else []
    result["lm_loss_memory_ratio"] = lm_loss_memory([*sizes, "--cases", "bfloat16 trained", "bfloat16 frozen"])
    print(json.dumps(result))
    return result


if __name__ == "__main__":
    main(sys.argv[1:])
