#!/usr/bin/env bash
# lmms-eval's ODinW task drops the scores of an answer's boxes and ranks them from the end of the list.
#
# Versions: lmms-eval 0.7.3 with pycocotools 2.0.11 and datasets 5.0.1.
# Valid use: the functions that its `odinw13.yaml` names, `odinw13_process_results` and `odinw13_map`, on one image of two
#   fish and an answer as the task's prompt asks for it: a JSON list of boxes, with scores as other detectors give them.
# Seen: two right boxes of score 0.9 and 0.8 and two wrong ones of 0.2 and 0.1. Best box first, as detectors write, gives a
#   mAP of 0.5; worst first gives 1.0; other scores change nothing. `_flatten_predictions` pops from the end of a stack and
#   keeps box and label alone, so COCOeval gets the score 1.0 for each, and its stable sort keeps the reversed order.
# Whom it hurts: who reports this mAP of a model that lists its surest boxes first gets the mAP of the opposite ranking.
# Remedy: write boxes by rising score; boxes of several images cannot be ranked by score at all.
# Exits with 0 while this holds, with 1 once it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --disable-pip-version-check --quiet 'datasets==5.0.1' 'pycocotools==2.0.11'
# Its other hundred dependencies are for other tasks and for models.
"$folder/venv/bin/python" -m pip install --disable-pip-version-check --quiet --no-deps 'lmms-eval==0.7.3'
cd "$folder"
cat > seen.py <<'PY'
import contextlib
import importlib.util
import io
import json
import runpy
from pathlib import Path

package = Path(importlib.util.find_spec("lmms_eval").origin).parent
odinw = runpy.run_path(str(package / "tasks/odinw13/utils.py"))
FISH = [[100, 100, 300, 200], [500, 400, 700, 550]]
WRONG = [[5, 700, 60, 760], [700, 5, 790, 90]]
IMAGE = {"dataset_name": "sea", "image_id": 0, "image_width": 800, "image_height": 800, "categories": ["fish"],
         "bboxes": FISH, "labels": ["fish", "fish"]}  # fmt: skip


def judged(boxes, scores):
    """The mAP of an answer."""
    answer = [{"bbox_2d": box, "label": "fish", "score": score} for box, score in zip(boxes, scores)]
    records = odinw["odinw13_process_results"](IMAGE, [json.dumps(answer)])
    with contextlib.redirect_stdout(io.StringIO()):
        return odinw["odinw13_map"]([records["odinw13_mAP"]])


best_first = judged(FISH + WRONG, [0.9, 0.8, 0.2, 0.1])
worst_first = judged(WRONG[::-1] + FISH[::-1], [0.1, 0.2, 0.8, 0.9])
other_scores = judged(WRONG[::-1] + FISH[::-1], [0.9, 0.9, 0.1, 0.1])
print(f"mAP, best box first: {best_first:.3f}; worst first: {worst_first:.3f}; with the wrong boxes scored best: {other_scores:.3f}")
raise SystemExit(0 if abs(best_first - 0.5) < 0.01 and worst_first > 0.99 and other_scores == worst_first else 1)
PY
"$folder/venv/bin/python" seen.py
