"""The teacher draw: pure, uniform, in the asked share, never the sample itself."""

import numpy as np
import pytest

from recipe.config import TeacherConfig
from recipe.data.draws import Purpose, noise_seed, random_words
from recipe.data.teachers import TeacherPool, draw_teachers
from recipe.schema import Sample


def test_the_draw_is_pure_and_distinct():
    draws = {position: draw_teachers(1, 2, position, 20, 5, 1.0) for position in range(300)}
    for position in reversed(range(300)):
        assert draw_teachers(1, 2, position, 20, 5, 1.0) == draws[position]
        assert len(set(draws[position])) == 5
        assert all(0 <= index < 20 for index in draws[position])
    assert draw_teachers(1, 3, 0, 20, 5, 1.0) != draws[0]
    assert draw_teachers(2, 2, 0, 20, 5, 1.0) != draws[0]


def test_the_draw_stays_what_it_was():
    # A change here would make resumed runs see other teachers than before.
    assert draw_teachers(17, 0, 0, 8, 3, 1.0) == [6, 3, 2]
    assert noise_seed(17, 0, 0) == 8324734926890238857


def test_the_draw_is_uniform_and_in_the_asked_share():
    draws = [draw_teachers(5, epoch, position, 10, 2, 0.3) for epoch in range(4) for position in range(5000)]
    shown = [draw for draw in draws if draw]
    # Six standard deviations of a binomial of 20,000 at 0.3.
    assert abs(len(shown) / len(draws) - 0.3) < 6 * (0.3 * 0.7 / 20000) ** 0.5
    for place in range(2):
        counts = np.bincount([draw[place] for draw in shown], minlength=10)
        expected = len(shown) / 10
        chi_squared = ((counts - expected) ** 2 / expected).sum()
        assert chi_squared < 33.7  # 9 degrees of freedom, p = 1e-4


@pytest.mark.parametrize(("ratio", "share"), [(0.0, 0), (1.0, 200)])
def test_a_ratio_of_none_or_all_is_exact(ratio: float, share: int):
    assert sum(bool(draw_teachers(0, 0, position, 5, 1, ratio)) for position in range(200)) == share


def test_purposes_positions_epochs_and_seeds_do_not_share_numbers():
    places = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 0, 2)]
    words = [random_words(*place, purpose, 8) for place in places for purpose in Purpose]
    assert len(np.unique(np.concatenate(words))) == 8 * len(words)


def pool_of(make_sample, size: int, **config) -> TeacherPool:
    return TeacherPool([make_sample(number) for number in range(size)], TeacherConfig(**config), seed=0)


def test_a_sample_is_never_its_own_teacher_and_gets_all_of_them(make_sample):
    pool = pool_of(make_sample, 3, num_teachers=2)
    for position in range(100):
        drawn = [sample.id for sample in pool.draw(0, position, "sample-1")]
        assert sorted(drawn) == ["sample-0", "sample-2"]
        strangers = [sample.id for sample in pool.draw(0, position, "stranger")]
        assert len(set(strangers)) == 2


def test_a_pool_that_cannot_serve_is_refused(make_sample):
    with pytest.raises(ValueError, match=r"holds 2 samples, but teachers\.num_teachers 2 needs at least 3"):
        pool_of(make_sample, 2, num_teachers=2)
    plain = [make_sample(0), make_sample(1, None), Sample("text", b"", 0, 0, None, ())]
    with pytest.raises(ValueError, match=r"\['sample-1', 'text'\]"):
        TeacherPool(plain, TeacherConfig(num_teachers=1), seed=0)
