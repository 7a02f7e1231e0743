#!/usr/bin/env bash
# Without an attention mask, Qwen3-VL of transformers 4.57.6 does not attend across the rows of an image in training.
#
# Versions: transformers 4.57.6 with torch 2.7.0. transformers 5.17.0 gives the right result.
# Valid use: `Qwen3VLForConditionalGeneration` on one sample without padding, `attention_mask` left out,
#   `use_cache=False`, as gradient checkpointing sets it, with the attention "sdpa" or "eager".
# Seen: the logits of every token from the image's second on differ from those with a mask of ones, by up to three
#   standard deviations; without an image, or with `use_cache=True`, they are equal. No warning.
# Why: to find packed rows transformers looks for positions that do not rise by one. Qwen3-VL gives it the first of the
#   three rows of M-RoPE positions, the times, which are equal within an image and jump after it: each of its tokens
#   begins a new "sample", and so does the text behind it.
# Whom it hurts: who trains one sample per step and so needs no mask: the answer sees neither the image nor the question
#   before it.
# Remedy: a mask of ones, or four rows of position ids, the first of them 0, 1, 2, ...
# Exits with 0 while this holds, with 1 once it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --disable-pip-version-check --quiet \
    'transformers==4.57.6' 'torch==2.7.0' 'torchvision==0.22.0' 'numpy<2.3'
cd "$folder"
cat > seen.py <<'PY'
import torch
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

TEXT = dict(
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=2,
    head_dim=16,
    vocab_size=64,
    rope_scaling={"rope_type": "default", "mrope_section": [4, 2, 2], "mrope_interleaved": True},
)
VISION = dict(hidden_size=32, intermediate_size=64, depth=2, num_heads=2, out_hidden_size=32)
VISION |= dict(num_position_embeddings=16, deepstack_visual_indexes=[0])
IMAGE = 60
ids = torch.tensor([[1, 2, 62, *[IMAGE] * 4, 63, 5, 6, 7]])


def difference(attention, ids, use_cache):
    """Of each token's logits without a mask from those with a mask of ones, in their standard deviations."""
    torch.manual_seed(0)
    config = Qwen3VLConfig(
        text_config=TEXT,
        vision_config=VISION,
        image_token_id=IMAGE,
        video_token_id=61,
        vision_start_token_id=62,
        vision_end_token_id=63,
        attn_implementation=attention,
    )
    model = Qwen3VLForConditionalGeneration(config).double().eval()
    given = {"input_ids": ids, "use_cache": use_cache}
    if (ids == IMAGE).any():
        patches = torch.randn(16, 3 * 2 * 16 * 16, dtype=torch.float64)
        given |= {"pixel_values": patches, "image_grid_thw": torch.tensor([[1, 4, 4]])}
    with torch.no_grad():
        expected = model(**given, attention_mask=torch.ones_like(ids)).logits
        return ((model(**given).logits - expected).abs().amax(-1) / expected.std())[0]


ok = True
for attention in ("sdpa", "eager"):
    image, cached = (difference(attention, ids, use_cache) for use_cache in (False, True))
    text = difference(attention, ids[:, 7:], False)
    print(f"{attention}: with an image {[round(value, 2) for value in image.tolist()]}, ", end="")
    print(f"with a cache at most {cached.max():.1e}, without an image at most {text.max():.1e}")
    ok &= bool((image[4:] > 0.1).all() and cached.max() < 1e-6 and text.max() < 1e-6)
raise SystemExit(0 if ok else 1)
PY
"$folder/venv/bin/python" seen.py
