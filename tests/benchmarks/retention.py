"""Measure what a tiny model keeps of its chats while it learns boxes: with 20 % chats among its samples, and without.

    python tests/benchmarks/retention.py [--out runs/retention] [--chat-steps 150] [--steps 150]

A random checkpoint learns chats of one kind, and `recipe/export.py` makes a base model of it. Adapters and a head learn
scenes of shapes on that base, by `yamls/joint_chat.yaml` with the changes below: once as it is, once without the stream
of chats. Both see equally many packs of equally many tokens. It prints a table of the last evaluations.
"""

import argparse
import itertools
import json
import logging
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from convert.shapes import iter_samples
from convert.write import write_split
from recipe.config import RecipeConfig
from recipe.configure import load_config
from recipe.export import main as export
from recipe.export import parse as parse_export
from recipe.rules import check_config
from recipe.schema import Sample
from recipe.tiny import build_tiny_checkpoint
from recipe.train import main as train

ROOT = Path(__file__).resolve().parents[2]
WORDS = (
    ("small", "large"),
    ("red", "green", "blue", "yellow", "orange", "purple", "white", "black"),
    ("circle", "square", "star", "cross", "dog", "fox"),
    ("table", "chair", "car", "truck", "bicycle", "box"),
)
HELD_OUT = 64
SCENES = {"train": (2000, 1), "val": (64, 2)}  # number, seed
SHARED = [
    *("max_seq_len=1024", "prompt.system=''", "prompt.detect=Detect.", "evaluation.answers=null"),
    *("train_loader.dataloader=null", "eval_loader.dataloader=null", "scheduler.t_warmup=20ba"),
    *("loggers.tensorboard=null", "loggers.wandb=null", "trainer.precision=fp32", "trainer.progress_bar=false"),
]
SMALL = [  # of joint_chat.yaml
    *("detection_head.num_queries=12", "detection_head.width=64", "detection_head.num_heads=4"),
    *("detection_head.num_layers=2", "detection_head.num_denoising_groups=0", "caption_decoder.num_layers=1"),
    *("caption_decoder.num_heads=4", "train_loader.packing.max_tokens=1024", "eval_loader.global_batch_size=16"),
    *("model.gradient_checkpointing=false", "model.frozen_dtype=same", "optimizer.lr_lora_llm=1e-2"),
    *("optimizer.lr_adapter=2e-3", "optimizer.lr_detection=2e-3", "ema=null"),
]


def chats() -> list[Sample]:
    """Return chats whose answer repeats four words of the question, in a fixed random order."""
    rows = list(itertools.product(*WORDS))
    random.Random(0).shuffle(rows)
    return [
        Sample(
            id=f"chat-{index:04}",
            image=b"",
            width=0,
            height=0,
            objects=None,
            messages=(
                {"role": "user", "content": f"a {size} {colour} {thing} is on a {place}. what is there?"},
                {"role": "assistant", "content": f"the {place} has a {colour} {thing}, a {size} one."},
            ),
        )
        for index, (size, colour, thing, place) in enumerate(rows)
    ]


def make_data(out: Path) -> None:
    """Write chats and scenes, each with a held-out split, and the random checkpoint."""
    build_tiny_checkpoint(str(out / "tiny"))
    rows = chats()
    write_split(iter(rows[HELD_OUT:]), str(out / "chat"), "train")
    write_split(iter(rows[:HELD_OUT]), str(out / "chat"), "val")
    for split, (count, seed) in SCENES.items():
        scenes = iter_samples(num_samples=count, seed=seed, image_size=112, max_objects=3)
        write_split(scenes, str(out / "scenes"), split)


def run(yaml: str, folder: Path, steps: int, keys: Sequence[str], only: str | None = None) -> dict[str, float]:
    """Train and return the scores of the last evaluation; `only`: of the training streams, this one alone."""
    length = [f"trainer.{key}={steps}ba" for key in ("max_duration", "eval_interval", "save_interval")]
    config: RecipeConfig = load_config(str(ROOT / yaml), [f"run_folder={folder}", *SHARED, *length, *keys])
    if only is not None:
        stream = {key: value for key, value in config.train_loader.streams[only].items() if key != "proportion"}
        config = replace(config, train_loader=replace(config.train_loader, streams={only: stream}))
    check_config(config)
    trainer = train(config)
    scores = {name: float(value) for name, value in trainer.state.eval_metric_values.items()}
    trainer.close()
    return scores


def teach_chats(out: Path, steps: int) -> Path:
    """Train the language model alone on the chats; return its export."""
    streams = [f"{part}_loader.streams={{shapes: {{local: {out}/chat}}}}" for part in ("train", "eval")]
    splits = ["train_loader.streams.shapes.split=train", "eval_loader.streams.shapes.split=val"]
    keys = ["teachers.stream=null", "teachers.num_teachers=0", "detection_head=null", "prompt.student_answer=true"]
    keys += [f"model.pretrained_model_name_or_path={out}/tiny", "evaluation.num_logged_images=0"]
    scores = run("yamls/quickstart.yaml", out / "base_run", steps, [*streams, *splits, *keys])
    print(f"base: loss of held-out answers {scores['loss_lm_student']:.3f}")
    base = out / "base"
    checkpoint = out / "base_run" / "checkpoints" / "latest-rank0.pt"
    export(parse_export(["--checkpoint", str(checkpoint), "--out", str(base)]))
    return base


def main() -> None:
    """Make data and base model, train twice, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/retention"))
    parser.add_argument("--chat-steps", type=int, default=150, help="of the base model")
    parser.add_argument("--steps", type=int, default=150, help="of each run on the base model")
    args = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    make_data(args.out)
    base = teach_chats(args.out, args.chat_steps)
    keys = [*SMALL, f"model.pretrained_model_name_or_path={base}", "detection_head.pretrained=false"]
    keys += [f"train_loader.streams.main.local={args.out}/scenes", f"train_loader.streams.chat.local={args.out}/chat"]
    keys += [f"eval_loader.streams.main.local={args.out}/scenes", f"evaluation.retention.stream.local={args.out}/chat"]
    names = ("retention_kl", "retention_loss", "retention_base_loss", "box_ap50", "box_ap")
    print(f"| chats | {' | '.join(names)} |\n| --- |{' ---: |' * len(names)}")
    for words, only in (("none", "main"), ("20 %", None)):
        scores = run("yamls/joint_chat.yaml", args.out / words.split()[0], args.steps, keys, only)
        print(f"| {words} | {' | '.join(f'{scores[name]:.3f}' for name in names)} |", flush=True)
        print(json.dumps({"chats": words, **{name: scores[name] for name in names}}))


if __name__ == "__main__":
    main()
