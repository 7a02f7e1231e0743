"""`recipe.metrics.scorers`, its stemmer and words, and METEOR 1.5 where it can run."""

import copy
import pickle
import random
import shutil
import unicodedata
from subprocess import PIPE, Popen
from threading import Lock
from types import SimpleNamespace

import pytest

from recipe.metrics.scorers import (
    Meteor15,
    MeteorLite,
    align,
    default_text_scorer,
    only_alignment,
    search_alignment,
    stem,
    words_of,
)


def score(candidate: str, *references: str) -> float:
    return MeteorLite()([candidate], [references])[0]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("A red cup, on the table.", ["a", "red", "cup", "on", "the", "table"]),
        ("the dog's 'bone' -- isn’t it?", ["the", "dog's", "bone", "isn't", "it"]),
        ("", []),
        ("...!", []),
        ("一只红猫 cat", ["一", "只", "红", "猫", "cat"]),
        ("हिन्दी भाषा", ["हिन्दी", "भाषा"]),
        ("Größe cafe\u0301", ["größe", "café"]),
    ],
)
def test_words(text: str, words: list[str]):
    assert words_of(text) == words


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        # made by the Snowball English stemmer that METEOR 1.5 ships; of 164,835 words, 56 have another stem here
        ("riding", "ride"), ("rides", "ride"), ("horses", "hors"), ("horse", "hors"), ("stopped", "stop"),
        ("flies", "fli"), ("ties", "tie"), ("dying", "die"), ("gas", "gas"), ("buses", "buse"), ("hoping", "hope"),
        ("hopping", "hop"), ("feed", "feed"), ("agreed", "agre"), ("luxuriated", "luxuri"), ("cry", "cri"),
        ("by", "by"), ("say", "say"), ("relational", "relat"), ("vietnamization", "vietnam"), ("apology", "apolog"),
        ("happily", "happili"), ("electrical", "electr"), ("formative", "format"), ("replacement", "replac"),
        ("adoption", "adopt"), ("generous", "generous"), ("communism", "communism"), ("controll", "control"),
        ("news", "news"), ("outing", "outing"), ("dog's", "dog"), ("youth", "youth"), ("boyish", "boyish"),
    ],
)  # fmt: skip
def test_stems(word: str, expected: str):
    assert stem(word) == expected


def test_the_score_worked_by_hand():
    # "a" is a function word (1/4), dog and cat are content words (3/4); one chunk of one pair.
    # precision = recall = .25 / 1, F = .25; penalty .6 * (1 / 1) ** .2
    assert score("a dog", "a cat") == pytest.approx(0.25 * 0.4)
    # riding - rides by stem: .6 of .75; precision .45 / .75, recall .45 / 1.5; F = 1 / (.15 / .6 + .85 / .3)
    assert score("riding", "rides horses") == pytest.approx(0.4 / (0.15 / 0.6 + 0.85 / 0.3))
    # two chunks of two pairs
    assert score("dog cat", "cat dog") == pytest.approx(1 - 0.6)


@pytest.mark.parametrize(
    ("candidate", "reference", "expected"),
    [
        ("a man riding a brown horse", "a man rides a horse in the field", 0.312394),
        ("red cup on the table", "a red cup stands on a wooden table", 0.255780),
        ("horse brown the of head", "the head of a brown horse", 0.371308),
        ("walking dogs", "the dog walked", 0.210219),
        ("a dog", "the dog", 0.3),
        ("white plate", "a car", 0.0),
        ("the left wheel of the car", "the left wheel of the car", 1.0),
    ],
)
def test_parity_with_meteor_15_without_synonyms_and_paraphrases(candidate: str, reference: str, expected: float):
    # by METEOR 1.5's jar: -l en -norm -m "exact stem" -w "1.0 0.6"
    assert score(candidate, reference) == pytest.approx(expected, abs=5e-7)


