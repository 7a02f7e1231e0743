"""The page of the server in a real browser: an image is dropped on it, and its boxes are seen."""

import base64
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from convert.shapes import draw_scene
from recipe import Detector
from tests.support.chromium import Page
from tests.support.served import served

# As a user's drop gives it: an event whose dataTransfer holds a file.
DROP = """(() => {
  const bytes = Uint8Array.from(atob("%s"), (letter) => letter.charCodeAt(0));
  const transfer = new DataTransfer();
  transfer.items.add(new File([bytes], "scene.png"));
  document.dispatchEvent(new DragEvent("drop", {dataTransfer: transfer, bubbles: true, cancelable: true}));
})()"""
STATE = """(async () => {
  for (let turn = 0; turn < 600 && !/objects|[a-z]{4}/.test(document.getElementById("state").textContent); turn++)
    await new Promise((done) => setTimeout(done, 50));
  const boxes = [...document.querySelectorAll(".box")].map((box) => {
    const own = box.getBoundingClientRect(), frame = document.getElementById("image").getBoundingClientRect();
    return {box: [own.left - frame.left, own.top - frame.top, own.right - frame.left, own.bottom - frame.top],
            scale: frame.width, caption: box.textContent};
  });
  return JSON.stringify({state: document.getElementById("state").textContent, boxes,
                         rows: [...document.querySelectorAll("li")].map((row) => row.textContent)});
})()"""


@pytest.fixture(scope="module")
def detector(trained_checkpoint: Path) -> Detector:
    return Detector.from_pretrained(trained_checkpoint)


@pytest.fixture(scope="module")
def port(detector: Detector) -> Iterator[int]:
    with served(detector) as found:
        yield found


def drop(page: Page, data: bytes) -> dict[str, Any]:
    page.evaluate("document.getElementById('state').textContent = ''")
    page.evaluate(DROP % base64.b64encode(data).decode())
    return json.loads(page.evaluate(STATE))


def test_a_dropped_image_shows_its_boxes(browser: Page, port: int, detector: Detector, tmp_path: Path) -> None:
    data = draw_scene(seed=5, index=1, image_size=112, min_objects=2).image
    browser.open_url(f"http://127.0.0.1:{port}/")
    browser.evaluate("least = 0")
    found, expected = drop(browser, data), detector(data, threshold=0.0)
    assert found["state"].startswith(f"{len(expected.objects)} objects in 112 × 112 pixels")
    assert len(found["boxes"]) == len(expected.objects) > 0
    for shown, item in zip(found["boxes"], expected.objects, strict=True):
        scale = shown["scale"] / expected.width
        assert shown["box"] == pytest.approx([scale * value for value in item.box], abs=1.5)
        assert shown["caption"] == item.caption
    browser.screenshot(tmp_path / "page.png")
    assert not [event for event in browser.events if event["method"] == "Log.entryAdded"], "the policy is kept"


def test_a_refusal_is_shown(browser: Page, port: int) -> None:
    browser.open_url(f"http://127.0.0.1:{port}/")
    found = drop(browser, b"no image")
    assert "no known image format" in found["state"] and not found["boxes"]
