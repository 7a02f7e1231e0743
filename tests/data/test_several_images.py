"""Samples of several images: what is stored of them, and what is read back."""

import json
from dataclasses import replace

import pytest

from recipe.schema import FurtherImage, Object, Sample, Searched

CUP, BALL = Object((1.0, 2.0, 3.0, 4.0), "a cup"), Object((0.0, 0.0, 2.0, 2.0), "a ball", area=3.5)
ANSWER = [
    {"type": "text", "text": '[{"bbox_2d": '},
    {"type": "box", "box": [1.0, 2.0, 3.0, 4.0], "image": 1},
    {"type": "text", "text": ', "label": "a cup"}]'},
]
CHAT = ({"role": "user", "content": "<image><image><image>"}, {"role": "assistant", "content": ANSWER})
SEVERAL = Sample(
    "a", b"first", 10, 20, None, CHAT, further=(FurtherImage(b"2nd", 30, 40, (CUP,)), FurtherImage(b"last", 5, 6, ()))
)


def test_a_row_holds_all_images():
    row = SEVERAL.to_mds()
    assert row["image"] == b"first2ndlast"
    assert Sample.from_mds({**row, "objects": json.loads(json.dumps(row["objects"]))}) == SEVERAL
    searched = replace(SEVERAL, objects=(BALL,), searched=Searched(("a cat",), ("a dog",)))
    assert Sample.from_mds(searched.to_mds()) == searched
    assert Sample.from_mds({**row, "image": b""}) == SEVERAL.without_bytes()


def test_the_row_of_one_image_is_what_it_always_was():
    one = Sample("a", b"first", 10, 20, (CUP, BALL))
    objects = [
        {"box": [1.0, 2.0, 3.0, 4.0], "caption": "a cup"},
        {"box": [0.0, 0.0, 2.0, 2.0], "caption": "a ball", "area": 3.5},
    ]
    expected = {"id": "a", "image": b"first", "width": 10, "height": 20, "objects": objects, "messages": None}
    assert one.to_mds() == expected and list(one.to_mds()) == list(expected)
    assert replace(one, objects=None).to_mds()["objects"] is None
    assert replace(one, objects=()).to_mds()["objects"] == []


def test_a_row_that_lost_bytes_is_refused():
    with pytest.raises(ValueError, match=r"'a' has too few bytes \(7\) for its images"):
        Sample.from_mds({**SEVERAL.to_mds(), "image": b"first2n"})


def test_each_image_has_a_view():
    first, second, third = SEVERAL.per_image()
    assert (first.id, first.image, first.width, first.objects) == ("a#1", b"first", 10, None)
    assert (second.id, second.image, second.height, second.objects) == ("a#2", b"2nd", 40, (CUP,))
    assert (third.id, third.image, third.objects, third.further) == ("a#3", b"last", (), ())
    # The answer is about the second image alone.
    assert second.messages == CHAT
    assert first.messages == third.messages == (CHAT[0], {"role": "assistant", "content": ""})
    both = [*ANSWER, {"type": "box", "box": [0.0, 0.0, 1.0, 1.0]}]
    views = replace(SEVERAL, messages=(CHAT[0], {"role": "assistant", "content": both})).per_image()
    assert all(view.messages == first.messages for view in views)
    one = Sample("a", b"first", 10, 20, None)
    assert one.per_image() == (one,)
