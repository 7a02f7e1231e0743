"""Files of one format given to the converter of another: one sentence names the right one."""

import json
import pickle
from pathlib import Path

import pytest
from convert_helpers import run_main

CSV = b"image,xmin,ymin\na.jpg,1,2\n"
COCO = json.dumps({"images": [], "annotations": [], "categories": []}).encode()
REGIONS = json.dumps([{"id": 1, "regions": [{"region_id": 2, "phrase": "a"}]}]).encode()
CHAT = json.dumps([{"image": "a.jpg", "conversations": []}]).encode()


@pytest.mark.parametrize("content", [CSV, COCO, REGIONS, CHAT, b"PAR1\x15\x04", pickle.dumps([{"ref_id": 1}])])
@pytest.mark.parametrize(
    ("name", "own"),
    [
        ("coco", COCO),
        ("lvis", COCO),
        ("visual_genome", REGIONS),
        ("refcoco", b"\x80"),
        ("parquet", b"PAR1"),
        ("jsonl", CHAT),
        ("odvg", b"-"),
        ("chat", CHAT),
    ],
)
def test_the_right_converter_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, own: bytes, content: bytes
) -> None:
    if content.startswith(own):
        pytest.skip("is its own format")
    path = tmp_path / "file"
    path.write_bytes(content)
    arguments = ["--annotations", path, "--images", tmp_path, "--out", tmp_path / "out", "--split", "train"]
    if name == "refcoco":
        (tmp_path / "instances.json").write_bytes(COCO)
        arguments += ["--instances", tmp_path / "instances.json"]
    if name == "visual_genome":
        (tmp_path / "image_data.json").write_text("[]")
    with pytest.raises(SystemExit) as raised:
        run_main(monkeypatch, name, *arguments)
    message = str(raised.value)
    assert "looks like" in message and "python -m convert" in message, message
    assert len(message.splitlines()) == 1
