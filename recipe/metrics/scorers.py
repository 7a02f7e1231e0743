"""Score one caption against another: METEOR 1.5 if Java and its package are installed, else `MeteorLite`."""

import importlib.util
import re
import shutil
import unicodedata
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any, Protocol

from composer.utils import dist
from snowballstemmer.english_stemmer import EnglishStemmer


class TextScorer(Protocol):
    """Scores how similar captions are, in [0, 1]."""

    name: str  # part of the name of every metric that uses it, as two scorers are not comparable

    def __call__(self, candidates: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
        """Return the score of each candidate against all its references together."""
        ...


class Meteor15:
    """METEOR 1.5 for English by `pycocoevalcap`: one Java process per copy, started at the first call."""

    name = "meteor15"

    def __init__(self):
        self._meteor: Any = None

    def __reduce__(self) -> tuple[Any, ...]:
        """Copy without the process: Composer copies metrics."""
        return Meteor15, ()

    def __call__(self, candidates: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
        """Return the best score of each candidate over its references, 0 without words; RuntimeError if Java fails."""
        # METEOR counts punctuation as words, and its own use strips it first: coco-caption, `PTBTokenizer`.
        lines = [" ".join(words_of(candidate)) for candidate in candidates]
        others = [[line for text in own if (line := " ".join(words_of(text)))] for own in references]
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
        """Kill Java and release the lock of a failed call, for which Python's exit would wait indefinitely."""
        meteor, self._meteor = self._meteor, None
        meteor.meteor_p.kill()
        with suppress(OSError):  # what it did not read
            meteor.meteor_p.stdin.close()
        if meteor.lock.locked():
            meteor.lock.release()


def default_text_scorer() -> TextScorer:
    """Return METEOR 1.5 if every rank has Java and `pycocoevalcap`, else `MeteorLite`; all ranks call it together."""
    can_run = shutil.which("java") is not None and importlib.util.find_spec("pycocoevalcap") is not None
    return Meteor15() if all(dist.all_gather_object(can_run)) else MeteorLite()


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
    """Pairs of words of a candidate and a reference."""

    pairs: tuple[tuple[int, int], ...] = ()  # (candidate position, reference position), by candidate position
    num_chunks: int = 0  # runs of pairs that are neighbours in both
    distance: int = 0  # sum of the differences of the positions
    used: int = 0  # bits of the reference positions taken

    @property
    def rank(self) -> tuple[int, int, int]:
        """Return the sort key: more pairs first, then fewer chunks, then less distance."""
        return -len(self.pairs), self.num_chunks, self.distance

    def with_pair(self, candidate: int, reference: int) -> "Alignment":
        """Return the alignment with one more pair."""
        continues = bool(self.pairs) and self.pairs[-1] == (candidate - 1, reference - 1)
        return Alignment(
            (*self.pairs, (candidate, reference)),
            self.num_chunks + (not continues),
            self.distance + abs(candidate - reference),
            self.used | 1 << reference,
        )


class MeteorLite:
    """METEOR 1.5 for English with two of its four stages: exact words and stems.

    Synonyms (WordNet) and paraphrases (a table of 60 MB) are missing, so a caption in other words usually scores lower.
    Punctuation is dropped, words keep their apostrophes, and the list of function words is ours. Scores equal METEOR's
    with its function words and without those two stages, with three exceptions: words with apostrophes; the 56 of
    164,835 words that Snowball 3 stems differently from METEOR's older Snowball; and stems that occur twice in a
    sentence, for which METEOR drops competing matches because it rounds half a match to none. In other languages equal
    words still count.

    Args:
        function_words: Separated by blanks. They weigh 1 - `DELTA`, others `DELTA`.
    """

    name = "meteor_lite2"  # 2: stems of Snowball 3; `meteor_lite` had those of METEOR 1.5

    def __init__(self, function_words: str = FUNCTION_WORDS):
        self.function_words = frozenset(function_words.split())

    def __call__(self, candidates: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
        """Return the best score of each candidate over its references, in [0, 1]; 0 without references."""
        return [
            max((self.score(words_of(candidate), words_of(reference)) for reference in own), default=0.0)
            for candidate, own in zip(candidates, references, strict=True)
        ]

    def score(self, candidate: Sequence[str], reference: Sequence[str]) -> float:
        """Return the score of one pair of sentences, as lists of words."""
        if candidate and list(candidate) == list(reference):
            return 1.0
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
        """Return the weighted share of `words` that is `matched`; content words weigh more."""
        hits = sum(weight * self._importance(word) for weight, word in zip(weights, matched, strict=True))
        return hits / sum(self._importance(word) for word in words)

    def _importance(self, word: str) -> float:
        return 1 - DELTA if word in self.function_words else DELTA


@lru_cache(maxsize=100_000)
def stem(word: str) -> str:
    """Return the stem of a lower-case English word."""
    return EnglishStemmer().stemWord(word)


def align(candidate: Sequence[str], reference: Sequence[str]) -> Alignment:
    """Return the best one-to-one alignment of equal words and stems, by METEOR's beam search."""
    own, others = list(map(stem, candidate)), list(map(stem, reference))
    is_unique = len(set(own)) == len(own) and len(set(others)) == len(others)
    return only_alignment(own, others) if is_unique else search_alignment(own, others)


def only_alignment(candidate: Sequence[str], reference: Sequence[str]) -> Alignment:
    """Return the alignment of all pairs of equal stems; it is what the search finds if no stem occurs twice."""
    places = {stem: place for place, stem in enumerate(reference)}
    pairs = tuple((position, places[stem]) for position, stem in enumerate(candidate) if stem in places)
    num_continued = sum((i - 1, j - 1) == before for before, (i, j) in pairwise(pairs))
    distance = sum(abs(i - j) for i, j in pairs)
    return Alignment(pairs, len(pairs) - num_continued, distance, sum(1 << j for _, j in pairs))


def search_alignment(candidate: Sequence[str], reference: Sequence[str]) -> Alignment:
    """Return the best alignment of equal stems by a beam search."""
    beam = [Alignment()]
    for position, own in enumerate(candidate):
        places = [place for place, other in enumerate(reference) if other == own]
        longer = [kept.with_pair(position, place) for kept in beam for place in places if not kept.used >> place & 1]
        beam = sorted(longer + beam, key=lambda kept: kept.rank)[:BEAM_SIZE]
    return beam[0]


# Scripts written without blanks, compared character by character.
_UNSPACED = re.compile("([\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff])")
_APOSTROPHES = str.maketrans({"\u2019": "'", "\u02bc": "'"})


class _Kept(dict[int, str]):
    """Characters by code: those of words and apostrophes as they are, others as blanks; filled as they are met."""

    def __missing__(self, code: int) -> str:
        char = chr(code)
        self[code] = char if char == "'" or unicodedata.category(char)[0] not in "PSZC" else " "
        return self[code]


_KEPT = _Kept()


def words_of(text: str) -> list[str]:
    """Return lower-case words without punctuation, keeping inner apostrophes; each Chinese character is a word."""
    return list(_words_of(text))


@lru_cache(maxsize=100_000)
def _words_of(text: str) -> tuple[str, ...]:
    text = unicodedata.normalize("NFC", text).translate(_APOSTROPHES).lower()
    kept = _UNSPACED.sub(r" \1 ", text.translate(_KEPT))
    return tuple(word for part in kept.split() if (word := part.strip("'")))
