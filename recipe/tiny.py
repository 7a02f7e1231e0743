"""A tiny, random checkpoint folder of any family that loads through the same code as the real ones.

    python -m recipe.tiny --out DIR [--model qwen2_5_vl]

It works offline and holds a byte-level BPE tokenizer with Qwen's special tokens and chat template, the image processor
and a random model of 1.5 million parameters. Its ids differ from the real ones, so code that does not take every id
from the config or the tokenizer fails.
"""

import argparse
import itertools
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
import transformers
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import GenerationConfig, PretrainedConfig, Qwen2TokenizerFast, Qwen2VLImageProcessorFast
from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor

from recipe.configure import expand_home
from recipe.families import FAMILIES

SPECIAL_TOKENS = [
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>",
    "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
    "<|image_pad|>", "<|video_pad|>",
]  # fmt: skip
# Qwen2's pre-tokenizer: every digit is one token.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "{% endif %}"
    "<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for content in message['content'] %}"
    "{% if content['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif content['type'] == 'video' %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif 'text' in content %}{{ content['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tokenizer_corpus() -> Iterator[str]:
    """Yield text like the recipe's: detection answers and prompts, colours, shapes and everyday words."""
    colours = ["red", "green", "blue", "yellow", "orange", "purple", "cyan", "white", "black", "gray", "brown", "pink"]
    shapes = ["circle", "square", "triangle", "rectangle", "star", "diamond", "cross", "ellipse", "hexagon"]
    chess = ["pawn", "knight", "bishop", "rook", "queen", "king"]
    for size, colour, shape in itertools.product(["small", "large"], colours, shapes):
        yield f'[{{"bbox_2d": [1, 2, 3, 4], "label": "{size} {colour} {shape}"}}, {{"bbox_2d": [5, 6, 7, 8], '
    for colour, piece in itertools.product(["white", "black"], chess):
        yield from [f'"label": "{colour}-{piece}"}}]'] * 4
    yield from ["Locate every object in the image and report bounding boxes as JSON.\n"] * 50
    yield from ["system\nYou are a helpful assistant.\nuser\nassistant\n[]\n"] * 50
    yield from ["the quick brown fox jumps over the lazy dog. a person on a bicycle beside a car and a truck. "] * 20


