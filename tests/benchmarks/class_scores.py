"""Time scoring a class list next to writing greedy captions: `python tests/benchmarks/class_scores.py SHARED_DATA`.

The caption decoder is random, of head.yaml's size on Qwen2.5-VL-3B's vocabulary; objects are as many as an image keeps
at most. The classes are COCO's 80 and LVIS's 1,203, with the true tokenizer. Captions are cut at the mean and at the
longest length of the classes as captions; a trained decoder stops when the longest of a batch has ended. Times are CPU
time of one thread, the median of five, alternating. The last line is JSON: `ratio_80` and `ratio_1203`, scoring over
captions of the mean length.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor
from torch.nn import functional as F

from real_sets import build_qwen_tokenizer
from recipe.models.caption_decoder import CaptionDecoder
from recipe.prediction.classes import build_trie, class_probabilities
from recipe.prediction.decode import generate_captions
from recipe.schema import CaptionPlaces, Memory

IMAGES, OBJECTS, MEMORY = 2, 100, 600  # per image: objects, memory tokens
HIDDEN, WIDTH, VOCABULARY, END = 2048, 256, 151936, 151645
REPEATS = 5


def seconds(function: Callable[[], object]) -> float:
    """Return the CPU time of one call."""
    started = time.process_time()
    function()
    return time.process_time() - started


def main() -> None:
    """Time both and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shared", type=Path, help="folder of `labels` and `tokenizer`")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    with TemporaryDirectory() as folder:
        tokenizer = build_qwen_tokenizer(args.shared / "tokenizer", Path(folder))
    labels = args.shared / "labels"
    coco = [entry["name"] for entry in json.loads((labels / "coco80_names.json").read_text())]
    lvis = [entry["name"].replace("_", " ") for entry in json.loads((labels / "lvis_v1_categories.json").read_text())]
    weight = torch.randn(VOCABULARY, HIDDEN) * 0.02
    decoder = CaptionDecoder(HIDDEN, WIDTH, 8, 2, 4, 0.0, 32).eval()
    image = torch.arange(IMAGES).repeat_interleave(OBJECTS)
    places = CaptionPlaces(image, torch.arange(OBJECTS).repeat(IMAGES), IMAGES, OBJECTS)
    tokens, positions = torch.randn(2, IMAGES, MEMORY, WIDTH)
    memory = Memory(tokens, positions, torch.ones(IMAGES, MEMORY, dtype=torch.bool), torch.zeros(IMAGES, MEMORY, 4))
    found = (torch.randn(len(image), WIDTH), torch.rand(len(image), 4), places, memory)

    def embed(ids: Tensor) -> Tensor:
        return F.embedding(ids, weight)

    ratios: dict[str, float] = {}
    for names in (coco, list(dict.fromkeys(lvis))):
        trie = build_trie(names, tokenizer, END, 32)
        lengths = [len(tokenizer(name)["input_ids"]) + 1 for name in names]  # pyright: ignore[reportArgumentType]
        kinds: dict[str, Callable[[], object]] = {
            "scores": lambda trie=trie: class_probabilities(
                decoder, trie, *found, embed, lambda states, ids: F.linear(states, weight[ids])
            )
        }
        for length in (round(statistics.mean(lengths)), max(lengths)):

            def write(length: int = length) -> Tensor:
                decoder.max_caption_tokens = length
                # No token ends a caption before the cut.
                return generate_captions(decoder, *found, embed, lambda states: F.linear(states, weight), -1)

            kinds[f"captions of {length} tokens"] = write
        times: dict[str, list[float]] = {name: [] for name in kinds}
        for _ in range(REPEATS):
            for name, kind in kinds.items():
                times[name].append(seconds(kind))
        medians = {name: statistics.median(values) for name, values in times.items()}
        shown = ", ".join(f"{name} {value:.2f} s" for name, value in medians.items())
        print(f"{len(names)} classes, {len(trie.tree.depths)} nodes, {len(image)} objects: {shown}", flush=True)
        scoring, captions, *_ = medians.values()
        ratios[f"ratio_{len(names)}"] = round(scoring / captions, 3)
    print(json.dumps(ratios))


if __name__ == "__main__":
    main()
