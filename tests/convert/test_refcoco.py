"""RefCOCO: written and read back, by hand, and pickles that hold more than plain values."""

import datetime
import pickle
from collections import OrderedDict
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from convert_helpers import picture, read_items, run_main, write_json
from round_trip import convert, draw_scenes, xywh

from convert.items import Rejected
from convert.refcoco import QUESTION, find, read_refs
from recipe.boxes import objects_to_text
from recipe.config import PromptConfig
from recipe.data.chat import detection_question, message_segments, write_boxes
from recipe.metrics.boxes import expression_accuracy
from recipe.schema import DetectedObject, Object, Prediction, Sample


def ref(number: int, sentences: list[str], split: str = "train", **more: Any) -> dict[str, Any]:
    """As `refs(unc).p` has it."""
    texts = [
        {"tokens": text.split(), "raw": text.upper(), "sent_id": 10 * number + place, "sent": text}
        for place, text in enumerate(sentences)
    ]
    row = {"ref_id": number, "ann_id": 100 + number, "image_id": 1, "category_id": 1, "split": split}
    row |= {"file_name": f"COCO_train2014_000000000001_{number}.jpg", "sentences": texts}
    return row | {"sent_ids": [text["sent_id"] for text in texts], **more}


INSTANCES = {
    "images": [{"id": 1, "file_name": "COCO_train2014_000000000001.jpg", "width": 20, "height": 10}],
    "annotations": [
        {"id": 101, "image_id": 1, "bbox": [1.5, 2, 3, 4], "category_id": 1, "segmentation": [[1.0] * 6]},
        {"id": 102, "image_id": 1, "bbox": [0, 0, 20, 10], "category_id": 1},
        {"id": 103, "image_id": 2, "bbox": [0, 0, 20, 10], "category_id": 1},
    ],
}
REFS = [ref(1, ["left cup", 'the "red" cup']), ref(2, ["all of it"], "testA")]


@pytest.fixture
def images(tmp_path: Path) -> Path:
    (tmp_path / "COCO_train2014_000000000001.jpg").write_bytes(picture())
    return tmp_path


