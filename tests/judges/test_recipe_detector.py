"""`recipe.judges.lmms_eval` with a stub of lmms-eval's interface: its answers are those of `predict.py`."""

import importlib
import json
import sys
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from convert.shapes import draw_scene
from recipe.export import main as export
from recipe.export import parse as parse_export
from recipe.images import open_image
from recipe.predict import main as predict
from recipe.prediction.options import parse

CLASSES = ["large red star", "small blue circle", "large red circle"]
ODINW = "Locate every instance that belongs to the following categories: ´{}´. Report bbox coordinates in JSON format."
GROUNDING = (
    'Locate every object that matches the description "{}" in the image. Report bbox coordinates in JSON format.'
)
REC = "bounded between 0 and 1. Please provide the bounding box coordinate of the region this sentence describes: {}"


class Stub:
    """What lmms-eval's base class gives a model."""

    def __init__(self) -> None:
        self.task_dict: dict[str, Any] = {}


@pytest.fixture
def judge(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The module under test, on the stub."""
    names = ("lmms_eval", "lmms_eval.api", "lmms_eval.api.model")
    for name in names:
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    setattr(sys.modules[names[-1]], "lmms", Stub)  # noqa: B010
    monkeypatch.delitem(sys.modules, "recipe.judges.lmms_eval", raising=False)
    yield importlib.import_module("recipe.judges.lmms_eval")
    del sys.modules["recipe.judges.lmms_eval"]


@pytest.fixture(scope="module")
def exported(trained_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = str(tmp_path_factory.mktemp("judged") / "model")
    export(parse_export(["--checkpoint", str(trained_checkpoint), "--out", folder]))
    return folder


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three scenes of unequal sizes."""
    folder = tmp_path_factory.mktemp("scenes")
    for index, size in enumerate((84, 112, 84)):
        scene = open_image(draw_scene(seed=4, index=index, image_size=size, min_objects=2).image)
        scene.crop((0, 0, size, size - 8 * index)).save(folder / f"{index}.png")
    return sorted(folder.glob("*.png"))


@pytest.fixture
def predicted(exported: str, files: list[Path], tmp_path: Path) -> Callable[..., list[dict[str, Any]]]:
    def run(*options: str) -> list[dict[str, Any]]:
        more = ["--out", str(tmp_path / "out"), "--overwrite", "--no-drawings", *options]
        assert predict(parse(["--checkpoint", exported, *more, *map(str, files)])) == 0
        return json.loads((tmp_path / "out/predictions.json").read_text())

    return run


def ask(model: Any, files: list[Path], prompts: list[str], **settings: Any) -> list[str]:
    """Ask each file each prompt in turn: the requests of one file come one after another."""
    documents = [{"image": Image.open(file)} for file in files for _ in prompts]
    model.task_dict = {"task": {"test": documents}}
    requests = [
        SimpleNamespace(args=(prompts[place % len(prompts)], settings, lambda it: [it["image"]], place, "task", "test"))
        for place in range(len(documents))
    ]
    return model.generate_until(requests)


def test_class_lists_are_answered_as_predict_does(
    judge: Any, exported: str, files: list[Path], predicted: Callable[..., list[dict[str, Any]]]
) -> None:
    rows = predicted("--answer", "boxes", "--classes", ",".join(CLASSES), "--nms-iou", "0.9")
    one = predicted("--answer", "boxes", "--score-threshold", "0.5")
    prompts = [ODINW.format(", ".join(CLASSES)), ODINW.format("fish")]
    together = ask(judge.RecipeDetector(exported, batch_size="2", nms_iou=0.9), files, prompts)
    alone = ask(judge.RecipeDetector(exported, nms_iou=0.9), files, prompts)
    assert len(rows) == 3 and sum(len(row["objects"]) for row in rows) > 6
    for row, text, same in zip(rows, together[::2], alone[::2], strict=True):
        answer = json.loads(text)
        size = [row["width"], row["height"]] * 2
        best = [
            (item["box"], item["score"] * max(item["classes"].values()), item["caption"]) for item in row["objects"]
        ]
        best.sort(key=lambda item: item[1])  # rising
        for given, other, (box, score, name) in zip(answer, json.loads(same), best, strict=True):
            assert list(given) == ["bbox_2d", "label", "score"] and given["label"] == other["label"] == name
            assert [value * side for value, side in zip(given["bbox_2d"], size, strict=True)] == pytest.approx(
                box, abs=1e-2
            )
            assert given["score"] == pytest.approx(score, rel=1e-4)
            assert other["bbox_2d"] == pytest.approx(given["bbox_2d"], abs=1e-3)
        assert [item["score"] for item in answer] == sorted(item["score"] for item in answer)
    # A single class leaves no choice: every box has it.
    strict = judge.RecipeDetector(exported, batch_size=3, score_threshold=0.5)
    for row, text in zip(one, ask(strict, files, prompts)[1::2], strict=True):
        assert [item["label"] for item in json.loads(text)] == ["fish"] * len(row["objects"])


def test_an_expression_gets_the_best_box(
    judge: Any, exported: str, files: list[Path], predicted: Callable[..., list[dict[str, Any]]]
) -> None:
    rows = predicted("--answer", "both", "--expression", "the star", "--score-threshold", "0")
    prompts = [GROUNDING.format("the star"), REC.format("the star")]
    answers = ask(judge.RecipeDetector(exported, batch_size=4, score_threshold=1), files, prompts)
    for row, pixels, fractions in zip(rows, answers[::2], answers[1::2], strict=True):
        (found,) = json.loads(pixels)
        assert found["bbox_2d"] == pytest.approx(row["objects"][0]["box"], abs=0.02) and found["label"] == "the star"
        (same,) = json.loads(fractions)
        sides = [row["width"], row["height"]] * 2
        assert [value * side for value, side in zip(same["bbox_2d"], sides, strict=True)] == pytest.approx(
            found["bbox_2d"], abs=0.02
        )


def test_the_language_model_answers_if_asked_to(
    judge: Any, exported: str, files: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its list, parsed as predict.py does, in the task's unit; nothing if it is no list."""
    texts = iter(['[{"bbox_2d": [0, 0, 42, 84], "label": "A"}, {"bbox_2d": [42, 0, 84, 84], "label": "B"}]', "no"] * 2)
    monkeypatch.setattr("recipe.prediction.decode._texts", lambda tokenizer, rows: [next(texts) for _ in rows])
    model = judge.RecipeDetector(exported, answer="text")
    first, second = ask(model, files[:1], [ODINW.format("A, B"), GROUNDING.format("A")])
    assert [item["label"] for item in json.loads(first)] == ["A", "B"] and second == "[]"
    assert json.loads(first)[1] == {"bbox_2d": [0.5, 0, 1, 1], "label": "B", "score": 1}
    (best,) = json.loads(ask(model, files[:1], [GROUNDING.format("C")])[0])
    assert best == {"bbox_2d": [0, 0, 42, 84], "label": "C", "score": 1}


def test_other_questions_get_the_text_answer(
    judge: Any, exported: str, files: list[Path], predicted: Callable[..., list[dict[str, Any]]],
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    rows = predicted("--answer", "text", "--prompt", "Is there a star?", "--max-new-tokens", "9")
    texts = [row["answer"] for row in rows]
    model = judge.RecipeDetector(exported, batch_size=2)
    assert ask(model, files, ["Is there a star?"], max_new_tokens=9) == texts
    assert ask(model, files, ["<image> Is there a star?"], max_new_tokens=9, do_sample=False) != [""] * 3
    end = max(texts, key=len)[2:5]
    cut = ask(model, files, ["Is there a star?"], max_new_tokens=9, until=[end], num_beams=4)
    assert cut == [text.split(end)[0] for text in texts] and cut != texts
    assert caplog.text.count("answers greedily") == 1 and "cut off at max_new_tokens" in caplog.text


def test_an_image_that_cannot_be_used_is_logged(
    judge: Any, exported: str, files: list[Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    Image.new("RGB", (1000, 2)).save(tmp_path / "thin.png")
    answers = ask(judge.RecipeDetector(exported, batch_size=3), [files[0], tmp_path / "thin.png", files[1]], ["What?"])
    assert answers[1] == "" and len(answers) == 3
    assert caplog.text.count("is not answered") == 1 and "task, document 1 is not answered" in caplog.text


def test_pixels_arrive_as_they_are(judge: Any) -> None:
    """Transparency too, as predict.py reads a file; EXIF does not turn them again."""
    image = Image.new("RGBA", (40, 20), (255, 0, 0, 128))
    image.getexif()[0x0112] = 6
    asked = SimpleNamespace(name="task, document 0", boxes=None, prompt="What?")
    predictor = SimpleNamespace(teachers=[], num_teachers=0, encoder=lambda sample, teachers: sample)
    sample = judge._example(asked, image, predictor)
    buffer = BytesIO()
    image.save(buffer, "PNG", exif=b"")
    assert list(open_image(sample.image).getdata()) == list(open_image(buffer.getvalue()).getdata())
    assert (sample.width, sample.height) == open_image(sample.image).size == (40, 20)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"batch_size": "auto"}, "--batch_size auto: give a number"),
        ({"batch_size": 0}, "--batch_size 0: give a number"),
        ({"threshold": 0.5}, "threshold=...: not one of pretrained, answer"),
        ({"answer": "both"}, "answer=both: give boxes"),
        ({"device": "tpu"}, "--device tpu: the model runs on"),
        ({"pretrained": "nowhere"}, "nowhere"),
    ],
)
def test_wrong_arguments_end_in_one_line(judge: Any, exported: str, arguments: dict[str, Any], reason: str) -> None:
    with pytest.raises(SystemExit) as stopped:
        judge.RecipeDetector(**{"pretrained": exported, **arguments})
    assert reason in str(stopped.value) and "\n" not in str(stopped.value)


def test_what_it_cannot_be_asked(judge: Any, exported: str, files: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    model = judge.RecipeDetector(exported)
    for method in ("loglikelihood", "generate_until_multi_round"):
        with pytest.raises(NotImplementedError, match="choose tasks"):
            getattr(model, method)([])
    for images, what in (([], "0 media"), ([Image.open(files[0])] * 2, "2 media"), (["film.mp4"], "1 media .str.")):
        model.task_dict = {"task": {"test": [None]}}
        request = SimpleNamespace(args=("What?", {}, lambda _, images=images: images, 0, "task", "test"))
        with pytest.raises(SystemExit, match=f"task, document 0 has {what}"):
            model.generate_until([request])
    with pytest.raises(SystemExit, match="small blue"):  # too long a class: before anything is answered
        ask(model, files, ["What?", ODINW.format("a, " + "small blue " * 40)])
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit, match="one process"):
        judge.RecipeDetector(exported)
