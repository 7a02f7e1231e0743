"""The notebook, from its first cell to its last, in a kernel of its own: with drawn shapes, and with a YOLO zip."""

import json
import os
import zipfile
from io import BytesIO
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient
from PIL import Image

from convert.shapes import draw_scene

NOTEBOOK = Path(__file__).with_name("own_data.ipynb")


def test_it_is_stored_without_outputs() -> None:
    cells = nbformat.read(NOTEBOOK, as_version=4).cells
    assert all(not cell.get("outputs") and not cell.get("execution_count") for cell in cells)


def yolo_zip(path: Path) -> str:
    """Ten scenes in JPEG with labels."""
    names: list[str] = []
    with zipfile.ZipFile(path, "w") as archive:
        for index in range(20):
            scene, lines, file = draw_scene(seed=8, index=index, image_size=84, max_objects=2), list[str](), BytesIO()
            Image.open(BytesIO(scene.image)).convert("RGB").save(file, "JPEG")
            for found in scene.objects or ():
                if found.caption not in names:
                    names.append(found.caption)
                x1, y1, x2, y2 = (value / 84 for value in found.box)
                lines.append(f"{names.index(found.caption)} {(x1 + x2) / 2} {(y1 + y2) / 2} {x2 - x1} {y2 - y1}")
            archive.writestr(f"cans/train/images/{index}.jpg", file.getvalue())
            archive.writestr(f"cans/train/labels/{index}.txt", "\n".join(lines))
        archive.writestr("cans/data.yaml", f"train: train/images\nnames: {json.dumps(names)}\n")
    return str(path)


@pytest.mark.parametrize(
    "form", [pytest.param("coco", marks=pytest.mark.slow), pytest.param("yolo", marks=pytest.mark.drill)]
)
def test_all_cells_run(form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RECIPE_WORK", str(tmp_path / "work"))
    monkeypatch.setenv("RECIPE_STEPS", "4")
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.setenv("JUPYTER_CONFIG_DIR", str(tmp_path / "jupyter"))
    if form == "yolo":
        monkeypatch.setenv("RECIPE_ZIP", yolo_zip(tmp_path / "cans.zip"))
    notebook: Any = nbformat.read(NOTEBOOK, as_version=4)
    client = NotebookClient(notebook, timeout=500, resources={"metadata": {"path": str(NOTEBOOK.parent)}})
    client.execute(env={**os.environ})
    work = tmp_path / "work"
    for made in ("look.html", "gallery.html", "eval/eval.json", "exported/README.md", "predictions/predictions.json"):
        assert (work / made).is_file(), made
    assert "as the lines above did" in notebook.cells[-1].outputs[0].text
