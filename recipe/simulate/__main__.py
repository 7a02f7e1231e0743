"""Simulate a run on many nodes, on paper: `python -m recipe.simulate YAML [key.sub=value ...] [--nodes N ...]`.

Nothing is loaded and no GPU is needed. It prints the step's time by part, the communication that FSDP cannot hide, what
loaders and store must deliver, checkpoints, and the work that failures cost. The rate of a GPU comes from `make gpu`'s
line of JSON if it is given. All else is assumed, and named below the table; each has an option. `costs.py` has the
formulas.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recipe.config import ConfigError, RecipeConfig
from recipe.configure import from_command_line, one_line_errors, parser_of
from recipe.estimate import CAPTION_TOKENS, OBJECTS, SUPERVISED, build_on_meta, microbatch_shape, moment_bytes
from recipe.simulate.costs import Cluster, Unit, Work, simulate
from recipe.upstream.trainer_section import view_trainer

if TYPE_CHECKING:
    from torch import nn

    from recipe.models.network import JointNetwork

USAGE = "python -m recipe.simulate YAML [key.sub=value ...] [--nodes N ...] [--gpus-per-node N] [--measured FILE]"
EXAMPLES = """  python -m recipe.simulate yamls/joint_fsdp.yaml --nodes 8 64 512
  python -m recipe.simulate yamls/joint_fsdp.yaml --nodes 8 64 512 --hybrid --json
  make gpu | tail -n 1 > gpu.json; python -m recipe.simulate yamls/joint_fsdp.yaml --nodes 8 --measured gpu.json"""
TERA, GIGA, MICRO = 1e12, 1e9, 1e-6
TOKENS_PER_IMAGE = 256  # as in recipe.estimate
# {option: (default, unit, what it is)}; all of them are printed as assumed, unless they were given.
ASSUMED: Mapping[str, tuple[float, float, str]] = {
    "peak-tflops": (989, TERA, "TFLOP/s of one GPU at its best in the run's precision (H100 SXM, bf16, dense)"),
    "mfu": (0.35, 1, "share of it that model FLOPs reach in training"),
    "node-link": (450 * 0.8, GIGA, "GB/s of a GPU within its node, one direction (NVLink 4, four fifths of it)"),
    "net-link": (50 * 0.8, GIGA, "GB/s of a GPU to other nodes, one direction (400 Gb/s, four fifths of it)"),
    "node-hop": (2, MICRO, "microseconds of a message from GPU to GPU within a node"),
    "net-hop": (10, MICRO, "microseconds of a message from node to node"),
    "image-kb": (100, 1e3, "kB of an image as stored"),
    "disk": (2, GIGA, "GB/s of a node's disk, for checkpoints"),
    "store": (1, GIGA, "GB/s of a node to the object store"),
    "failures": (4.7e-4, 1, "failures per GPU and day that end a run (419 in 54 days of 16,384 GPUs, Llama 3)"),
    "restart": (600, 1, "seconds from a failure to the next step"),
}


def trained_groups(config: RecipeConfig, network: "JointNetwork") -> set[str]:
    """Return the parameter groups that have a learning rate."""
    from recipe.optim.groups import group_parameters

    return {group for group in group_parameters(network) if getattr(config.optimizer, f"lr_{group}")}


def typical_batch(network: "JointNetwork", tokens: int, patches: int) -> dict[str, Any]:
    """Return the fields of one microbatch that `step_flops` reads; its content is what `recipe.estimate` assumes."""
    import torch

    merge = network.vlm.hf_model.model.visual.spatial_merge_size
    images = max(1, tokens // TOKENS_PER_IMAGE)
    side = max(1, round((patches / images) ** 0.5 / merge)) * merge
    captions = torch.zeros(OBJECTS, CAPTION_TOKENS, dtype=torch.long)
    target = {"boxes": torch.zeros(OBJECTS, 4), "caption_ids": captions}
    return {
        "input_ids": torch.zeros(1, tokens, dtype=torch.long),
        "segment_lengths": [tokens // images] * images,
        "labels": torch.zeros(round(SUPERVISED * tokens), dtype=torch.long),
        "image_grid_thw": torch.tensor([[1, side, side]] * images),
        "student_images": torch.arange(images),
        "prompt_index": torch.zeros(images, max(1, tokens // images // 8), dtype=torch.long),
        "targets": [target] * images,
        "contents": [],
    }


def fsdp_units(network: "JointNetwork", trained: set[str]) -> list[Unit]:
    """Return the root, which holds what no other unit does, and the blocks; what they gather and what they sum.

    Weights of the backbone are gathered in bfloat16 and their gradients summed in float32; the head's are float32.
    """
    from recipe.optim.fsdp import BACKBONE_UNITS, HEAD_UNITS
    from recipe.optim.groups import group_of

    owners: dict[int, tuple[str, nn.Module]] = {}  # the innermost unit of each parameter
    members: dict[str, list[tuple[int, int]]] = {"": []}
    for name, module in network.named_modules():  # outer ones come first
        in_full = isinstance(module, HEAD_UNITS)
        if in_full or type(module).__name__ in BACKBONE_UNITS:
            members[name] = []
            owners |= {id(parameter): (name, module) for parameter in module.parameters()}
    for name, parameter in network.named_parameters():
        owner, module = owners.get(id(parameter), ("", network))
        width = 4 if isinstance(module, HEAD_UNITS) else 2
        size = parameter.numel()
        members[owner].append((width * size, 4 * size if group_of(name) in trained else 0))
    return [Unit(sum(each for each, _ in unit), sum(each for _, each in unit)) for unit in members.values() if unit]


def checkpoint_bytes(config: RecipeConfig, network: "JointNetwork", trained: set[str]) -> int:
    """Return the bytes of trained weights and their moments; frozen weights are in no checkpoint."""
    from recipe.optim.groups import group_parameters

    return sum(
        parameter.numel() * parameter.element_size() + moment_bytes(parameter, config.optimizer.moments)
        for group, members in group_parameters(network).items()
        if group in trained
        for _, parameter in members
    )


def work_of(config: RecipeConfig, network: "JointNetwork", packs_per_gpu: int, bytes_per_image: float) -> Work:
    """Return what one GPU does in a step with `packs_per_gpu` packs."""
    from recipe.callbacks.throughput import step_flops

    view, trained = view_trainer(config), trained_groups(config, network)
    if packs_per_gpu % (view.microbatch_size or packs_per_gpu):
        raise ConfigError(
            f"{packs_per_gpu} packs per GPU are no multiple of trainer.device_train_microbatch_size "
            f"{view.microbatch_size}: give another --packs-per-gpu"
        )
    tokens, patches = microbatch_shape(config, network.vlm.hf_model.config.vision_config.spatial_merge_size)
    flops = step_flops(network, [typical_batch(network, tokens, patches)], trained).model  # pyright: ignore
    sums = {"vision": flops["vision"] + flops["merger"], "llm": flops["llm"], "head": flops["detection"]}
    interval = str(view.keywords.get("save_interval", "1ep"))
    units = fsdp_units(network, trained)
    return Work(
        flops=sums,
        microbatches=packs_per_gpu // (view.microbatch_size or packs_per_gpu),
        tokens=tokens,
        images=max(1, tokens // TOKENS_PER_IMAGE),
        bytes_per_image=bytes_per_image,
        units=units,
        replicated=0 if view.is_sharded else sum(unit.reduced for unit in units),
        reshards=(view.fsdp or {}).get("reshard_after_forward", True) is not False,
        checkpoint=checkpoint_bytes(config, network, trained),
        is_sharded=view.saves_shards,
        save_interval=int(interval.removesuffix("ba")) if interval.endswith("ba") else 1000,
    )


def measured_rate(path: Path) -> tuple[float, str]:
    """Return the model FLOPs per second that a GPU reached in `make gpu`'s largest whole step, and which one it was.

    Raises:
        ConfigError: The file is not that line of JSON, or has no whole step.
    """
    try:
        report = json.loads(path.read_text())
        steps = {
            name: figures["tflops"] * TERA / figures["ms"] * 1e3
            for name, figures in report["figures"].items()
            if name.startswith("step full ") and "tflops" in figures
        }
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"--measured {path} is not the line of JSON that `make gpu` ends with: {error}") from error
    if not steps:
        raise ConfigError(f"--measured {path} has no figure `step full`: run `make gpu` again with --parts step_full")
    name = max(steps, key=lambda each: int(each.split()[-1]))
    return steps[name], f"{name}, {report['size']}, on {report['card']}"


ROWS: Sequence[tuple[str, str, float]] = (  # key, words, divisor
    ("vision", "vision, ms", 1e-3),
    ("llm", "language model, ms", 1e-3),
    ("head", "head, ms", 1e-3),
    ("communication", "communication, ms", 1e-3),
    ("exposed", "  of it not hidden, ms", 1e-3),
    ("step", "step, ms", 1e-3),
    ("tokens_per_s_per_gpu", "tokens/s per GPU", 1),
    ("efficiency", "speed per GPU, of the first", 1),
    ("images_per_s_per_node", "images/s per node", 1),
    ("images_per_s", "images/s", 1),
    ("store_bytes_per_s", "from the store, GB/s", GIGA),
    ("checkpoint_s", "checkpoint to disk, s", 1),
    ("upload_s", "checkpoint to the store, s", 1),
    ("failures_per_day", "failures per day", 1),
    ("lost_hours_per_day", "lost per day, h", 1),
    ("best_interval_steps", "best save_interval, steps", 1),
    ("lost_hours_per_day_at_best", "  then lost per day, h", 1),
)


def table(columns: Sequence[Mapping[str, Any]], notes: Sequence[str]) -> str:
    """Return the text that the command prints."""
    heads = [("nodes", "nodes"), ("gpus", "GPUs"), ("packs", "packs per step")]
    lines = [f"{words:<28}" + "".join(f"{column[key]:>12,}" for column in columns) for key, words in heads]
    for key, words, unit in ROWS:
        lines.append(f"{words:<28}" + "".join(f"{column[key] / unit:>12,.4g}" for column in columns))
    return "\n".join([*lines, "", *notes])


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add what the command takes in addition to a yaml and overrides."""
    parser.add_argument("--nodes", type=int, nargs="+", default=[1], metavar="N", help="numbers of nodes; default 1")
    parser.add_argument("--gpus-per-node", type=int, default=8, metavar="N", help="default %(default)s")
    parser.add_argument("--packs-per-gpu", type=int, metavar="N", help="per step; default: as the yaml on the first N")
    parser.add_argument("--hybrid", action="store_true", help="shard within a node, replicate across")
    parser.add_argument("--measured", type=Path, metavar="FILE", help="the line of JSON that `make gpu` ends with")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    for name, (default, _, words) in ASSUMED.items():
        parser.add_argument(
            f"--{name}", type=float, metavar="X", help=f"{words}; default {default:g}".replace("%", "%%")
        )


