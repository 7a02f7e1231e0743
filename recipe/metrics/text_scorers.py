"""Which scorer compares captions, and METEOR 1.5 itself where this machine can run it."""

import importlib.util
import shutil
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, Protocol

from composer.utils import dist

from recipe.metrics.meteor import MeteorLite


class TextScorer(Protocol):
    """How alike captions are, in [0, 1].

    Attributes:
        name: Part of the name of every metric that depends on it: numbers of two scorers do not compare.
    """

    name: str

    def __call__(self, candidates: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
        """The score of each candidate against all its references together."""
        ...


class Meteor15:
    """METEOR 1.5, English, by `pycocoevalcap`: one Java process, started at the first call. Copies start their own."""

    name = "meteor15"

    def __init__(self):
        self._meteor: Any = None

    def __reduce__(self) -> tuple[Any, ...]:
        """Composer copies metrics; a process cannot be copied."""
        return Meteor15, ()

    def __call__(self, candidates: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
        """The score of each candidate against the best of its references; 0 for one without words.

        Raises:
            RuntimeError: Java does not answer.
        """
        lines = [_one_line(candidate) for candidate in candidates]
        others = [[line for text in own if (line := _one_line(text))] for own in references]
        asked = [index for index, line in enumerate(lines) if line and others[index]]
        scores = [0.0] * len(lines)
        if not asked:
            return scores
        if self._meteor is None:
            from pycocoevalcap.meteor.meteor import Meteor  # pyright: ignore[reportMissingImports] - optional

            self._meteor = Meteor()
        answers: list[float] = []
        try:
            _, answers = self._meteor.compute_score(
                {index: others[index] for index in asked}, {index: [lines[index]] for index in asked}
            )
        except (OSError, ValueError) as error:
            raise RuntimeError("METEOR 1.5 did not answer: check that `java -version` runs, with 2 GB free") from error
        finally:
            if not answers:
                self._stop()
        for index, score in zip(asked, answers, strict=True):
            scores[index] = score
        return scores

    def _stop(self) -> None:
        """Ends Java. A call that failed or was interrupted holds a lock, for which Python's end would wait for ever."""
        meteor, self._meteor = self._meteor, None
        meteor.meteor_p.kill()
        with suppress(OSError):  # what it did not read
            meteor.meteor_p.stdin.close()
        if meteor.lock.locked():
            meteor.lock.release()


def default_text_scorer() -> TextScorer:
    """METEOR 1.5 where Java and `pycocoevalcap` are installed for every rank, else `MeteorLite`.

    All ranks call it together and get the same: what they score is gathered under one name.
    """
    can_run = shutil.which("java") is not None and importlib.util.find_spec("pycocoevalcap") is not None
    return Meteor15() if all(dist.all_gather_object(can_run)) else MeteorLite()


def _one_line(text: str) -> str:
    """Without what the Java process takes for the end of a line or a field."""
    return " ".join(text.replace("|||", " ").split())
