#!/usr/bin/env bash
# Since transformers 5.18 the deepstack features that Qwen3-VL returns are no longer what its language model takes.
#
# Versions: transformers 5.17.0, and 5.18.0 to 5.24.0 (run: 5.17.0, 5.18.0 and 5.24.0), with torch 2.11.0.
# Valid use: `Qwen3VLModel.get_image_features` for two images, and its `deepstack_features` given to `language_model` as
#   `deepstack_visual_embeds`, as one does to compute an image's features once and use them twice.
# Seen: with 5.17.0 they are one tensor per tapped block, of all images' tokens, and the language model runs. Since 5.18.0
#   they are one tuple per block with a tensor per image, and the language model raises AttributeError ('tuple' object has
#   no attribute 'to'). The documented type is `List[torch.FloatTensor]` in all of them.
# Why: the features are split by image as those after the merger have always been; `Qwen3VLModel.forward` joins them again.
# Whom it hurts: who calls the parts of the model one by one: packed training, feature caches, detection heads.
# Remedy: `[torch.cat(list(taps)) if isinstance(taps, tuple) else taps for taps in deepstack_features]`.
# Exits with 0 while this holds, with 1 once it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --disable-pip-version-check --quiet 'torch==2.11.0' 'torchvision==0.26.0'
cd "$folder"
cat > seen.py <<'PY'
import sys

import torch
import transformers
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

TEXT = dict(
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=16,
    vocab_size=64,
    rope_parameters={"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0},
)
VISION = dict(depth=3, hidden_size=32, intermediate_size=64, num_heads=2, out_hidden_size=32)
VISION |= dict(patch_size=16, deepstack_visual_indexes=[0, 1])
torch.manual_seed(0)
model = Qwen3VLForConditionalGeneration(Qwen3VLConfig(text_config=TEXT, vision_config=VISION, image_token_id=5)).eval()
grid = torch.tensor([[1, 4, 4], [1, 8, 4]])  # of 4 and 8 tokens
with torch.no_grad():
    found = model.model.get_image_features(torch.randn(48, 3 * 2 * 16 * 16), grid)
    is_image = torch.ones(1, 12, dtype=torch.bool)
    try:
        model.model.language_model(
            inputs_embeds=torch.cat(list(found.pooler_output))[None],
            position_ids=torch.arange(12).expand(3, 1, 12),
            visual_pos_masks=is_image,
            deepstack_visual_embeds=found.deepstack_features,
        )
        ran = "runs"
    except AttributeError as error:
        ran = f"raises {error}"
kinds = [type(taps).__name__ for taps in found.deepstack_features]
print(f"transformers {transformers.__version__}: each of {len(kinds)} levels is a {kinds[0]}; the language model {ran}")
per_image = kinds == ["tuple", "tuple"] and ran.startswith("raises 'tuple'")
joined = kinds == ["Tensor", "Tensor"] and ran == "runs"
raise SystemExit(0 if (per_image if sys.argv[1] == "per image" else joined) else 1)
PY
for case in '5.17.0 joined' '5.18.0 per image' '5.24.0 per image'; do
    "$folder/venv/bin/python" -m pip install --disable-pip-version-check --quiet "transformers==${case%% *}"
    "$folder/venv/bin/python" seen.py "${case#* }"
done
