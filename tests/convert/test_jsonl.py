"""JSON lines that are right; the wrong ones are in test_records.py."""

import json
from pathlib import Path

import pytest
from convert_helpers import picture, read_rejected, read_samples, run_main

from recipe.schema import Object, Sample

CHAT = ({"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"})
PARTS = ({"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what?"}]}, CHAT[1])


def test_by_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "good.jpg").write_bytes(picture())
    names = ["sub/good.jpg"]
    box = {"bbox_2d": [1, 2, 3.5, 4], "desc": " été "}
    records = [
        {"id": "a", "images": names, "objects": [box], "width": 20, "height": 10, "source": "ignored"},
        {"id": 5, "images": names, "objects": {"ref": ["x", "y"], "bbox": [[0, 0, 20, 10], [1, 1, 2, 2]]}},
        {"images": names, "objects": []},
        {"images": names, "objects": None, "messages": PARTS},
        {"messages": CHAT, "images": [], "objects": []},
        {"images": names, "objects": {"ref": [], "bbox": []}, "messages": None, "width": None, "height": None},
    ]
    lines = [json.dumps(record) for record in records]
    path = tmp_path / "train.jsonl"
    path.write_text("\ufeff" + "\n".join([lines[0], "", *lines[1:]]), encoding="utf-8")
    arguments = ["--annotations", path, "--images", tmp_path, "--out", tmp_path / "out", "--split", "train", "--strict"]
    run_main(monkeypatch, "jsonl", *arguments)
    data = picture()
    assert read_samples(tmp_path / "out") == [
        Sample("a", data, 20, 10, (Object((1, 2, 3.5, 4), "été"),)),
        Sample("5", data, 20, 10, (Object((0, 0, 20, 10), "x"), Object((1, 1, 2, 2), "y"))),
        Sample("train-000004", data, 20, 10, ()),
        Sample("train-000005", data, 20, 10, None, PARTS),
        Sample("train-000006", b"", 0, 0, None, CHAT),
        Sample("train-000007", data, 20, 10, ()),
    ]
    assert read_rejected(tmp_path / "out") == []


@pytest.mark.shared_data
def test_real_sentences(shared_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """1000 drone photos' sentences on grey pictures of their size: 4 of the 5880 boxes stick out."""
    (tmp_path / "gray.png").write_bytes(picture((960, 540), mode="1", kind="PNG"))
    rows = [json.loads(line) for line in (shared_data / "uav_region_sentences" / "regions.jsonl").open()]
    path = tmp_path / "uav.jsonl"
    with path.open("w") as lines:
        for row in rows:
            boxes = [[x, y, x + w, y + h] for x, y, w, h in (region["bbox"] for region in row["regions"])]
            objects = {"ref": [region["phrase"] for region in row["regions"]], "bbox": boxes}
            lines.write(json.dumps({"id": row["file_name"], "images": ["gray.png"], "objects": objects}) + "\n")
    arguments = ["--annotations", path, "--images", tmp_path, "--out", tmp_path / "out", "--split", "train"]
    run_main(monkeypatch, "jsonl", *arguments)
    samples, rejected = read_samples(tmp_path / "out"), read_rejected(tmp_path / "out")
    assert len(rows) == len(samples) + len(rejected) == 1000
    assert {row["reason"] for row in rejected} == {"box outside the image"}
    assert [row["id"] for row in rejected] == ["423.jpg", "1428.jpg", "939.jpg"]  # the fourth is out by 1 pixel
