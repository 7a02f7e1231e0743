"""The teacher draw: pure, uniform, in the asked share, never the sample itself."""

import numpy as np
import pytest

from recipe.config import TeacherConfig
from recipe.data.teachers import Purpose, TeacherPool, draw_distinct, noise_seeds, random_words
from recipe.schema import Sample


def pool_of(make_sample, size: int, seed: int = 0, **config) -> TeacherPool:
    return TeacherPool([make_sample(number) for number in range(size)], TeacherConfig(**config), seed)


STRANGERS = np.arange(300, dtype=np.int64)  # hashes of samples that are no teachers


def test_the_draw_is_pure_and_distinct(make_sample):
    pool = pool_of(make_sample, 20, seed=1, num_teachers=5)
    drawn = pool.draw(2, 0, STRANGERS)
    assert drawn.shape == (300, 5)
    assert all(len(set(row)) == 5 and min(row) >= 0 and max(row) < 20 for row in drawn.tolist())
    for first, last in ((0, 1), (17, 18), (250, 300)):
        assert np.array_equal(pool.draw(2, first, STRANGERS[first:last]), drawn[first:last])
    assert not np.array_equal(pool.draw(3, 0, STRANGERS), drawn)
    assert not np.array_equal(pool_of(make_sample, 20, seed=2, num_teachers=5).draw(2, 0, STRANGERS), drawn)


def test_distinct_numbers_worked_by_hand():
    def word(share: float) -> int:
        return int(share * 2**64)

    # Of 0 1 2 3: the last, then the third of 0 1 2, then the first of 0 1.
    assert draw_distinct(np.array([[word(0.99), word(0.7), word(0.1)]], dtype=np.uint64), 4).tolist() == [[3, 2, 0]]
    # The first each time.
    assert draw_distinct(np.zeros((1, 4), dtype=np.uint64), 4).tolist() == [[0, 1, 2, 3]]


def test_the_draw_stays_what_it_was(make_sample):
    # A change here would make resumed runs see other teachers than before.
    assert pool_of(make_sample, 8, seed=17, num_teachers=3).draw(0, 0, STRANGERS[:2]).tolist() == [[3, 1, 2], [3, 5, 0]]
    assert noise_seeds(17, 0, 0, 1) == [5877197125075291653]
    seeds = noise_seeds(17, 0, 0, 6)
    assert seeds[0] == 5877197125075291653 and len(set(seeds)) == 6 and noise_seeds(17, 0, 0, 3) == seeds[:3]


def test_the_draw_is_uniform_and_in_the_asked_share(make_sample):
    pool = pool_of(make_sample, 10, seed=5, num_teachers=2, teacher_ratio=0.3)
    drawn = np.concatenate([pool.draw(epoch, 0, np.arange(5000, dtype=np.int64)) for epoch in range(4)])
    shown = drawn[drawn[:, 0] >= 0]
    # Six standard deviations of a binomial of 20,000 at 0.3.
    assert abs(len(shown) / len(drawn) - 0.3) < 6 * (0.3 * 0.7 / 20000) ** 0.5
    for place in range(2):
        counts = np.bincount(shown[:, place], minlength=10)
        expected = len(shown) / 10
        chi_squared = ((counts - expected) ** 2 / expected).sum()
        assert chi_squared < 33.7  # 9 degrees of freedom, p = 1e-4


@pytest.mark.parametrize(("ratio", "share"), [(0.0, 0), (1.0, 300)])
def test_a_ratio_of_none_or_all_is_exact(make_sample, ratio: float, share: int):
    drawn = pool_of(make_sample, 5, num_teachers=1, teacher_ratio=ratio).draw(0, 0, STRANGERS)
    assert int((drawn >= 0).sum()) == share


def test_purposes_occurrences_epochs_and_seeds_do_not_share_numbers():
    places = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 0, 2)]
    words = [random_words(*place, 1, purpose, 8) for place in places for purpose in Purpose]
    assert len(np.unique(np.concatenate(words))) == 8 * len(words)


def test_an_occurrence_has_the_same_words_in_any_range():
    table = random_words(3, 1, 0, 50, Purpose.NOISE, 7)
    assert table.shape == (50, 7)
    for first in (0, 1, 31):
        assert np.array_equal(random_words(3, 1, first, 2, Purpose.NOISE, 7), table[first : first + 2])
    assert np.array_equal(random_words(3, 1, 9, 1, Purpose.NOISE, 2), table[9:10, :2])


def test_a_sample_is_never_its_own_teacher_and_gets_all_of_them(make_sample):
    pool = pool_of(make_sample, 3, num_teachers=2)
    for occurrence in range(100):
        drawn = [sample.id for sample in pool.draw_samples(0, occurrence, "sample-1")]
        assert sorted(drawn) == ["sample-0", "sample-2"]
        strangers = [sample.id for sample in pool.draw_samples(0, occurrence, "stranger")]
        assert len(set(strangers)) == 2


def test_a_pool_that_cannot_serve_is_refused(make_sample):
    with pytest.raises(ValueError, match=r"holds 2 samples, but teachers\.num_teachers 2 needs at least 3"):
        pool_of(make_sample, 2, num_teachers=2)
    plain = [make_sample(0), make_sample(1, None), Sample("text", b"", 0, 0, None, ())]
    with pytest.raises(ValueError, match=r"\['sample-1', 'text'\]"):
        TeacherPool(plain, TeacherConfig(num_teachers=1), seed=0)