def cluster_of(args: argparse.Namespace) -> tuple[Cluster, float, list[str]]:
    """Return the machines, the bytes of an image, and what of it is assumed, given or measured."""
    values, notes = {}, []
    for name, (default, unit, words) in ASSUMED.items():
        given = getattr(args, name.replace("-", "_"))
        if given is not None and not given > 0 and not (given == 0 and name in ("failures", "restart")):
            raise ConfigError(f"--{name} is {given:g}: give a number above 0")
        values[name] = (default if given is None else given) * unit
        notes.append(f"{'assumed' if given is None else 'given':<10}{default if given is None else given:>8g}  {words}")
    rate = values["peak-tflops"] * values["mfu"]
    if args.measured is not None:
        rate, where = measured_rate(args.measured)
        notes[:2] = [f"{'measured':<10}{rate / TERA:>8.4g}  TFLOP/s that model FLOPs reach in training: {where}"]
    cluster = Cluster(
        gpus_per_node=args.gpus_per_node,
        flops_per_second=rate,
        link_in_node=values["node-link"],
        link_between_nodes=values["net-link"],
        hop_in_node=values["node-hop"],
        hop_between_nodes=values["net-hop"],
        disk_per_node=values["disk"],
        store_per_node=values["store"],
        failures_per_gpu_day=values["failures"],
        restart=values["restart"],
    )
    return cluster, values["image-kb"], notes


