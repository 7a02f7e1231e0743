"""The server with a real model: the answers of `Detector`, in every form of a request, and what it refuses."""

import base64
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from convert.shapes import draw_scene
from recipe import Detector
from recipe.serve.options import Limits, parse
from tests.support.served import ask, form, served

LIMITS = Limits(max_bytes=200_000, max_pixels=160_000, receive_seconds=5)


@pytest.fixture(scope="module")
def detector(trained_checkpoint: Path) -> Detector:
    return Detector.from_pretrained(trained_checkpoint)


@pytest.fixture(scope="module")
def port(detector: Detector) -> Iterator[int]:
    with served(detector, LIMITS, ("images.example.org",)) as found:
        yield found


@pytest.fixture(scope="module")
def scenes() -> list[bytes]:
    return [draw_scene(seed=5, index=index, image_size=84 + 28 * index, min_objects=2).image for index in range(4)]


def made(prediction: Any) -> dict[str, Any]:
    row = {name: value for name, value in prediction.to_json().items() if name != "id"}
    return json.loads(json.dumps(row))


def test_every_form_of_a_request(port: int, detector: Detector, scenes: list[bytes]) -> None:
    expected = made(detector(scenes[0], threshold=0.0, classes=["star", "circle"], answer="both"))
    assert expected["objects"] and expected["answer"]
    query = "/predict?threshold=0&classes=star&classes=circle&answer=both"
    question = {"threshold": 0, "classes": ["star", "circle"], "answer": "both"}
    as_json = json.dumps({**question, "image": base64.b64encode(scenes[0]).decode()}).encode()
    fields = (("threshold", "0"), ("classes", "star"), ("classes", "circle"), ("answer", "both"))
    for path, body, kind in (
        (query, scenes[0], "image/png"),
        (query, scenes[0], "application/octet-stream"),
        ("/predict", as_json, "application/json"),
        ("/predict", *form(scenes[0], fields)),
    ):
        status, content, _ = ask(port, path, body, kind)
        assert (status, content) == (200, expected), kind


def test_many_clients_get_their_own_answers(port: int, detector: Detector, scenes: list[bytes]) -> None:
    """In batches, whose sums have another order; measured: 0 pixels and 1e-8, and 1e-6 with a trained model."""
    expected = [made(detector(scene, threshold=0.0)) for scene in scenes]
    with ThreadPoolExecutor(12) as pool:
        found = list(pool.map(lambda number: ask(port, "/predict?threshold=0", scenes[number % 4])[:2], range(48)))
    for number, (status, content) in enumerate(found):
        assert status == 200
        own = expected[number % 4]
        assert (content["width"], content["height"]) == (own["width"], own["height"])
        assert len(content["objects"]) == len(own["objects"])
        for one, other in zip(content["objects"], own["objects"], strict=True):
            assert one["box"] == pytest.approx(other["box"], abs=0.011)  # the next hundredth
            assert one["score"] == pytest.approx(other["score"], abs=2e-6)
    measures = ask(port, "/metrics")[1].decode()
    (batches,) = (
        float(line.split()[1]) for line in measures.splitlines() if line.startswith("recipe_batch_images_count")
    )
    (images,) = (float(line.split()[1]) for line in measures.splitlines() if line.startswith("recipe_batch_images_sum"))
    assert images > 1.5 * batches, "requests share batches"


def large() -> bytes:
    file = BytesIO()
    Image.new("RGB", (401, 400)).save(file, "PNG")
    return file.getvalue()


REFUSED: list[tuple[str, bytes, str, int, str]] = [
    ("", b"no image", "image/png", 400, "no known image format"),
    ("", large(), "image/png", 413, "401 x 400 pixels, above 160000"),
    ("", b"x" * 200_001, "image/png", 413, "more than 0.19"),
    ("", b"x", "text/plain", 415, "content-type 'text/plain'"),
    ("?threshold=2", b"x", "image/png", 422, "threshold: "),
    ("?treshold=0.5", b"x", "image/png", 422, "treshold: "),
    ("?answer=all", b"x", "image/png", 422, "answer: "),
    ("?threshold=0.1&threshold=0.2", b"x", "image/png", 422, "threshold is given twice"),
    ("", b"{", "application/json", 422, "JSON: "),
    ("", b"{}", "application/json", 422, "one of image (base64) and url"),
    ("", b'{"image": "?"}', "application/json", 422, "not base64"),
    ("", b'{"url": "https://other.example.org/a.png"}', "application/json", 403, "allowed are images.example.org"),
    ("", form(b"")[0][:-40], form(b"")[1], 422, "no file named image"),
    ("", b"--x--\r\n", "multipart/form-data; boundary=x", 422, "no file named image"),
]


@pytest.mark.parametrize("case", REFUSED, ids=lambda case: f"{case[3]} {case[4]}")
def test_what_is_refused_says_why(port: int, case: tuple[str, bytes, str, int, str]) -> None:
    query, body, kind, expected, reason = case
    status, content, _ = ask(port, f"/predict{query}", body, kind)
    assert status == expected, content
    assert reason in content["detail"]


def test_a_truncated_image_is_refused(port: int, scenes: list[bytes]) -> None:
    status, content, _ = ask(port, "/predict", scenes[0][: len(scenes[0]) // 2])
    assert status == 400 and "cannot decode an image" in content["detail"] and "sample" not in content["detail"]


def test_a_question_that_the_model_cannot_be_asked(port: int, scenes: list[bytes]) -> None:
    name = "a+very+long+name+of+a+class+that+no+caption+could+hold" * 4
    status, content, _ = ask(port, f"/predict?classes=star&classes={name}", scenes[0])
    assert status == 422 and "give a shorter name" in content["detail"]


def test_health_and_interface(port: int) -> None:
    assert ask(port, "/health")[:2] == (200, {"status": "ok"})
    status, interface, _ = ask(port, "/openapi.json")
    assert status == 200
    operation = interface["paths"]["/predict"]["post"]
    assert set(operation["requestBody"]["content"]) == {"application/json", "multipart/form-data", "image/*"}
    assert {"200", "400", "413", "429"} <= set(operation["responses"])
    assert ask(port, "/none")[0] == 404


def test_the_command_line_names_a_wrong_flag(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, reason in (
        ("model --port 70000", "--port 70000: must be between"),
        ("model --max-requests 0", "--max-requests 0: must be above 0"),
        ("model --answer-seconds nan", "--answer-seconds nan: must be above 0"),
        ("model --allow-host https://example.org", "give a host's name alone"),
    ):
        with pytest.raises(SystemExit):
            parse(arguments.split())
        assert reason in capsys.readouterr().err