@pytest.mark.parametrize(
    ("candidate", "reference", "expected"),
    [
        ("organic", "organization", 0.0),  # METEOR 1.5 stems both to organ and gives 0.6, the worst that was found
        ("a man adding salt", "a man adds salt", (0.25 + 0.75 + 0.6 * 0.75 + 0.75) / 2.5),  # METEOR 1.5: 0.312715
        ("pasting", "the past", 0.0),  # METEOR 1.5: 0.187013
    ],
)
def test_newer_stems_score_otherwise_than_meteor_15(candidate: str, reference: str, expected: float):
    """METEOR 1.5's scores by the command of the test above. Of 1,131 words of region captions no stem differs."""
    assert score(candidate, reference) == pytest.approx(expected, abs=5e-7)


def test_the_best_reference_counts():
    assert score("a red cup", "a dog", "a red cup", "a cup") == 1.0
    assert MeteorLite()(["a red cup", "dog"], [["cup"], []]) == [pytest.approx(score("a red cup", "cup")), 0.0]


def test_nothing_to_compare_scores_0():
    assert score("", "a dog") == score("a dog", "") == score("...", "...") == 0.0
    assert MeteorLite()([], []) == []


def test_captions_in_other_languages_score_by_equal_words():
    assert score("一只红猫", "一只红猫") == 1.0
    assert 0 < score("一只红猫", "一只黑猫") < 1
    assert 0 < score("eine rote Tasse", "die rote Tasse") < 1


def test_alignment_takes_most_words_then_fewest_chunks():
    assert align(["the", "cat", "the", "dog"], ["the", "dog"]).pairs == ((2, 0), (3, 1))
    found = align(["a", "b", "a", "c"], ["a", "c", "a", "b"])
    assert found.pairs == ((0, 2), (1, 3), (2, 0), (3, 1)) and found.num_chunks == 2
    assert align(["dogs"], ["x", "dog", "dogs"]).num_chunks == 1


def test_a_long_caption_of_one_word_ends_soon():
    assert score(" ".join(["dog"] * 64), " ".join(["dog"] * 64)) == 1.0


def test_copies_of_meteor_15_start_their_own_process():
    scorer = Meteor15()
    scorer._meteor = object()
    for copied in (copy.deepcopy(scorer), pickle.loads(pickle.dumps(scorer))):
        assert isinstance(copied, Meteor15) and copied._meteor is None


