"""How captions are cut into words before they are compared."""

import re
import unicodedata

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