def main(arguments: Sequence[str]) -> None:
    """Print the simulation for a yaml that `train.py` accepts; on a mistake print one line and exit with status 2."""
    parser = parser_of(USAGE, "Simulate a run on many nodes, on paper; nothing is loaded.", EXAMPLES)
    add_options(parser)
    with one_line_errors():
        config, args = from_command_line(parser, arguments)
        for name in ("nodes", "gpus_per_node", "packs_per_gpu"):
            value = getattr(args, name)
            if value is not None and min(value if name == "nodes" else [value]) < 1:
                raise ConfigError(f"--{name.replace('_', '-')} is {value}: give 1 or more")
        cluster, bytes_per_image, notes = cluster_of(args)
        first = args.nodes[0] * args.gpus_per_node
        packs = args.packs_per_gpu or max(1, config.train_loader.global_batch_size // first)
        if args.hybrid and not view_trainer(config).is_sharded:
            raise ConfigError("--hybrid shards parameters, but trainer.parallelism_config has no fsdp: set it")
        work = work_of(config, build_on_meta(config), packs, bytes_per_image)
        columns: list[dict[str, Any]] = []
        for nodes in args.nodes:
            found = simulate(work, nodes, cluster, args.hybrid)
            gpus = nodes * args.gpus_per_node
            speed = (columns[0] if columns else found)["tokens_per_s_per_gpu"]
            ratio = found["tokens_per_s_per_gpu"] / speed
            columns.append({"nodes": nodes, "gpus": gpus, "packs": gpus * packs, **found, "efficiency": ratio})
        if args.json:
            print(json.dumps({"columns": columns, "notes": notes}))
        else:
            print(table(columns, notes))


if __name__ == "__main__":
    main(sys.argv[1:])