def test_without_java_or_its_package_the_lite_scorer_is_taken(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(shutil, "which", lambda program: None)
    assert default_text_scorer().name == "meteor_lite2"
    monkeypatch.setattr(shutil, "which", lambda program: "java")
    monkeypatch.setattr("importlib.util.find_spec", lambda package: None)
    assert default_text_scorer().name == "meteor_lite2"
    monkeypatch.setattr("importlib.util.find_spec", lambda package: object())
    assert default_text_scorer().name == "meteor15"


def test_all_ranks_take_the_same_scorer(monkeypatch: pytest.MonkeyPatch):
    can_run: dict[str, bool] = {"here": True, "there": True}

    def gathered(own: bool) -> list[bool]:
        assert own is can_run["here"]
        return [own, can_run["there"]]

    monkeypatch.setattr("recipe.metrics.scorers.dist.all_gather_object", gathered)
    monkeypatch.setattr("importlib.util.find_spec", lambda package: object())
    monkeypatch.setattr(shutil, "which", lambda program: "java" if can_run["here"] else None)
    assert default_text_scorer().name == "meteor15"
    can_run["there"] = False
    assert default_text_scorer().name == "meteor_lite2"
    can_run.update(here=False, there=True)
    assert default_text_scorer().name == "meteor_lite2"


def test_meteor_15_that_does_not_answer_is_told():
    """And its process ended, and its lock released: `Meteor` waits for both when Python ends."""
    with Popen(["sleep", "60"], stdin=PIPE) as process:
        dead = SimpleNamespace(
            meteor_p=process, lock=Lock(), compute_score=lambda *_: dead.lock.acquire() and float("")
        )
        scorer = Meteor15()
        scorer._meteor = dead
        with pytest.raises(RuntimeError, match="java -version"):
            scorer(["dog"], [["dog"]])
        assert process.wait() < 0 and not dead.lock.locked() and scorer._meteor is None
    assert scorer(["", "dog"], [["dog"], []]) == [0.0, 0.0]


def test_punctuation_is_no_word_to_either_scorer():
    def compute_score(references: dict[int, list[str]], candidates: dict[int, list[str]]) -> tuple[float, list[float]]:
        return 0.0, [float(candidates[index][0] in references[index]) for index in candidates]

    scorer = Meteor15()
    scorer._meteor = SimpleNamespace(compute_score=compute_score)
    candidates = ["a red cup.", "A red cup!", "a red, cup", "a |||\nred cup", "。一只红猫", "...", "a blue cup."]
    references = [["a red cup"]] * 4 + [["一只红猫。"], ["a red cup"], ["a red cup."]]
    assert scorer(candidates, references) == [1.0] * 5 + [0.0] * 2
    lite = MeteorLite()(candidates, references)
    assert lite[:6] == [1.0] * 5 + [0.0] and 0 < lite[6] < 1


def test_an_interrupted_meteor_15_is_ended():
    def interrupted(*_: object) -> None:
        busy.lock.acquire()
        raise KeyboardInterrupt

    with Popen(["sleep", "60"], stdin=PIPE) as process:
        busy = SimpleNamespace(meteor_p=process, lock=Lock(), compute_score=interrupted)
        scorer = Meteor15()
        scorer._meteor = busy
        with pytest.raises(KeyboardInterrupt):
            scorer(["dog"], [["dog"]])
        assert process.wait() < 0 and not busy.lock.locked()


@pytest.mark.slow
def test_meteor_15_itself():
    """Half a minute: Java reads 60 MB of paraphrases."""
    pytest.importorskip("pycocoevalcap")
    if not shutil.which("java"):
        pytest.skip("no java")
    score = Meteor15()
    assert score(["a red cup.", "a red cup"], [["a red cup"], ["a red cup."]]) == [1.0, 1.0]
    scores = score(
        ["a man riding a brown horse", "", "the dog ||| and\nthe cat", "walking dogs"],
        [["a man rides a horse in the field"], ["a dog"], ["a car", "the dog and the cat"], ["the dog walked"]],
    )
    assert scores == pytest.approx([0.312394, 0.0, 1.0, 0.149953], abs=5e-7)


@pytest.mark.parametrize("seed", range(20))
def test_sentences_without_repeats_are_aligned_as_the_search_does(seed: int) -> None:
    draw = random.Random(seed)
    words = [f"word{number}" for number in range(9)]
    for _ in range(20):
        own, others = (draw.sample(words, draw.randint(0, 9)) for _ in range(2))
        assert only_alignment(own, others) == search_alignment(own, others)


def test_an_equal_sentence_needs_no_alignment() -> None:
    words = words_of("the dog and the other dog's dogs")
    scorer = MeteorLite()
    different = [*words[:-1], "dogged"]
    assert search_alignment(list(map(stem, words)), list(map(stem, words))).num_chunks == 1
    assert scorer.score(words, words) == 1 > scorer.score(different, words)


def test_words_of_all_characters_are_those_of_the_definition() -> None:
    text = "".join(map(chr, [*range(0x250), *range(0x2000, 0x2070), *range(0x3000, 0x3050), 0x1F600])) * 2
    normal = unicodedata.normalize("NFC", text).replace("\u2019", "'").replace("\u02bc", "'").lower()
    plain = "".join(char if char == "'" or unicodedata.category(char)[0] not in "PSZC" else " " for char in normal)
    unspaced = "".join(f" {char} " if "\u3040" <= char <= "\u30ff" else char for char in plain)
    assert words_of(text) == [word for part in unspaced.split() if (word := part.strip("'"))]
