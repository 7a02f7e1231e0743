"""Choose a diverse pool of teachers from a converted data set, into an MDS folder of its own.

    python -m convert.teachers --local OUT --split train --out POOL --num-samples 32 --seed 1

Each pick adds the most captions that the pool lacks; among equals, and once all captions are there, the one whose
object count and object size are farthest from those picked. The pool is in the order of picking, so its first
samples say the most. Only annotated samples with an image and an object that is not a crowd can be teachers.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from convert.verify import check_shard, read_index
from convert.write import WRITE_OPTIONS, build_parser, parse_args, report, write_split
from recipe.redact import redact
from recipe.schema import Sample

if TYPE_CHECKING:
    from streaming import StreamingDataset


@dataclass(frozen=True)
class Candidate:
    """What the choice looks at.

    Attributes:
        index: Position in the data set.
        captions: Of the objects that are not crowds.
        num_objects: That are not crowds.
        object_size: Mean side of the boxes, as a share of the image's.
    """

    index: int
    captions: frozenset[str]
    num_objects: int
    object_size: float


def candidate(index: int, sample: Sample) -> Candidate | None:
    """Return the sample as a candidate, None if it cannot teach."""
    objects = [item for item in sample.objects or () if not item.iscrowd]
    if not objects or not sample.image or sample.further:
        return None
    areas = [(item.box[2] - item.box[0]) * (item.box[3] - item.box[1]) for item in objects]
    sides = np.sqrt(np.asarray(areas) / (sample.width * sample.height))
    return Candidate(index, frozenset(item.caption for item in objects), len(objects), float(sides.mean()))


def choose(candidates: Sequence[Candidate], num_samples: int, seed: int) -> list[int]:
    """Return the `index` of the picked candidates, in the order of picking; `seed` decides between equals.

    Raises:
        ValueError: There are fewer than `num_samples`.
    """
    if len(candidates) < num_samples:
        raise ValueError(
            f"{num_samples} teachers asked, but only {len(candidates)} samples can be one (annotated, with one "
            "image and an object that is not a crowd): lower --num-samples"
        )
    features = np.log([(item.num_objects, item.object_size) for item in candidates]).reshape(-1, 2)
    features = (features - features.min(axis=0)) / np.maximum(np.ptp(features, axis=0), 1e-12)
    luck = np.random.default_rng(seed).permutation(len(candidates))
    distance = np.full(len(candidates), np.inf)  # to the nearest picked one; -1 for the picked themselves
    missing = [set(item.captions) for item in candidates]  # captions that the pool lacks
    picked: list[int] = []
    for _ in range(num_samples):
        gains = np.where(distance >= 0, [len(captions) for captions in missing], -1)
        best = int(np.lexsort((luck, distance, gains))[-1])
        picked.append(best)
        for captions in missing:
            captions.difference_update(candidates[best].captions)
        distance = np.minimum(distance, np.linalg.norm(features - features[best], axis=1))
        distance[picked] = -1
    return [candidates[position].index for position in picked]


def iter_samples(dataset: "StreamingDataset", num_samples: int, seed: int) -> Iterator[Sample]:
    """Yield what `choose` picks from a converted data set, which is read twice."""
    found = (candidate(index, Sample.from_mds(dataset[index])) for index in range(dataset.num_samples))
    for index in choose([item for item in found if item is not None], num_samples, seed):
        yield Sample.from_mds(dataset[index])


def main() -> None:
    """Run the command line."""
    parser = build_parser("teachers", __doc__)
    parser.add_argument(
        "--local", required=True, type=os.path.expanduser, help="the data set's folder, or the cache of --remote"
    )
    parser.add_argument("--remote", help="the data set's object-store address")
    parser.add_argument("--split", metavar="NAME", help="folder of the shards under --local and --remote")
    parser.add_argument("--num-samples", type=int, required=True, metavar="N", help="size of the pool")
    parser.add_argument("--seed", type=int, default=0, help="decides between equals")
    args = parse_args(parser, with_split=False)
    from streaming import StreamingDataset  # imports torch

    folder = Path(args.local, args.split or "")
    try:
        dataset = StreamingDataset(local=args.local, remote=args.remote, split=args.split, batch_size=1)
        shards = read_index(folder)["shards"]
        for number in range(dataset.num_shards):
            dataset.prepare_shard(number)
    except (OSError, RuntimeError, ValueError) as error:
        where = redact(f"{args.remote or args.local}, split {args.split}: {error}")
        parser.exit(1, f"error: no data set at {where}\n")
    # Streaming checks no file that is there already.
    problems = [line for shard in shards for line in check_shard(folder, shard, decode=False)[1]]
    if problems:
        parser.exit(1, "".join(f"error: {problem}\n" for problem in problems))
    options = {name: getattr(args, name) for name in WRITE_OPTIONS}
    samples = iter_samples(dataset, args.num_samples, args.seed)
    report(lambda: {"": write_split(samples, args.out, "", **options)}, args.out)


if __name__ == "__main__":
    main()
