"""`recipe.look` counts: by hand, against the encoder, and without growing."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from recipe.config import ImageConfig, PromptConfig
from recipe.data.encode import Encoder
from recipe.data.image import image_spec
from recipe.load import load_processor
from recipe.look import counts
from recipe.look.counts import Best, Contents, Distinct, Histogram, RejectedRecords, read_rejected
from recipe.look.judge import Copies, Limits, judge, share
from recipe.schema import FurtherImage, ImageSpec, Object, Sample, Searched
from tests.support.tiny_cases import make_samples

SPEC = ImageSpec(14, 2, 3136, 280 * 280, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
NO_COPIES, LIMITS = Copies(0, {}), Limits(num_queries=100, max_seq_len=4096)
CHAT = ({"role": "user", "content": "hello"}, {"role": "assistant", "content": "ho"})


def box(side: float, caption: str = "cat", at: float = 0.0, iscrowd: bool = False) -> Object:
    return Object((at, at, at + side, at + side), caption, iscrowd)


def sample(name: str, *objects: Object, size: tuple[int, int] = (280, 280)) -> Sample:
    return Sample(name, b"", *size, objects)


def read(*samples: Sample, num_shown: int = 6, spec: ImageSpec = SPEC) -> Contents:
    contents = Contents(spec, num_shown)
    contents.read(samples)
    return contents


def sentences(*samples: Sample, limits: Limits = LIMITS, spec: ImageSpec = SPEC) -> list[str]:
    return judge(read(*samples, spec=spec), RejectedRecords(), NO_COPIES, limits)


def test_bins_by_hand() -> None:
    numbers = Histogram((1, 2, 4), whole=True)
    for value in (0, 2, 3, 3, 9):
        numbers.add(value)
    assert numbers.rows() == [("0", 1), ("1", 0), ("2 to 3", 3), ("4 and more", 1)]
    assert (numbers.mean, numbers.largest, numbers.number) == (17 / 5, 9, 5)
    ratios = Histogram((0.5, 2))
    ratios.add(0.5)
    assert ratios.rows() == [("0.5 to 2", 1)], "no empty bins at the ends"
    assert Histogram((1, 2)).rows() == []


def test_every_image_of_a_chat_is_counted_and_its_first_may_be_shown() -> None:
    further = FurtherImage(b"", 560, 280, (Object((0, 0, 20, 20), "owl"), Object((0, 0, 300, 200), "bat")))
    unknown = FurtherImage(b"", 280, 280, None)
    contents = read(replace(sample("chat", box(28)), messages=CHAT, further=(further, unknown)))
    assert (contents.samples, contents.images, contents.chats, contents.not_annotated) == (1, 3, 1, 1)
    assert contents.objects == 3 and dict(contents.captions.counts) == {"cat": 1, "owl": 1, "bat": 1}
    assert contents.sizes.counts == {"280 x 280": 2, "560 x 280": 1}


def test_counts_by_hand() -> None:
    """One image at its own size; one reduced to half, of which a box of 40 pixels is 20 / 28 of a token."""
    contents = read(
        sample("a", box(28), Object((1, 0, 14.95, 55.8), "dog"), box(280), box(50, iscrowd=True)),  # 13.95 x 55.8: 27.9
        sample("b", box(40, "big cat"), box(40, "big cat"), size=(560, 560)),
        sample("c"),
        replace(sample("d"), objects=None, messages=CHAT),
        replace(sample("e"), searched=Searched(("x",), ())),
        Sample("t", b"", 0, 0, None, CHAT),
    )
    assert (contents.samples, contents.images, contents.text_only, contents.chats) == (6, 5, 1, 2)
    assert (contents.empty, contents.not_annotated, contents.annotated, contents.searched) == (2, 1, 4, 1)
    assert (contents.objects, contents.crowds, contents.repeated, contents.covering) == (5, 1, 1, 1)
    assert contents.sides.rows() == [
        ("below 1", 3), ("1 to 2", 1), ("2 to 4", 0), ("4 to 8", 0), ("8 to 16", 1)
    ]  # fmt: skip
    assert contents.smaller == [3, 1], "at four times the pixels only the box of 27.9"
    assert contents.reduced == 1
    assert contents.captions.rows(2) == [("cat", 2), ("big cat", 2), ("all others", 1)]
    assert contents.words.rows() == [("1", 3), ("2", 2)]
    assert contents.per_image.rows() == [("0", 2), ("1", 0), ("2", 1), ("3 to 4", 1)]
    assert contents.image_tokens.rows() == [("65 to 128", 5)]
    assert (contents.image_tokens.mean, contents.image_tokens.largest) == (100, 100)
    assert contents.sizes.rows(5) == [("280 x 280", 4), ("560 x 560", 1)]
    shown = {name: [item.id for _, item in best.found()] for name, best in contents.shown.items()}
    assert shown["Most objects"] == ["a", "b"]
    assert shown["Smallest objects"] == ["b", "a"]
    assert shown["Smallest images"] == ["a", "c"], "the first of equal ones"
    assert (shown["Crowd regions"], shown["Not annotated"]) == (["a"], ["d"])
    assert set(shown["Known to hold nothing"]) == {"c", "e"}
    assert [item.id for _, item in contents.texts.found()] == ["t"]
    assert len(contents.spread.found()) == 5


def test_what_is_shown_depends_on_the_ids_alone() -> None:
    samples = [sample(f"s{number}", box(20 + number)) for number in range(50)]
    first = {item.id for _, item in read(*samples).spread.found()}
    assert len(first) == 6
    assert {item.id for _, item in read(*samples[::-1]).spread.found()} == first


def test_best_keeps_positions() -> None:
    best = Best(2)
    for position, key in enumerate((3, 1, 5, 5)):
        best.add(key, position, sample(str(position)))
    assert [(position, item.id) for position, item in best.found()] == [(2, "2"), (3, "3")]


def test_memory_does_not_grow_with_captions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(counts, "MOST_DISTINCT", 3)
    distinct = Distinct()
    for caption in "abcdeabz":
        distinct.add(caption)
    assert distinct.rows(2) == [("a", 2), ("b", 2), ("all others", 4)]
    assert (distinct.describe("caption"), distinct.total) == ("more than 3 different captions", 8)
    assert len(distinct.counts) == 3


def test_tokens_are_those_of_the_encoder(tiny_checkpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(counts, "_CHUNK", 3)
    processor = load_processor(tiny_checkpoint)
    spec = image_spec(processor.image_processor, ImageConfig(min_pixels=784, max_pixels=20000))
    from transformers import Qwen2_5_VLConfig

    hf_config = Qwen2_5_VLConfig.from_pretrained(tiny_checkpoint)
    encoder = Encoder(processor.tokenizer, hf_config, spec, PromptConfig(), sys.maxsize, sys.maxsize)
    samples = list(make_samples().values())
    expected = [len(encoder(item).input_ids) for item in samples]
    contents = Contents(spec, 6, replace(encoder, hf_config=None))
    useless = Sample("useless", b"", 0, 0, None, ({"role": "assistant", "content": "ho"},))
    contents.read([*(replace(item, image=b"") for item in samples), useless])
    assert (contents.tokens.number, contents.tokens.sum, contents.tokens.largest) == (
        len(samples), sum(expected), max(expected)
    )  # fmt: skip
    assert contents.unusable == 1
    assert judge(contents, RejectedRecords(), NO_COPIES, Limits(100, max(expected) - 1))[-2:] == [
        f"1 sample cannot be trained on: {contents.first_unusable}.",
        f"A sample has up to {max(expected):,} tokens: raise max_seq_len, now {max(expected) - 1}, or lower "
        "image.max_pixels.",
    ]
    assert "'useless'" in contents.first_unusable


@pytest.mark.parametrize(
    ("samples", "expected"),
    [
        ([sample("a", box(100), box(90, "dog"))], []),
        (
            [sample("a", *[box(40, f"c{n}", n) for n in range(8)], size=(560, 560))],
            ["100 % of the objects are smaller than a vision token: raise image.max_pixels, now 78400: at 313600 it "
             "would be 0 %."],
        ),
        (
            [sample("a", box(9, "x"), *[box(99, f"c{n}", n) for n in range(7)])],
            ["12 % of the objects are smaller than a vision token: at 4 times image.max_pixels it would still be 12 %, "
             "so raise image.min_pixels to enlarge the images, or cut them into tiles."],
        ),
        (
            [sample("a", *[box(50, at=n) for n in range(19)], box(50, "dog"))],
            ["One caption, 'cat', has 95 % of the objects."],
        ),
        ([sample("a", *[box(50, at=n) for n in range(19)])], []),  # a single class is no fault
        (
            [sample("a", box(50, "Red cat"), box(50, "red  cat", 9), box(50, "red  cat", 2), box(50, "dog"))],
            ["1 caption is written in several ways, which differ only in case or blanks: 'red  cat' and 'Red cat'. "
             "Write each in one way."],
        ),
        (
            [sample("a", box(50, "0"), box(50, "1"))],
            ["All captions are numbers, such as '0': the head learns to write words, so convert with the names of the "
             "classes."],
        ),
        (
            [sample("a", box(50), box(60, "dog")), sample("b"), replace(sample("c"), objects=None)],
            ["1 image (33 %) holds no object: check that nothing was left unannotated there.",
             "1 image (33 %) is not annotated: the detection head learns nothing from them."],
        ),
        (
            [sample("a", box(280)), sample("b", box(50, "dog"))],
            ["50 % of the boxes cover the whole image: check the unit of the boxes (--bbox-type)."],
        ),
        (
            [sample("a", box(50), box(50, "Cat"))],
            ["1 object repeats another of the same image, with box and caption.",
             "1 caption is written in several ways, which differ only in case or blanks: 'cat' and 'Cat'. Write each "
             "in one way."],
        ),
        (
            [sample("a")],
            ["No image holds an object: the detection head would learn to find nothing.",
             "1 image (100 %) holds no object: check that nothing was left unannotated there."],
        ),
        ([Sample("t", b"", 0, 0, None, CHAT)], ["No sample has an image: train with detection_head=null."]),
    ],
)  # fmt: skip
def test_sentences(samples: list[Sample], expected: list[str]) -> None:
    assert sentences(*samples) == expected


def test_sentences_about_a_run_and_other_files() -> None:
    crowd = sample("a", *[box(50, f"c{n % 2}", n) for n in range(101)], box(50, "x", iscrowd=True))
    assert sentences(crowd) == [
        "An image holds up to 101 objects, more than the head has queries: raise detection_head.num_queries, now 100."
    ]
    assert sentences(crowd, limits=Limits(101, 4096)) == []
    rejected = RejectedRecords()
    rejected.counts.update({"missing file": 2, "wrong size": 1})
    good = read(sample("a", box(100), box(90, "dog")))
    assert judge(good, rejected, Copies(2, {"val": 1, "test": 0}), LIMITS) == [
        "3 records of 4 (75 %) were rejected, 2 of them for: missing file.",
        "1 image of val is also here: if one is trained on, scores on the other say too much (only a pool of teachers "
        "may share them). Convert again with --val-share.",
        "2 samples repeat the image or chat of another, perhaps with other annotations.",
    ]
    many = read(*[sample(f"s{n}", box(100), box(90, "dog")) for n in range(200)])
    assert judge(many, rejected, NO_COPIES, LIMITS) == [], "below 2 % they are in their table alone"


def test_shares_are_not_rounded_away() -> None:
    shown = [share(part, 10_000) for part in (0, 1, 150, 1500, 9999, 10_000)]
    assert shown == ["0 %", "under 0.1 %", "1.5 %", "15 %", "over 99.9 %", "100 %"]
    assert share(0, 0) == "0 %"


def test_rejected_records_of_a_split(tmp_path: Path) -> None:
    rows = [
        {"split": split, "id": str(n), "source": "a", "reason": "wrong size" if n else "missing", "detail": ""}
        for split in ("train", "val")
        for n in range(5)
    ]
    path = tmp_path / "rejected.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    found = read_rejected(path, "train")
    assert found.counts == {"wrong size": 4, "missing": 1}
    assert [row["id"] for row in found.examples["wrong size"]] == ["1", "2", "3"]
    assert read_rejected(tmp_path / "none.jsonl", "train").counts == {}
    path.write_text("{}\n")
    with pytest.raises(ValueError, match=r"rejected.jsonl is not a list of rejected records .*: move it away"):
        read_rejected(path, "train")
