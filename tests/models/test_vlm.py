"""The language model's wrapper: transformers' own logits, one pass of the vision tower, and contracts that raise."""

import io
import json
import shutil
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    GenerationConfig,
    Qwen2VLImageProcessorFast,
)

from recipe.config import ConfigError, ImageConfig, RecipeConfig
from recipe.data.encode import rope_positions
from recipe.data.image import image_spec, patchify
from recipe.joint import JointModel
from recipe.load import drop_ineffective_flags, load_processor
from recipe.models.attention import resolve_attention
from recipe.models.network import run_trunk
from recipe.models.vlm import (
    IS_TRANSFORMERS_4,
    ImageEmbedding,
    PixelNormalizer,
    VisionLanguageModel,
    check_packing_contract,
    load_vlm,
    scatter_features,
)
from recipe.prediction.decode import generate_answers, special_ids
from recipe.schema import Batch, Example
from recipe.tiny import build_tiny_checkpoint
from tests.benchmarks.real_size import write_processor
from tests.support.tiny_cases import EVERY_FAMILY, collator, make_samples, token_types

PICTURED = ("two", "empty", "crowded")


@pytest.fixture
def examples(tiny_examples: dict[str, Example]) -> list[Example]:
    return [tiny_examples[name] for name in (*PICTURED, "text")]


@pytest.fixture(scope="module")
def load(tiny_checkpoint: str) -> Callable[[str], VisionLanguageModel]:
    def load_with(attn_implementation: str) -> VisionLanguageModel:
        vlm = load_vlm(tiny_checkpoint, attn_implementation, "float64").eval()
        image_processor = Qwen2VLImageProcessorFast.from_pretrained(tiny_checkpoint)
        mean, std = list(image_processor.image_mean), list(image_processor.image_std)
        return VisionLanguageModel(vlm, PixelNormalizer(mean, std))

    return load_with


def hidden_states(vlm: VisionLanguageModel, batch: Batch) -> Tensor:
    """Of the real tokens, sample after sample."""
    states = run_trunk(vlm, batch).last_hidden_state
    mask = batch["attention_mask"]
    return states if mask is None else states[mask.flatten().bool()]


@EVERY_FAMILY
@torch.no_grad()
def test_logits_are_those_of_transformers(
    tiny_checkpoint: str,
    tiny_config: Callable[..., RecipeConfig],
    load: Callable[[str], VisionLanguageModel],
    tiny_examples: dict[str, Example],
):
    """Its own forward pass on the padded ids, with the image processor's `pixel_values`."""
    samples, processor = make_samples(), load_processor(tiny_checkpoint)
    names = ("crowded", "unannotated", "text")
    shown = [samples[name].image for name in names if samples[name].image]
    pictures = processor.image_processor([Image.open(io.BytesIO(image)) for image in shown], return_tensors="pt")
    batch = collator("standard")([tiny_examples[name] for name in names])
    assert torch.equal(pictures["image_grid_thw"], batch["image_grid_thw"])
    reference = AutoModelForImageTextToText.from_pretrained(
        tiny_checkpoint, attn_implementation="sdpa", dtype=torch.float64
    ).eval()
    mask = batch["attention_mask"]
    assert mask is not None
    expected = reference(
        input_ids=batch["input_ids"],
        attention_mask=mask,
        pixel_values=pictures["pixel_values"].double(),
        image_grid_thw=pictures["image_grid_thw"],
        **token_types(reference.forward, batch["input_ids"], reference.config.image_token_id),
    ).logits[mask.bool()]
    vlm = load("auto")
    found = vlm.logits(hidden_states(vlm, batch))
    assert float(expected.std()) > 0.1
    # measured: 8.9e-16
    assert float((found - expected).abs().max()) <= 1e-12


@EVERY_FAMILY
@torch.no_grad()
def test_attention_implementations_and_layouts_agree(
    load: Callable[[str], VisionLanguageModel], examples: list[Example]
):
    expected = hidden_states(load("sdpa"), collator("standard")(examples))
    for implementation in ("auto", "sdpa", "eager"):
        vlm = load(implementation)
        for layout in ("standard", "packed"):
            found = hidden_states(vlm, collator(layout)(examples))
            # measured: 0.0; 9.5e-7 of states around 1 with eager, whose softmax is transformers' float32
            tolerance = 1e-5 if implementation == "eager" else 1e-12
            assert float((found - expected).abs().max()) <= tolerance, (implementation, layout)


