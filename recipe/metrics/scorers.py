"""Score one caption against another: METEOR 1.5 where Java and its package are installed, else `MeteorLite`."""

import importlib.util
import re
import shutil
import unicodedata
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

from composer.utils import dist
from snowballstemmer.english_stemmer import EnglishStemmer


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


# METEOR 1.5's own for English.
ALPHA, BETA, GAMMA, DELTA = 0.85, 0.20, 0.60, 0.75
STEM_WEIGHT = 0.6
BEAM_SIZE = 40

FUNCTION_WORDS = """
a about after all also an and any are as at be because been before being both but by can could did do does during each
for from had has have he her here him his how i if in into is it its may me more most my no not of off on one only or
other our out over she should so some such than that the their them then there these they this those through to too
under up us very was we were what when where which while who whom whose why will with would you your
"""  # words that say little on their own; METEOR 1.5 has a list of its own, drawn from a corpus


@dataclass(frozen=True)
class Alignment:
    """Which words of a candidate stand for which of a reference.

    Attributes:
        pairs: (position in the candidate, position in the reference), by rising candidate position.
        num_chunks: Runs of pairs that are neighbours in both.
        distance: Sum of the differences of the positions.
        used: Bits of the reference positions taken.
    """

    pairs: tuple[tuple[int, int], ...] = ()
    num_chunks: int = 0
    distance: int = 0
    used: int = 0

    @property
    def rank(self) -> tuple[int, int, int]:
        """More words first, then fewer chunks, then straighter pairs."""
        return -len(self.pairs), self.num_chunks, self.distance

    def with_pair(self, candidate: int, reference: int) -> "Alignment":
        """One pair more."""
        continues = bool(self.pairs) and self.pairs[-1] == (candidate - 1, reference - 1)
        return Alignment(
            (*self.pairs, (candidate, reference)),
            self.num_chunks + (not continues),
            self.distance + abs(candidate - reference),
            self.used | 1 << reference,
        )


class MeteorLite:
    """METEOR 1.5 for English with two of its four stages: exact words and stems.

    Missing are its synonyms (WordNet) and paraphrases (a table of 60 MB), so a caption in other words mostly scores
    lower; punctuation is dropped, words keep their apostrophes, and the function words are our list. With METEOR's own
    function words and without those two stages, scores are equal where no word has an apostrophe, no stem occurs
    twice in a sentence, and Snowball 3 stems the words as METEOR's older Snowball does (it stems 56 of 164,835 words in
    another way). Where a stem occurs twice, METEOR drops stem matches that compete, as it counts half a match as none,
    and we do not. In other languages equal words still count.

    Args:
        function_words: Separated by blanks. They weigh 1 - `DELTA`, others `DELTA`.
    """

    name = "meteor_lite2"  # 2: stems of Snowball 3; `meteor_lite` had those of METEOR 1.5

    def __init__(self, function_words: str = FUNCTION_WORDS):
        self.function_words = frozenset(function_words.split())

    def __call__(self, candidates: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
        """Of each candidate the best score against one of its references, in [0, 1]; 0 without references."""
        return [
            max((self.score(words_of(candidate), words_of(reference)) for reference in own), default=0.0)
            for candidate, own in zip(candidates, references, strict=True)
        ]

    def score(self, candidate: Sequence[str], reference: Sequence[str]) -> float:
        """Of one pair of sentences, in words."""
        found = align(candidate, reference)
        if not found.pairs:
            return 0.0
        weights = [1.0 if candidate[i] == reference[j] else STEM_WEIGHT for i, j in found.pairs]
        precision = self._share(weights, [candidate[i] for i, _ in found.pairs], candidate)
        recall = self._share(weights, [reference[j] for _, j in found.pairs], reference)
        mean = 1 / ((1 - ALPHA) / precision + ALPHA / recall)
        if found.num_chunks == 1 and len(found.pairs) == len(candidate) == len(reference):
            return mean
        return mean * (1 - GAMMA * (found.num_chunks / len(found.pairs)) ** BETA)

    def _share(self, weights: Sequence[float], matched: Sequence[str], words: Sequence[str]) -> float:
        """The weighted share of `words` that is `matched`, content words counting more."""
        hits = sum(weight * self._importance(word) for weight, word in zip(weights, matched, strict=True))
        return hits / sum(self._importance(word) for word in words)

    def _importance(self, word: str) -> float:
        return 1 - DELTA if word in self.function_words else DELTA


@lru_cache(maxsize=100_000)
def stem(word: str) -> str:
    """Return the stem of a lower-case English word."""
    return EnglishStemmer().stemWord(word)


def align(candidate: Sequence[str], reference: Sequence[str]) -> Alignment:
    """The best one-to-one alignment of equal words and stems, by METEOR's beam search."""
    stems = [stem(word) for word in reference]
    beam = [Alignment()]
    for position, word in enumerate(candidate):
        own = stem(word)
        places = [place for place, other in enumerate(stems) if other == own]
        longer = [kept.with_pair(position, place) for kept in beam for place in places if not kept.used >> place & 1]
        beam = sorted(longer + beam, key=lambda kept: kept.rank)[:BEAM_SIZE]
    return beam[0]


# Scripts written without blanks, compared character by character.
_UNSPACED = re.compile("([\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff])")
_APOSTROPHES = str.maketrans({"\u2019": "'", "\u02bc": "'"})


def words_of(text: str) -> list[str]:
    """Lower-case words without punctuation; an apostrophe inside a word stays, a character of Chinese is a word."""
    text = unicodedata.normalize("NFC", text).translate(_APOSTROPHES).lower()
    kept = "".join(character if _belongs_to_word(character) else " " for character in text)
    return [word for part in _UNSPACED.sub(r" \1 ", kept).split() if (word := part.strip("'"))]


def _belongs_to_word(character: str) -> bool:
    return character == "'" or unicodedata.category(character)[0] not in "PSZC"
