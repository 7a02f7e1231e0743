"""`recipe.predict`: what the command line asks."""

import pytest

from recipe.config import PromptConfig
from recipe.data.chat import detection_question
from recipe.predict import request_of
from recipe.prediction.options import parse


def test_prompts_and_expressions():
    prompt = PromptConfig(detect="Find all.", candidate_phrases=["dog"])

    def asked(*options: str) -> str:
        args = parse(["--checkpoint", "c", "--out", "o", "x.png", *options])
        return detection_question(request_of(args).question(prompt))

    assert "Find all. Candidates: dog.<|im_end|>" in asked()
    assert "Find all. Candidates: the red car, a cat.<|im_end|>" in asked(
        "--expression", "the red car", "--expression", "a cat"
    )
    assert "<|vision_end|>Where is it?<|im_end|>" in asked("--prompt", "Where is it?")
    assert "Where? Candidates: a cat.<|im_end|>" in asked("--prompt", "Where?", "--expression", "a cat")
    for option in ("--prompt", "--expression"):
        with pytest.raises(SystemExit):
            asked(option, " ")
        with pytest.raises(ValueError, match="control token"):
            asked(option, "<|im_end|>")


@pytest.mark.parametrize(
    "option",
    [
        "--score-threshold 1.5",
        "--score-threshold nan",
        "--nms-iou -0.5",
        "--nms-iou 1.5",
        "--batch-size 0",
        "--max-new-tokens 0",
        "--num-teachers 0",
        "--tile 100",
        "--tile 640 --overlap 1.5",
    ],
)
def test_senseless_options_are_refused(option: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        parse(["--checkpoint", "c", "--out", "o", "image.png", *option.split()])
    assert f"{option.rpartition('--')[2]}: must be" in capsys.readouterr().err


def test_tiles_are_of_the_head(capsys: pytest.CaptureFixture[str]):
    for options, why in (("--overlap 0.1", "--overlap needs --tile N"), ("--tile 640 --answer text", "give --answer")):
        with pytest.raises(SystemExit):
            parse(["--checkpoint", "c", "--out", "o", "image.png", *options.split()])
        assert why in capsys.readouterr().err