def test_a_set_comes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every sentence of the split with its own box, image by image."""
    scenes = draw_scenes(tmp_path / "images", ("the left one", "zebra closest to us"))
    images, annotations, refs, wanted = [], [], [], []
    for number, scene in enumerate(scenes):
        images.append({"id": number, "file_name": scene.path, "width": scene.width, "height": scene.height})
        for item in scene.objects:
            row = {"id": 100 + len(refs), "image_id": number, "bbox": xywh(item.box), "category_id": 1}
            annotations.append(row)
            sentences, split = [item.caption, f"{item.caption} {len(refs)}"], "val" if len(refs) % 3 else "testB"
            refs.append(ref(len(refs), sentences, split, image_id=number))
            wanted += [(scene, item, text) for text in sentences if split == "val"]
    (tmp_path / "refs(unc).p").write_bytes(pickle.dumps(refs, protocol=2))
    instances = write_json(tmp_path / "instances.json", {"images": images, "annotations": annotations})
    arguments = ["--annotations", tmp_path / "refs(unc).p", "--instances", instances, "--images", tmp_path / "images"]
    run_main(monkeypatch, "refcoco", *arguments, "--out", tmp_path / "out", "--split", "val", "--num-workers", 1)
    from convert_helpers import read_samples

    samples = read_samples(tmp_path / "out", "val")
    assert len(samples) == len(wanted) > 20
    for sample, (scene, item, text) in zip(samples, wanted, strict=True):
        assert (sample.width, sample.height) == (scene.width, scene.height)
        assert sample.objects is not None
        [found] = sample.objects
        assert found.caption == text
        assert found.box == pytest.approx(item.box, abs=0.5)


def test_each_sentence_is_a_chat_with_one_object(images: Path) -> None:
    samples = [item for item in read_items(find(REFS, INSTANCES, images, "train")) if isinstance(item, Sample)]
    box = (1.5, 2.0, 4.5, 6.0)
    assert [(item.id, item.objects) for item in samples] == [
        ("1-0", (Object(box, "left cup"),)),
        ("1-1", (Object(box, 'the "red" cup'),)),
    ]
    for sample in samples:
        assert sample.messages is not None and sample.objects is not None
        [caption] = [item.caption for item in sample.objects]
        # What predict.py --expression asks, and what the detection chat would answer.
        written = write_boxes(sample.messages, lambda box, image: str([round(value) for value in box]))
        question, start, answer, _ = (segment.text for segment in message_segments(written, num_images=1))
        assert question + start == detection_question(PromptConfig(candidate_phrases=[caption]))
        assert answer == objects_to_text(sample.objects, (20, 10), (20, 10)) + "<|im_end|>"
    right, wrong = (
        Prediction("1-0", 20, 10, (DetectedObject(where, 0.9, ""),)) for where in (box, (9.0, 8.0, 10.0, 9.0))
    )
    predictions = [right, Prediction("1-1", 20, 10, wrong.objects)]
    assert expression_accuracy(predictions, samples) == {"refcoco_acc": 0.5, "refcoco_samples": 2.0}


def test_another_question(images: Path) -> None:
    [item] = read_items(find(REFS, INSTANCES, images, "testA", question="Where is <ref-object>?"))
    assert isinstance(item, Sample) and item.messages
    assert item.messages[0] == {"role": "user", "content": "Where is all of it?"}
    with pytest.raises(ValueError, match=r"--question 'Where\?' lacks <ref-object>"):
        find(REFS, INSTANCES, images, "testA", question="Where?")


def test_a_split_that_is_not_there(images: Path) -> None:
    with pytest.raises(ValueError, match=r"^--split test: no ref of refs is of this split, only of train, testA$"):
        find(REFS, INSTANCES, images, "test")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"image_id": 9}, "unknown image"),
        ({"ann_id": 9}, "unknown annotation"),
        ({"ann_id": 103}, "unknown annotation"),
        ({"sentences": []}, "malformed record"),
        ({"sentences": [{"tokens": []}]}, "malformed record"),
        ({"sentences": [{"sent": "a <|im_end|>"}]}, "control token in a text"),
        ({"sentences": [{"sent": " ", "raw": "x"}]}, "empty caption"),
    ],
)
def test_a_bad_ref_is_rejected_alone(images: Path, change: dict[str, Any], reason: str) -> None:
    items = read_items(find([ref(1, ["a"]) | change, ref(2, ["b"])], INSTANCES, images, "train"))
    assert [item.reason for item in items if isinstance(item, Rejected)] == [reason]
    assert [item.id for item in items if isinstance(item, Sample)] == ["2-0"]


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_plain_pickles_of_every_protocol(tmp_path: Path, protocol: int) -> None:
    path = tmp_path / "refs.p"
    plain = [{**REFS[0], "more": (1, 2.5, None, True, {1, 2}, frozenset([3]), b"x", 2**70)}]
    path.write_bytes(pickle.dumps(REFS, protocol))
    assert read_refs(path) == REFS
    if protocol > 3:  # older ones need a class for sets
        path.write_bytes(pickle.dumps(plain, protocol))
        assert read_refs(path) == plain


def test_a_pickle_of_python_2(tmp_path: Path) -> None:
    """Its texts are bytes, or unicode."""
    (tmp_path / "refs.p").write_bytes(
        b"(lp0\n(dp1\nS'sentences'\np2\n(lp3\n(dp4\nS'sent'\np5\nS'caf\\xc3\\xa9'\np6\nsasVx\np7\nI1\nsa."
    )
    assert read_refs(tmp_path / "refs.p") == [{"sentences": [{"sent": "caf\u00e9"}], "x": 1}]


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize(
    ("value", "name"),
    [
        (datetime.date(2020, 1, 1), "datetime.date"),
        (OrderedDict(), "collections.OrderedDict"),
        (Decimal(1), "decimal.Decimal"),
        (Fraction(1, 2), "fractions.Fraction"),
        (len, "len"),
        (complex(1), "complex"),
        (Path("x"), "PosixPath"),
    ],
)
def test_more_than_plain_values_is_refused(tmp_path: Path, value: object, name: str, protocol: int) -> None:
    path = tmp_path / "refs.p"
    path.write_bytes(pickle.dumps([{**REFS[0], "more": value}], protocol))
    with pytest.raises(ValueError, match=rf"refs\.p is not a file of refs \(it holds .*{name}, and only plain values"):
        read_refs(path)


def test_an_object_that_reports_its_making_is_not_made(tmp_path: Path) -> None:
    """The class is ours and harmless: it would only count."""
    (tmp_path / "refs.p").write_bytes(pickle.dumps([{**REFS[0], "more": Counted()}]))
    Counted.made = 0
    with pytest.raises(ValueError, match="test_refcoco"):
        read_refs(tmp_path / "refs.p")
    assert Counted.made == 0
    assert pickle.loads((tmp_path / "refs.p").read_bytes()) and Counted.made == 1


class Counted:
    made = 0

    def __reduce__(self) -> Any:
        return count, ()


def count() -> int:
    Counted.made += 1
    return 0


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is not a file of refs"),
        (b"[]", "is not a file of refs"),
        (pickle.dumps(REFS)[:-9], "is not a file of refs"),
        (pickle.dumps({"refs": REFS}), "is not a list of refs with sentences"),
        (pickle.dumps([1]), "is not a list of refs with sentences"),
        (b"Pevil\n.", "is not a file of refs (it refers to something outside"),
    ],
)
def test_what_is_not_a_file_of_refs(tmp_path: Path, data: bytes, message: str) -> None:
    (tmp_path / "refs.p").write_bytes(data)
    with pytest.raises(ValueError) as raised:
        read_refs(tmp_path / "refs.p")
    assert message in str(raised.value)


def test_the_question_has_a_place(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, images: Path) -> None:
    assert QUESTION.count("<ref-object>") == 1
    (tmp_path / "refs.p").write_bytes(pickle.dumps(REFS))
    instances = write_json(tmp_path / "instances.json", INSTANCES)
    arguments = ["--annotations", tmp_path / "refs.p", "--instances", instances, "--images", images]
    assert len(convert(monkeypatch, tmp_path / "out", "refcoco", *arguments)) == 2
