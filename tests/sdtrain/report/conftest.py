"""A small dataset, built to its decisions."""

import pytest

from filters.decide.stage import DECIDE
from filters.dedup import DEDUP
from filters.inspect.views import write_views
from filters.recipe import Recipe
from filters.score.stage import SCORE
from sdtrain.dataset.stage import run_batch
from sdtrain.settings import dump_settings
from tests.image_fixtures import Fetched, encoded, scene_image, write_downloads

NO_MODELS = dict.fromkeys(("clip_weights", "aesthetic_weights", "watermark_weights", "safety_weights"))


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    return Recipe(name="small", score=NO_MODELS, duplicates={"level": "exact"}, decide={"rules": {"min_side": 512}})


@pytest.fixture(scope="module")
def dataset(recipe, tmp_path_factory):
    """Twelve rows: good ones, one too small, one copy, one damaged, two that failed."""
    good = [Fetched(encoded(scene_image(i)), original_px=(600, 600)) for i in range(7)]
    odd = [
        Fetched(encoded(scene_image(20)), original_px=(600, 300)),
        Fetched(encoded(scene_image(3)), original_px=(600, 600)),
        Fetched(b"\xff\xd8 damaged", original_px=(600, 600)),
        Fetched(None, reason="http_404"),
        Fetched(None, reason="timeout"),
    ]
    dataset = write_downloads(tmp_path_factory.mktemp("data"), good + odd)
    for stage in (SCORE, DEDUP, DECIDE):
        run_batch(stage, dataset, recipe, stage.shards(dataset, recipe))
    dataset.recipe.write_text(dump_settings(recipe))
    write_views(dataset, recipe)
    return dataset