def build_tiny_tokenizer(corpus: Iterable[str], vocab_size: int = 512) -> Qwen2TokenizerFast:
    """Return a byte-level BPE tokenizer like Qwen2's, trained on `corpus`; it encodes any text."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=False))
    tokenizer.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(SPLIT), behavior="isolated", invert=False)
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(corpus, trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    return Qwen2TokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        unk_token=None,  # pyright: ignore[reportArgumentType] - Qwen's tokenizer has none
        bos_token=None,
        model_max_length=131072,
        additional_special_tokens=SPECIAL_TOKENS[1:],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def tiny_config(
    tokenizer: Qwen2TokenizerFast,
    hidden_size: int,
    num_layers: int,
    vision_hidden_size: int,
    vision_depth: int,
    tie_word_embeddings: bool,
    model_type: str = "qwen2_5_vl",
) -> PretrainedConfig:
    """Return the config of a small model of a family with the tokenizer's ids."""
    ids: dict[str, Any] = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS}
    num_heads = max(2, hidden_size // 32)
    head_pairs = hidden_size // num_heads // 2
    family = FAMILIES[model_type]
    return getattr(transformers, family.config)(
        text_config={
            "vocab_size": (len(tokenizer) + 63) // 64 * 64,
            "hidden_size": hidden_size,
            "intermediate_size": hidden_size * 3,
            "num_hidden_layers": num_layers,
            "num_attention_heads": num_heads,
            "num_key_value_heads": max(1, num_heads // 2),
            "max_position_embeddings": 32768,
            "rms_norm_eps": 1e-6,
            "initializer_range": 0.08,
            "tie_word_embeddings": tie_word_embeddings,
            # Height and width rotate a head's slow pairs, and an image has few tokens: at the real base of 1e6 16 pairs
            # would not rotate at all, and at 20 answers learn later where an object is.
            "rope_theta": 4.0,
            **_text_parts(model_type, head_pairs),
            "eos_token_id": ids["<|im_end|>"],
            "bos_token_id": ids["<|endoftext|>"],
            "pad_token_id": ids["<|endoftext|>"],
        },
        vision_config={
            "depth": vision_depth,
            "num_heads": max(2, vision_hidden_size // 32),
            "patch_size": family.patch_size,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "initializer_range": 0.08,
            **_vision_sizes(model_type, hidden_size, vision_hidden_size, vision_depth),
        },
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=tie_word_embeddings,
    )


def _text_parts(model_type: str, head_pairs: int) -> dict[str, Any]:
    """Return what the families name differently in the config of the language model."""
    side = head_pairs * 3 // 8
    sections = {"type": "mrope", "mrope_section": [head_pairs - 2 * side, side, side]}
    if model_type != "qwen3_vl":
        return {"rope_scaling": sections, "use_sliding_window": False}
    third = head_pairs // 3  # every third pair is of the height, and of the width
    sections = {"mrope_section": [head_pairs - 2 * third, third, third], "mrope_interleaved": True}
    return {"rope_scaling": {"rope_type": "default", **sections}, "head_dim": 2 * head_pairs}


def _vision_sizes(model_type: str, hidden_size: int, width: int, depth: int) -> dict[str, Any]:
    """Return what the families name differently, or alone have, in the config of the vision tower."""
    windows = {"window_size": 112, "fullatt_block_indexes": [depth - 1], "tokens_per_second": 2}
    return {
        "qwen2_vl": {"embed_dim": width, "hidden_size": hidden_size, "mlp_ratio": 4},
        "qwen2_5_vl": {
            "hidden_size": width,
            "out_hidden_size": hidden_size,
            "intermediate_size": width * 3,
            **windows,
        },
        "qwen3_vl": {
            "hidden_size": width,
            "out_hidden_size": hidden_size,
            "intermediate_size": width * 3,
            "num_position_embeddings": 36,  # fewer than the patches of most images: they are interpolated
            "deepstack_visual_indexes": list(range(max(1, depth - 1)))[:3],
        },
    }[model_type]


def build_tiny_checkpoint(
    folder: str,
    hidden_size: int = 128,
    num_layers: int = 4,
    vision_hidden_size: int = 96,
    vision_depth: int = 3,
    vocab_size: int = 512,
    seed: int = 0,
    tie_word_embeddings: bool = True,
    image_mean: Sequence[float] | None = None,
    image_std: Sequence[float] | None = None,
    model_type: str = "qwen2_5_vl",
) -> None:
    """Write a checkpoint folder that `AutoProcessor` and `from_pretrained` load.

    Args:
        folder: Created if absent.
        hidden_size: Of the language model; a multiple of 64.
        num_layers: Of the language model.
        vision_hidden_size: Of the vision tower; a multiple of 32.
        vision_depth: Blocks of the vision tower; if it has windows, the last attends over the whole image.
        vocab_size: Of the tokenizer, without special tokens.
        seed: Of the random weights.
        tie_word_embeddings: The output matrix is the token embedding, as in the 3B but not the 7B.
        image_mean: Per channel, of values in [0, 1]; default: the family's.
        image_std: Per channel, of values in [0, 1]; default: the family's.
        model_type: Of `recipe.families`.
    """
    family = FAMILIES[model_type]
    token_pixels = (2 * family.patch_size) ** 2
    tokenizer = build_tiny_tokenizer(tokenizer_corpus(), vocab_size)
    image_processor = Qwen2VLImageProcessorFast(
        min_pixels=4 * token_pixels,
        max_pixels=1280 * token_pixels,
        patch_size=family.patch_size,
        temporal_patch_size=2,
        merge_size=2,
        image_mean=list(image_mean or family.image_mean),
        image_std=list(image_std or family.image_std),
    )
    video_processor = Qwen2VLVideoProcessor()  # pyright: ignore[reportCallIssue] - all have defaults
    processor = getattr(transformers, family.processor)(
        image_processor=image_processor,
        tokenizer=tokenizer,
        video_processor=video_processor,
        chat_template=CHAT_TEMPLATE,
    )
    sizes = (hidden_size, num_layers, vision_hidden_size, vision_depth)
    config = tiny_config(tokenizer, *sizes, tie_word_embeddings, model_type)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = getattr(transformers, family.model)(config)
    ends = [tokenizer.eos_token_id, tokenizer.pad_token_id]
    model.generation_config = GenerationConfig(eos_token_id=ends, pad_token_id=ends[1], do_sample=False)
    processor.save_pretrained(folder)
    model.save_pretrained(folder)


def main() -> None:
    """Run `python -m recipe.tiny --out DIR`."""
    parser = argparse.ArgumentParser(description="Write a tiny random checkpoint folder.")
    parser.add_argument("--out", required=True, help="folder to write")
    parser.add_argument("--model", choices=list(FAMILIES), default="qwen2_5_vl", help="default %(default)s")
    parser.add_argument("--hidden-size", type=int, default=128)
    parser.add_argument("--num-layers", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args([expand_home(argument) for argument in sys.argv[1:]])
    sizes = {"hidden_size": args.hidden_size, "num_layers": args.num_layers}
    build_tiny_checkpoint(args.out, **sizes, seed=args.seed, model_type=args.model)
    print(f"wrote a tiny random {FAMILIES[args.model].title} checkpoint to {args.out}")


if __name__ == "__main__":
    main()