@EVERY_FAMILY
def test_the_embedding_of_pictures_is_hugging_faces_of_equal_frames(tiny_checkpoint: str):
    """Output and gradient, of a bias too, measured: 2.1e-15 of 2.1, and 2.5e-14 of 22."""
    vlm: Any = load_vlm(tiny_checkpoint, "sdpa", "float64")
    original = vlm.model.visual.patch_embed
    torch.manual_seed(0)
    original.proj.reset_parameters()  # moves a bias off 0 too
    pictures = ImageEmbedding(deepcopy(original))
    frame = torch.randn(20, 3, 1, original.patch_size**2, dtype=torch.float64)
    outputs = [original(frame.expand(-1, -1, 2, -1).flatten(1)), pictures(frame.flatten(1))]
    assert torch.allclose(*outputs, rtol=0, atol=5e-15)
    for name, _ in original.named_parameters():
        gradients = [
            torch.autograd.grad(output.pow(2).sum(), module.get_parameter(name), retain_graph=True)[0]
            for module, output in zip((original, pictures), outputs, strict=True)
        ]
        assert torch.allclose(*gradients, rtol=0, atol=5e-14)


def test_auto_is_the_packed_attention_without_a_gpu(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_attention("auto") == "packed_sdpa"
    assert resolve_attention("eager") == "eager"


@EVERY_FAMILY
@torch.no_grad()
def test_the_vision_tower_runs_once(tiny_model: JointModel, examples: list[Example]):
    """A forward pass of the whole model, also where there is no image; generation of answers runs it once more."""
    calls: list[int] = []
    visual = tiny_model.model.vlm.hf_model.model.visual
    handle = visual.register_forward_hook(lambda *_: calls.append(1))
    try:
        for batch in (
            collator("standard")(examples),
            collator("packed")(examples[:3]),
            collator("packed")(examples[3:]),
        ):
            calls.clear()
            tiny_model(batch)
            assert len(calls) == 1
    finally:
        handle.remove()


@pytest.mark.skipif(not IS_TRANSFORMERS_4, reason="the tower of transformers 5 has neither")
def test_windows_and_angles_are_those_of_transformers(load: Callable[[str], VisionLanguageModel]):
    """Bit for bit, also of images of several sizes and when they are asked again; its empty windows are left out."""
    visual: Any = load("auto").hf_model.model.visual
    original: Any = type(visual)
    for grids in ([[1, 8, 8]], [[1, 6, 10], [2, 18, 10], [1, 4, 4], [1, 10, 22], [1, 8, 8]], [[1, 8, 8], [1, 8, 8]]):
        for _ in range(2):
            order, ends = visual.get_window_index(torch.tensor(grids))
            expected_order, expected_ends = original.get_window_index(visual, torch.tensor(grids))
            assert torch.equal(order, expected_order) and ends == sorted(set(expected_ends))
            angles = visual.rot_pos_emb(torch.tensor(grids))
            assert torch.equal(angles, original.rot_pos_emb(visual, torch.tensor(grids)))


@pytest.mark.parametrize("num_features", [3, 5])
def test_placeholders_and_features_must_agree(num_features: int):
    embeds, mask = torch.zeros(2, 4, 8), torch.tensor([[True, True, False, False], [True, True, False, False]])
    with pytest.raises(ValueError, match=f"4 image placeholders but the images give {num_features} vision tokens"):
        scatter_features(embeds, mask, torch.ones(num_features, 8))


def test_features_go_where_the_placeholders_are():
    mask = torch.tensor([[False, True, False], [True, False, True]])
    features = torch.arange(1.0, 4.0)[:, None].expand(3, 2)
    scattered = scatter_features(torch.zeros(2, 3, 2), mask, features)
    assert scattered[..., 0].tolist() == [[0, 1, 0], [2, 0, 3]]


def breach(batch: Batch, **changes: Any) -> dict[str, Any]:
    arguments = {name: batch[name] for name in ("input_ids", "attention_mask", "position_ids", "segment_lengths")}
    return {**arguments, **changes}


def test_breaches_of_the_packing_contract_raise(examples: list[Example]):
    """Each of these mixes samples silently in transformers 4.57."""
    packed, padded = collator("packed")(examples), collator("standard")(examples)
    ones = torch.ones_like(packed["input_ids"])
    lengths = packed["segment_lengths"]
    assert lengths is not None
    cases = [
        breach(packed, position_ids=packed["position_ids"][1:]),
        breach(packed, attention_mask=ones),
        breach(packed, segment_lengths=None),
        breach(packed, segment_lengths=lengths[:-1]),
        breach(packed, input_ids=packed["input_ids"].repeat(2, 1)),
        breach(padded, attention_mask=None),
        breach(padded, segment_lengths=lengths),
        breach(padded, position_ids=padded["position_ids"][:2]),
    ]
    for arguments in cases:
        with pytest.raises(ValueError, match=r"use recipe\.data\.collate"):
            check_packing_contract(**arguments)
    check_packing_contract(**breach(packed))
    check_packing_contract(**breach(padded))


@EVERY_FAMILY
@pytest.mark.parametrize("size", [(56, 56), (140, 84), (101, 67), (333, 500)])
def test_normalised_patches_are_hugging_faces_pixel_values(tiny_checkpoint: str, size: tuple[int, int]):
    """Bit for bit, with and without a resize, in both frames."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (size[1], size[0], 3), generator=generator, dtype=torch.uint8)
    picture = Image.fromarray(pixels.numpy())
    image_processor = Qwen2VLImageProcessorFast.from_pretrained(tiny_checkpoint)
    expected = image_processor([picture], return_tensors="pt")
    spec = image_spec(image_processor, ImageConfig())
    patches, grid = patchify(picture, spec)
    assert patches.dtype == torch.uint8 and [list(grid)] == expected["image_grid_thw"].tolist()
    frame = PixelNormalizer(spec.image_mean, spec.image_std)(patches).view(len(patches), 3, -1)
    frames = expected["pixel_values"].view(len(patches), 3, 2, -1)
    assert torch.equal(frame, frames[:, :, 0]) and torch.equal(frame, frames[:, :, 1])


@EVERY_FAMILY
@torch.no_grad()
def test_answers_together_are_each_alone_and_greedy(
    load: Callable[[str], VisionLanguageModel], tiny_checkpoint: str, tiny_examples: dict[str, Example]
):
    """Each new token is the best one of a full pass over prompt and answer so far, without a cache."""
    vlm = load("auto")
    hf_config = AutoConfig.from_pretrained(tiny_checkpoint)
    chosen = [tiny_examples[name] for name in ("crowded", "unannotated", "two")]
    prompts = [example.input_ids[: example.prompt_length] for example in chosen]
    patches = torch.cat([example.pixel_patches for example in chosen])
    grids = torch.cat([example.image_grid_thw for example in chosen])
    assert vlm.hf_model.generation_config is not None
    vlm.hf_model.generation_config.repetition_penalty = 2.0  # of the base; it does not change an answer
    tokenizer = load_processor(tiny_checkpoint).tokenizer
    together = generate_answers(vlm, tokenizer, prompts, patches, grids, 5)
    ends = set(vlm.hf_model.generation_config.eos_token_id)
    for example, prompt, answer in zip(chosen, prompts, together, strict=True):
        alone = generate_answers(vlm, tokenizer, [prompt], example.pixel_patches, example.image_grid_thw, 5)[0]
        ids = prompt
        for step, token in enumerate(alone.tolist()):
            best = int(vlm.logits(last_state(vlm, ids, example, hf_config)).argmax())
            assert token == best == int(answer[step])
            ids = torch.cat([ids, torch.tensor([token])])
            if token in ends:
                break


def last_state(vlm: VisionLanguageModel, ids: Tensor, example: Example, hf_config: Any) -> Tensor:
    positions = rope_positions(ids, example.image_grid_thw, hf_config)[:, None]
    mask = torch.ones_like(ids)[None]
    states = vlm(ids[None], mask, positions, None, example.pixel_patches, example.image_grid_thw)
    return states.last_hidden_state[-1]


def test_a_checkpoint_that_is_not_there_is_named(tmp_path: Path):
    """Also one that the hub would not take for a name, and a folder that holds none."""
    for name in (str(tmp_path / "nowhere"), str(tmp_path)):
        with pytest.raises(ValueError, match=f"pretrained_model_name_or_path='{name}' is neither"):
            load_vlm(name, "auto", "float32")
        with pytest.raises(ConfigError, match=f"pretrained_model_name_or_path is '{name}', but neither a folder nor"):
            load_processor(name)


@EVERY_FAMILY
@pytest.mark.parametrize("is_named", [True, False])
def test_a_processor_is_that_of_transformers(tiny_checkpoint: str, is_named: bool, tmp_path: Path):
    """Both write the same files; ours also says which pattern is right, so that nobody is warned of it."""
    folder = shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint")
    for path in () if is_named else folder.glob("*.json"):
        values = json.loads(path.read_text())
        if values.pop("processor_class", None) is not None:
            path.write_text(json.dumps(values))
    processors = {"own": load_processor(str(folder)), "auto": AutoProcessor.from_pretrained(folder)}
    files: dict[str, dict[str, Any]] = {}
    for name, processor in processors.items():
        processor.save_pretrained(tmp_path / name)
        files[name] = {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()}
        files[name]["tokenizer_config.json"] = json.loads(files[name]["tokenizer_config.json"])
    assert files["own"]["tokenizer_config.json"].pop("fix_mistral_regex") is False
    files["own"]["tokenizer_config.json"].pop("use_fast", None)  # AutoProcessor passes it to the tokenizer too
    assert files["own"] == files["auto"]
    assert type(processors["own"]) is type(processors["auto"])


@pytest.mark.shared_data
def test_a_true_vocabulary_is_read_without_a_warning(
    shared_data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    write_processor("3b", tmp_path, shared_data / "tokenizer")
    caplog.clear()
    load_processor(str(tmp_path))
    assert not [record.getMessage() for record in caplog.records if "regex" in record.getMessage()]


@pytest.mark.skipif(not IS_TRANSFORMERS_4, reason="5 reads what it writes")
def test_a_tokenizer_that_transformers_5_wrote_is_refused_by_4(tiny_checkpoint: str, tmp_path: Path):
    folder = shutil.copytree(tiny_checkpoint, tmp_path / "copy")
    values = json.loads((folder / "tokenizer_config.json").read_text())
    values["extra_special_tokens"] = values.pop("additional_special_tokens")
    (folder / "tokenizer_config.json").write_text(json.dumps(values))
    with pytest.raises(ConfigError, match=r"has a tokenizer that transformers 4\..* cannot read .*: save it with that"):
        load_processor(str(folder))


def changed_checkpoint(
    folder: Path,
    weights: Callable[[dict[str, Tensor]], dict[str, Tensor]] = dict,
    config: Callable[[dict[str, Any]], object] = dict,
    tied: bool = True,
) -> str:
    """A small checkpoint with other weights, or another config.json."""
    build_tiny_checkpoint(
        str(folder), hidden_size=64, num_layers=1, vision_hidden_size=32, vision_depth=1, tie_word_embeddings=tied
    )
    path = folder / "model.safetensors"
    save_file(weights(load_file(path)), path, metadata={"format": "pt"})
    values = json.loads((folder / "config.json").read_text())
    config(values)
    (folder / "config.json").write_text(json.dumps(values))
    return str(folder)


def renamed(old: str, new: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda weights: {name.replace(old, new): value for name, value in weights.items()}


def without(part: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda weights: {name: value for name, value in weights.items() if part not in name}


def as_transformers_5_writes(values: dict[str, Any]) -> None:
    text = values["text_config"]
    text["rope_parameters"] = {**text.pop("rope_scaling"), "rope_theta": text.pop("rope_theta")}
    values["transformers_version"] = "5.1.0"


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"weights": without("merger.ln_q")}, r"lacks 1 of its \d+ weights \(model.visual.merger.ln_q.weight\)"),
        ({"weights": without("embed_tokens")}, r"lacks \d of its .*embed_tokens.weight"),
        ({"weights": without("lm_head"), "tied": False}, r"lacks 1 of its \d+ weights \(lm_head.weight\)"),
        ({"weights": renamed("q_proj", "query")}, r"lacks 2 of its .*it has 2 that the model does not know .*query"),
        ({"weights": lambda weights: {f"base.{k}": v for k, v in weights.items()}}, r"lacks \d\d of its"),
        ({"weights": lambda w: {k: v[:9].clone() if "lm_h" in k else v for k, v in w.items()}, "tied": False}, "shape"),
        ({"config": as_transformers_5_writes}, r"written by transformers 5\.1\.0, which 4\..* cannot read"),
        (
            {"config": lambda values: values.update(model_type="qwen2")},
            r"is of the model type qwen2: give a checkpoint of Qwen2-VL \(qwen2_vl\), Qwen2.5-VL \(qwen2_5_vl\)",
        ),
        ({"config": lambda values: values.update(model_type="qwen3_vl_moe")}, r"qwen3_vl_moe \(nothing here trains"),
        ({"config": lambda values: values.update(model_type="of_2030")}, r"model type of_2030: give a checkpoint of"),
        ({"config": lambda values: values.pop("model_type")}, r"model type None: give a checkpoint of"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_a_base_that_would_be_random_in_part_is_refused(tmp_path: Path, changes: dict[str, Any], expected: str) -> None:
    if changes.get("config") is as_transformers_5_writes and not IS_TRANSFORMERS_4:
        pytest.skip("transformers 5 reads what it wrote")
    with pytest.raises(ConfigError, match=expected) as raised:
        load_vlm(changed_checkpoint(tmp_path, **changes), "sdpa", "float32")
    assert "\n" not in str(raised.value)


def test_a_base_with_more_weights_than_the_model_is_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = changed_checkpoint(tmp_path, lambda weights: {**weights, "visual.extra.weight": torch.zeros(2)})
    load_vlm(folder, "sdpa", "float32")
    assert "has 1 that the model does not know (model.visual.extra.weight): they are not used" in caplog.text


def test_padding_and_ends_fall_back_on_the_tokenizers(load: Callable[[str], VisionLanguageModel], tiny_checkpoint: str):
    vlm, tokenizer = load("sdpa"), load_processor(tiny_checkpoint).tokenizer
    generation: Any = vlm.hf_model.generation_config
    generation.pad_token_id, generation.eos_token_id = 7, [8, 9]
    assert special_ids(vlm, tokenizer) == ({8, 9}, 7)
    generation.pad_token_id = generation.eos_token_id = None
    assert special_ids(vlm, tokenizer) == ({tokenizer.eos_token_id}, tokenizer.pad_token_id)
    prompt, (patches, grids) = torch.tensor([5, 6, 7]), (torch.empty(0, 588, dtype=torch.uint8), torch.empty(0, 3))
    given: dict[str, Any] = {}
    with pytest.MonkeyPatch.context() as patch:  # the model writes forever, unless it is told what ends an answer
        patch.setattr(vlm.hf_model, "generate", lambda **keywords: given.update(keywords) or keywords["input_ids"])
        generate_answers(vlm, tokenizer, [prompt], patches, grids, 5)
    assert given["eos_token_id"] == [tokenizer.eos_token_id] and given["pad_token_id"] == tokenizer.pad_token_id
    tokenizer.pad_token = None
    assert special_ids(vlm, tokenizer) == ({tokenizer.eos_token_id}, tokenizer.eos_token_id)


@pytest.mark.parametrize(
    ("flags", "dropped"),
    [
        ({"top_k": 3, "min_p": 0.1}, ["top_k", "min_p"]),
        ({"do_sample": True, "top_k": 3, "repetition_penalty": 1.05}, []),
        ({"length_penalty": 2.0, "output_scores": True}, ["length_penalty", "output_scores"]),
    ],
)
def test_generation_flags_without_effect_are_dropped(tmp_path: Path, flags: dict[str, Any], dropped: list[str]):
    generation = GenerationConfig(**flags, eos_token_id=5)
    assert sorted(drop_ineffective_flags(generation)) == sorted(dropped)
    generation.save_pretrained(tmp_path)
    kept = GenerationConfig.from_pretrained(tmp_path)
    assert kept.eos_token_id == 5 and bool(kept.do_sample) == flags.get("do_sample", False)
