"""The demo of captions asks its captioner by a valid recipe, and its two runs differ in nothing but their captions."""

from pathlib import Path

from PIL import Image

from flows.demo_captions import CONFIG, SOURCES, CaptionDemo, caption_recipe, draw_comparison, overall, write_config
from sdtrain.config import load_config
from sdtrain.demo.agreement import GUIDANCE_SCALES, PAIRS, Trial
from sdtrain.demo.captioner import MODEL
from sdtrain.demo.checker import Agreement


def test_the_recipe_asks_the_captioner_and_is_the_demos_otherwise(tmp_path: Path) -> None:
    recipe = caption_recipe(tmp_path, "http://127.0.0.1:8000/v1")
    assert recipe.caption.is_on
    assert recipe.caption.endpoint is not None
    assert recipe.caption.endpoint.model == MODEL
    assert list(recipe.caption.prompts) == ["short"]
    assert recipe.encode.vae == "demo"


def test_the_runs_differ_in_their_captions_alone(tmp_path: Path) -> None:
    alt, captions = (load_config(write_config(CaptionDemo(tmp_path), name)).model_dump() for name in SOURCES)
    assert alt["data"].pop("captions") != captions["data"].pop("captions")
    assert alt == captions
    plain = load_config(CONFIG).model_dump()
    plain["data"].pop("captions")
    assert alt == plain


def test_both_sheets_stand_side_by_side_with_their_shares() -> None:
    rounds = [[Image.new("RGB", (64, 64), "gray") for _ in PAIRS] for _ in GUIDANCE_SCALES]
    seen, unseen = Agreement(1.0, 1.0, 1.0, 120), Agreement(0.5, 0.0, 0.0, 24)
    trial = Trial(rounds, seen, unseen)
    assert overall(trial) == Agreement(0.9167, 0.8333, 0.8333, 144)
    page = draw_comparison(dict.fromkeys(SOURCES, trial))
    assert page.width > 2 * 1000
    assert page.getpixel((page.width - 2, 2)) == (255, 255, 255)
