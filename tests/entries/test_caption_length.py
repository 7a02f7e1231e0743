"""`caption_decoder.max_caption_tokens: null`: found in the data once, then written down for all who come after."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from convert.shapes import iter_samples
from convert.write import write_split
from recipe.checkpoints.weights import read_weights
from recipe.config import LoaderConfig, RecipeConfig
from recipe.data.image import image_spec
from recipe.eval import main as evaluate
from recipe.export import main as export
from recipe.export import parse as parse_export
from recipe.load import build_network, load_processor
from recipe.models.vlm import load_vlm
from recipe.train import main as train
from tests.support.tiny_cases import load_model

POSITIONS = "model.caption_decoder.token_positions.weight"


@pytest.fixture
def make_run(tiny_config: Callable[..., RecipeConfig], tmp_path: Path) -> Callable[..., RecipeConfig]:
    """`make_run(seed_of_the_data, steps, max_caption_tokens)`, always in the same folder."""

    def make(seed: int, steps: int, max_caption_tokens: int | None) -> RecipeConfig:
        data = tmp_path / f"data{seed}"
        if not data.exists():
            samples = [replace(sample, objects=(sample.objects or ())[:1]) for sample in iter_samples(4, 11, 84)]
            if seed:
                longer = [replace(item, caption=f"{item.caption}, seen from afar") for item in samples[0].objects or ()]
                samples[0] = replace(samples[0], objects=tuple(longer))
            for split in ("train", "val"):
                write_split(iter(samples), str(data), split)
        loaders = [
            LoaderConfig(streams={"shapes": {"local": str(data), "split": split}}, global_batch_size=2)
            for split in ("train", "val")
        ]
        return replace(
            tiny_config(
                model={"dtype": "float32"},
                caption_decoder={"max_caption_tokens": max_caption_tokens},
                evaluation={"answers": None},
            ),
            run_folder=str(tmp_path / "run"),
            train_loader=loaders[0],
            eval_loader=loaders[1],
            trainer={
                "max_duration": f"{steps}ba",
                "eval_interval": "1ep",
                "save_interval": "1ba",
                "progress_bar": False,
            },
        )

    return make


@pytest.mark.slow
def test_the_limit_of_the_data_is_that_of_the_run(make_run: Callable[..., RecipeConfig], tmp_path: Path):
    config = make_run(0, 1, None)
    processor = load_processor(config.model.pretrained_model_name_or_path)
    texts = [item.caption for sample in iter_samples(4, 11, 84) for item in (sample.objects or ())[:1]]
    longest = 1 + max(len(ids) for ids in processor.tokenizer(texts)["input_ids"])
    assert 2 < longest < 16
    train(config).close()
    checkpoint = Path(config.run_folder, "checkpoints", "latest-rank0.pt")
    assert len(read_weights(checkpoint)[POSITIONS]) == longest
    saved = yaml.safe_load(Path(config.run_folder, "config.yaml").read_text())
    assert saved["caption_decoder"]["max_caption_tokens"] == longest

    # It goes on, is evaluated, read and exported by the yaml in which it is null.
    train(make_run(0, 2, None)).close()
    evaluate(replace(config, load_path=str(checkpoint), run_folder=str(tmp_path / "eval")))
    for given in (None, config):
        model, _, _ = load_model(checkpoint, given)
        assert model.model.caption_decoder.max_caption_tokens == longest
    export(parse_export(["--checkpoint", str(checkpoint), "--out", str(tmp_path / "model")]))
    exported = yaml.safe_load((tmp_path / "model" / "recipe.yaml").read_text())
    assert exported["caption_decoder"]["max_caption_tokens"] == longest
    model, _, _ = load_model(tmp_path / "model", config)
    assert model.model.caption_decoder.max_caption_tokens == longest

    # Other data would make another model of it.
    with pytest.raises(ValueError, match=rf"caption_decoder.max_caption_tokens: {longest} -> \d+"):
        train(make_run(1, 3, None))


def test_where_the_data_are_not_looked_into_it_is_asked_for(
    make_run: Callable[..., RecipeConfig], trained_checkpoint: Path, tmp_path: Path
):
    config = make_run(0, 1, None)
    processor = load_processor(config.model.pretrained_model_name_or_path)
    vlm = load_vlm(config.model.pretrained_model_name_or_path, "eager", "float32")
    with pytest.raises(ValueError, match=r"caption_decoder.max_caption_tokens is null.* give the number"):
        build_network(config, vlm, image_spec(processor.image_processor, config.image))
    lonely = tmp_path / "a" / "b" / "c" / "lonely.pt"
    lonely.parent.mkdir(parents=True)
    lonely.write_bytes(trained_checkpoint.read_bytes())
    with pytest.raises(ValueError, match=r"is null, and what .*lonely.pt was trained with is .*: give the number"):
        evaluate(replace(config, load_path=str(lonely)))
    model, _, _ = load_model(lonely, config)  # its weights say it
    assert model.model.caption_decoder.max_caption_tokens == 16
