"""`recipe.metrics.captions`."""

import math

import pytest
from metric_cases import make_prediction, make_sample

from recipe.metrics.captions import caption_match, cider_d
from recipe.metrics.scorers import MeteorLite
from recipe.schema import Prediction, Sample

A, B, C = (0.0, 0.0, 10.0, 10.0), (20.0, 0.0, 30.0, 10.0), (40.0, 0.0, 50.0, 10.0)


def mean_cider(predictions: list[Prediction], samples: list[Sample]) -> float:
    return caption_match(predictions, samples, 0.3, MeteorLite())["caption_cider_d"]


def test_worked_by_hand():
    # "red cup" against "red dog" in a corpus of two: rarity of red log(2/2) = 0, of dog, cup, and pairs log 2. One word
    # in common, of no weight, so 0. Against itself: 1-gram and 2-gram cosines 1, no 3- and 4-grams: 10 * 2 / 4.
    assert cider_d(["red cup", "red dog"], [["red dog"], ["red dog"]], [["red dog"], ["red cup"]]) == [0.0, 5.0]


def test_words_count_by_rarity_and_repeats_are_clipped():
    corpus = [["dog"], ["cat"], ["cat"], ["cat"]]
    rare, common = math.log(4), math.log(4 / 3)
    # "dog dog" against "dog cat": min(2, 1) * 1 of dog over the norms; a bigram each that differs
    expected = rare * rare / (2 * rare * math.hypot(rare, common))
    assert cider_d(["dog dog"], [["dog cat"]], corpus) == [pytest.approx(10 * expected / 4)]


def test_another_length_costs():
    corpus = [["dog"], ["cat"]]
    same = cider_d(["dog"], [["dog"]], corpus)[0]
    # three unseen words more: the 1-gram cosine is 1 / sqrt(4), at a distance of 3 words
    longer = cider_d(["dog x y z"], [["dog"]], corpus)[0]
    assert longer == pytest.approx(same / 2 * math.exp(-9 / 72))


def test_parity_with_pycocoevalcap():
    # by its CiderScorer on the same words; over 500 random captions the largest difference was 1.8e-15
    candidates = ["a man riding a brown horse", "a red cup on the table", "two dogs", "the sky"]
    references = [
        ["a man riding a horse", "man on a brown horse in a field"],
        ["a red cup on a wooden table"],
        ["two dogs", "dogs that play"],
        ["a dog on the table"],
    ]
    assert cider_d(candidates, references) == pytest.approx([4.585426511, 4.983226652, 3.003271712, 1.02068064])


def test_edges():
    assert cider_d([], []) == []
    assert cider_d([""], [["dog"]], [["dog"], ["cat"]]) == [0.0]
    assert cider_d(["dog"], [[""]], [["dog"], ["cat"]]) == [0.0]
    assert cider_d(["dog"], [["dog"]]) == [0.0]  # a corpus of one document: nothing is rare
    with pytest.raises(ValueError, match=r"candidates \[1\] have no reference"):
        cider_d(["dog", "cat"], [["dog"], []])


def test_the_metric_scores_matched_captions_in_the_corpus_of_all_truths():
    truths = [(A, "a brown dog runs"), (B, "the red\ncup of “tea”"), (C, "the cup that is never found")]
    found = [(A, 0.9, "a brown dog runs"), (B, 0.8, "cup"), (C, 0.2, "never found")]
    predictions = [make_prediction("a", found), make_prediction("b", [])]
    samples = [make_sample("a", truths, crowds=[C]), make_sample("b", [(A, "ein rotes 杯")])]
    corpus = [[caption] for _, caption in truths] + [["ein rotes 杯"]]
    expected = cider_d(["a brown dog runs", "cup"], [[truths[0][1]], [truths[1][1]]], corpus)
    assert expected[0] == pytest.approx(10.0)
    assert mean_cider(predictions, samples) == pytest.approx(sum(expected) / 2)


def test_the_better_score_is_matched_first_from_the_threshold_on():
    """Of two boxes on one truth; the one at the threshold is used where it is alone."""
    truths = [(A, "a brown dog runs"), (B, "the red cup is empty")]
    better, worse = (A, 0.9, "a brown dog runs"), (A, 0.3, "nothing")
    for found in ([better, worse], [worse, better]):
        score = mean_cider([make_prediction("a", found)], [make_sample("a", truths)])
        assert score == pytest.approx(10.0)
    score = mean_cider([make_prediction("a", [better, (B, 0.3, "nothing")])], [make_sample("a", truths)])
    assert score == pytest.approx(5.0)


def test_the_metric_without_pairs_or_truths():
    for found, truths, expected in [([], [(A, "x")], 0.0), ([(A, 0.9, "x")], [], -1.0), ([(A, 0.9, "x")], None, -1.0)]:
        score = mean_cider([make_prediction("a", found)], [make_sample("a", truths)])
        assert score == expected
