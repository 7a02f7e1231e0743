"""The classes of a data set: the names that its source lists, or else the different captions of its objects."""

from collections.abc import Iterable, Sequence

import numpy as np

from recipe.config import ConfigError
from recipe.data.kept import KeptCount
from recipe.data.lengths import learned_objects
from recipe.data.mapped import Arrays
from recipe.records import CLASSES_FILE
from recipe.schema import Sample
from recipe.upstream.agreement import from_rank_0
from recipe.upstream.checked_stream import CheckedStream

MOST_CLASSES = 2000  # more are open captions; LVIS has 1,203 categories


def read_classes(streams: Sequence[CheckedStream]) -> list[str]:
    """Return the classes of all streams; global rank 0 reads them and broadcasts, all ranks must call it.

    Those of a stream are the lines of `CLASSES_FILE` next to its index, in that order, or else the different captions
    of its objects, sorted, crowds left out.

    Raises:
        ConfigError: There are more than `MOST_CLASSES`.
        ValueError: A stream has neither `CLASSES_FILE` nor records.
    """
    names = from_rank_0(lambda: list(dict.fromkeys(name for stream in streams for name in _of_stream(stream))))
    if len(names) > MOST_CLASSES:
        raise ConfigError(
            f"evaluation.classes is data, but the training set has more than {MOST_CLASSES} different captions, so "
            "these are open captions and no classes: leave it out, or give a list of names"
        )
    return names


def _of_stream(stream: CheckedStream) -> list[str]:
    path = stream.fetch_next_to_index(CLASSES_FILE)
    if path is None:
        return _KEPT_CAPTIONS.of(stream)["captions"].tolist()
    return [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def _different_captions(samples: Iterable[Sample]) -> Arrays:
    found: set[str] = set()
    for sample in samples:
        found.update(item.caption for item in learned_objects(sample))
        if len(found) > MOST_CLASSES:
            break
    return {"captions": np.array(sorted(found)[: MOST_CLASSES + 1], dtype=np.str_)}


_KEPT_CAPTIONS = KeptCount(
    name="captions",
    fingerprint=str(MOST_CLASSES),
    what="different captions",
    remedy="give evaluation.classes a list of names",
    count=_different_captions,
)
