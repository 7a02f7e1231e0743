"""The English (Porter 2) stemmer, by its description at snowballstem.org; METEOR 1.5 stems with it."""

import re
from functools import lru_cache

_VOWELS = "aeiouy"
_IRREGULAR = {
    "skis": "ski", "skies": "sky", "dying": "die", "lying": "lie", "tying": "tie", "idly": "idl", "gently": "gentl",
    "ugly": "ugli", "early": "earli", "only": "onli", "singly": "singl",
} | {word: word for word in ("sky", "news", "howe", "atlas", "cosmos", "bias", "andes")}  # fmt: skip
_DONE_AFTER_PLURAL = {"inning", "outing", "canning", "herring", "earring", "proceed", "exceed", "succeed"}
_STEP_2 = {
    "ization": "ize", "ational": "ate", "fulness": "ful", "ousness": "ous", "iveness": "ive", "tional": "tion",
    "biliti": "ble", "lessli": "less", "entli": "ent", "ation": "ate", "alism": "al", "aliti": "al", "ousli": "ous",
    "iviti": "ive", "fulli": "ful", "enci": "ence", "anci": "ance", "abli": "able", "izer": "ize", "ator": "ate",
    "alli": "al", "bli": "ble", "ogi": "og", "li": "",
}  # fmt: skip
_STEP_3 = {
    "ational": "ate", "tional": "tion", "alize": "al", "icate": "ic", "iciti": "ic", "ative": "", "ical": "ic",
    "ness": "", "ful": "",
}  # fmt: skip
_STEP_4 = (
    "ement", "ance", "ence", "able", "ible", "ment", "ant", "ent", "ism", "ate", "iti", "ous", "ive", "ize", "ion",
    "al", "er", "ic",
)  # fmt: skip
_SHORT_SYLLABLE = re.compile(r"(^|.*[^aeiouy])[aeiouy][^aeiouywxY]$|^[aeiouy][^aeiouy]$")
_REGION = re.compile(r"[aeiouy][^aeiouy]")


@lru_cache(maxsize=100_000)
def stem(word: str) -> str:
    """The stem of a lower-case English word; a word of at most two letters is its own.

    `R1` and `R2`, of the description, are the parts of a word in which most endings must lie.
    """
    if len(word) <= 2:
        return word
    if word in _IRREGULAR:
        return _IRREGULAR[word]
    word = re.sub(r"(^|[aeiouy])y", r"\1Y", word.removeprefix("'"))
    r1, r2 = _regions(word)
    word = _without_plural(re.sub(r"('s'|'s|')$", "", word))
    if word in _DONE_AFTER_PLURAL:
        return word
    word = _without_participle(word, r1)
    word = re.sub(r"(?<=.)([^aeiouy])[yY]$", r"\1i", word)
    word = _replaced(word, _STEP_2, r1, r2)
    word = _replaced(word, _STEP_3, r1, r2)
    word = _without_suffix(word, r2)
    return _without_last_letter(word, r1, r2).replace("Y", "y")


def _regions(word: str) -> tuple[int, int]:
    """Where R1 and R2 start."""
    prefix = re.match("gener|commun|arsen", word)
    first = _REGION.search(word)
    r1 = prefix.end() if prefix else first.end() if first else len(word)
    second = _REGION.search(word, r1)
    return r1, second.end() if second else len(word)


def _without_plural(word: str) -> str:
    if word.endswith("sses"):
        return word[:-2]
    if word.endswith(("ied", "ies")):
        return word[:-2] if len(word) > 4 else word[:-1]
    if word.endswith(("us", "ss")) or not word.endswith("s"):
        return word
    return word[:-1] if any(letter in _VOWELS for letter in word[:-2]) else word


def _without_participle(word: str, r1: int) -> str:
    ending = re.search("(eedly|eed|edly|ingly|ed|ing)$", word)
    if ending is None:
        return word
    start = ending.start()
    if ending[0].startswith("ee"):
        return word[:start] + "ee" if start >= r1 else word
    if not any(letter in _VOWELS for letter in word[:start]):
        return word
    word = word[:start]
    if word.endswith(("at", "bl", "iz")):
        return word + "e"
    if re.search(r"([bdfgmnprt])\1$", word):
        return word[:-1]
    return word + "e" if r1 >= len(word) and _SHORT_SYLLABLE.match(word) else word


def _replaced(word: str, endings: dict[str, str], r1: int, r2: int) -> str:
    """Steps 2 and 3: the longest ending, where it lies in R1, gives way to a shorter one."""
    ending = next((ending for ending in endings if word.endswith(ending)), None)
    if ending is None or len(word) - len(ending) < r1:
        return word
    before = word[: len(word) - len(ending)]
    is_kept = (
        (ending == "ogi" and not before.endswith("l"))
        or (ending == "li" and before[-1:] not in tuple("cdeghkmnrt"))
        or (ending == "ative" and len(before) < r2)
    )
    return word if is_kept else before + endings[ending]


def _without_suffix(word: str, r2: int) -> str:
    ending = next((ending for ending in _STEP_4 if word.endswith(ending)), None)
    if ending is None or len(word) - len(ending) < r2:
        return word
    before = word[: len(word) - len(ending)]
    return word if ending == "ion" and not before.endswith(("s", "t")) else before


def _without_last_letter(word: str, r1: int, r2: int) -> str:
    before = word[:-1]
    if word.endswith("e"):
        return before if len(before) >= r2 or (len(before) >= r1 and not _SHORT_SYLLABLE.match(before)) else word
    return before if word.endswith("ll") and len(before) >= r2 else word
