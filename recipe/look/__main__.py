"""Look at a converted data set: `python -m recipe.look OUT --split train`; see --help.

It writes one page that any browser opens from disk: warnings first, then counts, then images with their boxes. The
numbers come from the records next to the index, in one pass; of the shards only the shown images are read.
"""

import sys

from recipe.console import setup_logging
from recipe.look.options import MAX_PIXELS, parse

if __name__ == "__main__":
    setup_logging()
    try:
        parse(sys.argv[1:])  # before the imports below, which take seconds
    except ValueError as failure:
        sys.exit(f"error: {failure}")

import argparse
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from convert.annotated import REJECTED_FILE
from recipe.config import ConfigError, DetectionHeadConfig, RecipeConfig
from recipe.data.encode import Encoder
from recipe.data.image import image_spec
from recipe.gallery import check_out
from recipe.load import load_processor
from recipe.look.counts import Contents, read_rejected
from recipe.look.judge import Copies, Limits, judge
from recipe.look.page import Look, render, summary_line
from recipe.models.vlm import read_hf_config
from recipe.prediction.files import write_json_text
from recipe.records import INDEX_FILE, RECORDS_FILE, parse_index, read_image_hashes, read_records
from recipe.schema import ImageSpec, Sample

# Of Qwen2.5-VL, if no checkpoint says otherwise.
_SPEC = ImageSpec(14, 2, 3136, MAX_PIXELS, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


def main(args: argparse.Namespace) -> Look:
    """Write the page and print a summary; return what the page shows.

    Raises:
        ValueError: The data set is damaged, empty or without records, the checkpoint cannot be read, or the page would
            overwrite something.
    """
    check_out(args.out, args.overwrite)
    folder: Path = args.folder
    index = read_index(folder)
    spec, encoder, tokens_unknown = read_checkpoint(args.checkpoint, args.config, args.max_pixels)
    contents = Contents(spec, args.num_images, encoder)
    total = sum(shard["samples"] for shard in index["shards"])
    contents.read(tqdm(read_records(folder / RECORDS_FILE, index), total=total, unit=" samples", disable=None))
    rejected = read_rejected(Path(args.set, REJECTED_FILE), args.split)
    look = Look(
        title=" / ".join(filter(None, (Path(args.set).resolve().name, args.split))),
        contents=contents,
        warnings=judge(contents, rejected, find_copies(folder, Path(args.set), args.split), limits_of(args.config)),
        rejected=rejected,
        tokens_unknown=tokens_unknown,
        images=read_images(
            folder, index, [place for best in (contents.spread, *contents.shown.values()) for place, _ in best.found()]
        ),
    )
    try:
        write_json_text(args.out, render(look))
    except OSError as error:
        raise ValueError(f"cannot write {args.out} ({error}): give another --out") from error
    print(f"{look.title}: {summary_line(contents, rejected)}")
    print("\n".join(f"  ! {warning}" for warning in look.warnings) or "  nothing unusual was found")
    print(f"{args.out} ({args.out.stat().st_size / 2**20:.1f} MiB)")
    return look


def read_index(folder: Path) -> dict[str, Any]:
    """Return the parsed index of a data set; raise ValueError if it is damaged, empty or has no records."""
    try:
        index = parse_index(folder / INDEX_FILE)
    except ValueError as error:
        raise ValueError(f"{folder / INDEX_FILE} {error}: convert the data set again") from error
    if not sum(shard["samples"] for shard in index["shards"]):
        raise ValueError(f"{folder} holds no sample: convert the data set again")
    if not (folder / RECORDS_FILE).is_file():
        raise ValueError(f"{folder} has no {RECORDS_FILE} next to its {INDEX_FILE}: convert the data set again")
    return index


def read_checkpoint(
    name: str | None, config: RecipeConfig | None, max_pixels: int | None
) -> tuple[ImageSpec, Encoder | None, str]:
    """Return how images are resized, what counts tokens, and if nothing does why.

    Args:
        name: Of the checkpoint; None: that of `config`, which need not be in reach.
        config: Of a run; None: the defaults.
        max_pixels: None: as `config` or the checkpoint says.

    Raises:
        ConfigError: The checkpoint that is named has no processor.
        ValueError: The largest image is below the smallest.
    """
    settings = RecipeConfig() if config is None else config
    image = replace(settings.image, max_pixels=max_pixels or settings.image.max_pixels)
    wanted = name or (config and config.model.pretrained_model_name_or_path)
    unknown = "Not counted: give --checkpoint, whose tokenizer is then used."
    if wanted:
        try:
            processor = load_processor(wanted)
        except ValueError:
            if name is not None:
                raise
            unknown = f"Not counted: the checkpoint of the config, {wanted}, cannot be read here. Give --checkpoint."
        else:
            spec = image_spec(processor.image_processor, image)
            most, hf_config = sys.maxsize, None
            with suppress(OSError, ConfigError):  # else as Qwen2.5-VL writes boxes
                hf_config = read_hf_config(wanted)
            return spec, Encoder(processor.tokenizer, hf_config, spec, settings.prompt, most, most), ""
    least, most = image.min_pixels or _SPEC.min_pixels, image.max_pixels or _SPEC.max_pixels
    if least > most:
        raise ValueError(f"--max-pixels {most} is below image.min_pixels {least}: raise it")
    return replace(_SPEC, min_pixels=least, max_pixels=most), None, unknown


def limits_of(config: RecipeConfig | None) -> Limits:
    """Return what a run allows."""
    settings = RecipeConfig() if config is None else config
    head = settings.detection_head or DetectionHeadConfig()
    return Limits(head.num_queries, settings.max_seq_len)


def find_copies(folder: Path, out: Path, split: str) -> Copies:
    """Return which images are stored more than once, here or also in another split of the set.

    It holds 8 bytes per sample. Sets without hashes, by an earlier version of `convert/`, count as different.
    """
    own = _hashes(folder)
    shared = {}
    for path in sorted(out.glob(f"*/{INDEX_FILE}")) if split else ():
        name = path.parent.name
        if name != split and (path.parent / RECORDS_FILE).is_file():
            shared[name] = len(np.intersect1d(own, _hashes(path.parent)))
    return Copies(len(own) - len(np.unique(own)), shared)


def _hashes(folder: Path) -> np.ndarray:
    """Return (N,) hashes of the images of a data set."""
    hashes = read_image_hashes(folder / RECORDS_FILE, parse_index(folder / INDEX_FILE))
    return np.fromiter((int(text, 16) for texts in hashes for text in texts if text), np.uint64)


def read_images(folder: Path, index: Mapping[str, Any], positions: Iterable[int]) -> dict[int, bytes]:
    """Return the image files of some samples by their positions in a data set, read one by one.

    Raises:
        ValueError: A shard is missing or damaged.
    """
    from streaming.base.format import reader_from_json

    images: dict[int, bytes] = {}
    wanted, first = sorted(set(positions)), 0
    for shard in index["shards"]:
        here = [position for position in wanted if first <= position < first + shard["samples"]]
        if here:
            name = shard["raw_data"]["basename"]
            try:
                reader = reader_from_json(str(folder), None, dict(shard))
                images |= {position: Sample.from_mds(reader[position - first]).image for position in here}
            except Exception as error:  # Streaming raises whatever a damaged shard leads to
                raise ValueError(
                    f"{folder / name} cannot be read ({type(error).__name__}: {error}): python -m convert.verify "
                    f"--local {folder} says what is wrong"
                ) from error
        first += shard["samples"]
    return images


if __name__ == "__main__":
    try:
        main(parse(sys.argv[1:]))
    except ValueError as failure:
        sys.exit(f"error: {failure}")
