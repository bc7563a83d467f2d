"""Rules on measures of quality, from the image to the decision."""

import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageFilter, ImageOps

from filters.decide.stage import DECIDE
from filters.dedup import DEDUP
from filters.recipe import DecideConfig, Recipe
from filters.score.stage import SCORE
from filters.select_config import SelectConfig
from sdtrain.dataset.manifest import selection
from sdtrain.dataset.stage import run_batch
from tests.image_fixtures import Fetched, encoded, scene_image, write_downloads

NO_MODELS = dict.fromkeys(("clip_weights", "aesthetic_weights", "watermark_weights", "safety_weights"))
RULES = {"min_contrast": 0.02, "max_border": 0.3, "min_entropy": 2.0, "min_sharpness": 20.0}


def noisy(seed):
    scene = scene_image(seed, 512, 512)
    return Image.blend(scene, Image.effect_noise((512, 512), 120).convert("RGB"), 0.3)


PICTURES = {
    None: noisy(0),
    "min_contrast": Image.new("RGB", (512, 512), "teal"),
    "max_border": ImageOps.expand(noisy(1), 200, "white"),
    "min_entropy": Image.new("RGB", (512, 512), "white"),  # with stripes
    "min_sharpness": noisy(2).filter(ImageFilter.GaussianBlur(6)),
    "undecodable": None,
}
for left in range(0, 512, 64):
    PICTURES["min_entropy"].paste("black", (left, 0, left + 32, 512))


def test_each_rule_drops_what_it_is_for(tmp_path):
    contents = [b"\xff\xd8 damaged" if p is None else encoded(p) for p in PICTURES.values()]
    dataset = write_downloads(tmp_path, [Fetched(content) for content in contents])
    recipe = Recipe(name="test", score=NO_MODELS, decide=DecideConfig(rules=RULES))
    for stage in (SCORE, DEDUP, DECIDE):
        run_batch(stage, dataset, recipe, stage.shards(dataset, recipe))
    reasons = pq.read_table(dataset.decisions).column("reason").to_pylist()
    assert reasons == list(PICTURES)
    assert selection(dataset).num_out == len(reasons)


@pytest.mark.parametrize("rule", RULES)
def test_the_metadata_cannot_be_asked_for_them(rule):
    with pytest.raises(
        ValueError, match=f"rule '{rule}' looks at .* only a decoded image has; move it to `decide.rules`"
    ):
        SelectConfig(rules={rule: 0.1})
