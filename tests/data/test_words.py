"""A flip exchanges words that certainly name a side, and is refused where a text might become untrue."""

import pytest

from recipe.config import ConfigError, WordsConfig
from recipe.data.words import LANGUAGES, Vocabulary

ALL = Vocabulary(list(LANGUAGES), WordsConfig())
ENGLISH = Vocabulary(["en"], WordsConfig())


@pytest.mark.parametrize(
    ("text", "mirrored"),
    [
        ("red circle", "red circle"),
        ("a dog on the left", "a dog on the right"),
        ("the left side of a car, at the right.", "the right side of a car, at the left."),
        ("To the LEFT of it", "To the RIGHT of it"),
        ("Leftmost cup", "Rightmost cup"),
        ("the man's Left hand", "the man's Right hand"),
        ("top left and bottom right", "top right and bottom left"),
        ("arrow turning clockwise", "arrow turning counter-clockwise"),
        ("turning anti-clockwise", "turning clockwise"),
        ("leftover pizza, bright, copyright", "leftover pizza, bright, copyright"),
        ("F16, type_3", "F16, type_3"),
        ("links neben dem Auto", "rechts neben dem Auto"),
        ("die linke Hand", "die rechte Hand"),
        ("dreht sich im Uhrzeigersinn", "dreht sich gegen den Uhrzeigersinn"),
        ("à gauche de la maison", "à droite de la maison"),
        ("côté droit", "côté gauche"),
        ("dans le sens des aiguilles d'une montre", "dans le sens inverse des aiguilles d'une montre"),
        ("a la izquierda del coche", "a la derecha del coche"),
        ("el lado derecho", "el lado izquierdo"),
        ("左边的狗", "右边的狗"),
        ("最左的人，顺时针", "最右的人，逆时针"),
    ],
)
def test_certain_words_are_exchanged(text: str, mirrored: str):
    assert ALL.mirrored(text) == mirrored


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("the right answer", "right"),
        ("a person on the right answer", "right"),
        ("left-handed player", "left"),
        ("all right", "right"),
        ("person on left", "left"),
        ("a right angle on the left", "right"),
        ("a stop Sign", "Sign"),
        ("bus 42", "42"),
        ('a shirt that says "hi"', "says"),
        ("“open”", "“"),
        ("letters on a wall", "letters"),
        ("rechter Winkel", "rechter"),
        ("Schild", "Schild"),
        ("la droite", "droite"),
        ("deux lettres", "lettres"),
        ("derecho", "derecho"),
        ("letrero", "letrero"),
        ("桌子左右", "左"),
        ("红色数字", "数"),
    ],
)
def test_uncertain_words_and_words_to_be_read_prevent_a_flip(text: str, word: str):
    assert ALL.mirrored(text) is None
    assert ALL.unflippable(text) == word


def test_words_of_other_languages_only_prevent():
    """Sausage links are not exchanged for anything in English, and German words are seen in an English set."""
    for text in ("sausage links", "links neben dem Auto", "左边的狗"):
        assert ENGLISH.mirrored(text) is None
    assert ENGLISH.mirrored("on the left.") == "on the right."


def test_places_prevent_a_crop():
    for text in ("on the left", "the largest dog", "oben", "deuxième chien", "esquina", "右上角", "the only cup"):
        assert not ALL.survives_crop(text), text
    for text in ("a dog next to a car", "bus 42", "stop sign", "un chien", "狗"):
        assert ALL.survives_crop(text), text


def test_the_yaml_adds_words():
    own = WordsConfig(swapped={"port bow": "starboard bow"}, not_flipped=["tattoo"], not_cropped=["lone"])
    vocabulary = Vocabulary(["en"], own)
    assert vocabulary.mirrored("Starboard bow of a ship") == "Port bow of a ship"
    assert vocabulary.mirrored("the port side") is None  # not one of the phrases
    assert vocabulary.mirrored("an arm with a Tattoo") is None and ENGLISH.mirrored("an arm with a tattoo") is not None
    assert not vocabulary.survives_crop("a lone tree") and ENGLISH.survives_crop("a lone tree")
    assert vocabulary.described != ENGLISH.described


def test_an_unknown_language_is_named():
    with pytest.raises(ConfigError, match=r"augment\.languages holds 'enn': did you mean en\?"):
        Vocabulary(["enn"], WordsConfig())


@pytest.mark.parametrize("name", LANGUAGES)
def test_every_phrase_of_the_table_is_exchanged_and_back(name: str):
    vocabulary = Vocabulary([name], WordsConfig())
    for (first, second), phrases in LANGUAGES[name].certain.items():
        for phrase in phrases.replace("$", "").split("|"):
            here, there = phrase.replace("{}", first), phrase.replace("{}", second)
            assert vocabulary.mirrored(there) == here
            assert vocabulary.mirrored(vocabulary.mirrored(here) or "") == here
            assert not vocabulary.survives_crop(here)
