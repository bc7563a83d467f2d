"""Datasets of earlier versions stay finished: without captions no fingerprint changes."""

import pytest

from filters.decide.stage import DECIDE
from filters.dedup.stage import DEDUP
from filters.recipe import known_recipes, load_recipe
from sdtrain.dataset.config import CaptionConfig, EncodeConfig
from sdtrain.dataset.layout import DatasetDir
from sdtrain.dataset.manifest import write_entry
from sdtrain.dataset.shard_report import Output, ShardReport
from sdtrain.encode.stage import ENCODE
from sdtrain.pack.stage import PACK

RECORDED = {
    "demo": ["dae33fcd8e6fe6ef", "d3d827055fab5bd0", "7404e66f48b61b7d", "18f4eef73e1a41ef"],
    "laion-aesthetics": ["20ea23d99ec2effc", "d3d827055fab5bd0", "55c6d791f94fc4f3", "d163d2149ba45f36"],
    "laion-high-resolution": ["20ea23d99ec2effc", "bf627afb20c8f8c1", "55c6d791f94fc4f3", "d163d2149ba45f36"],
    "laion2b-en": ["20ea23d99ec2effc", "9d4fe5e0c3dba8b6", "55c6d791f94fc4f3", "3e66c4961cb0b33d"],
    "own-images": ["66d04152a940052c", "f743a382a42ccc9e", "55c6d791f94fc4f3", "d163d2149ba45f36"],
}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """A manifest of made-up digests, so that the fingerprints depend on the recipe and the code alone."""
    dataset = DatasetDir(tmp_path_factory.mktemp("recorded"))
    outputs = {"select": "selection/00000.parquet", "download": "images/00000.tar", "score": "scores/00000.parquet"}
    outputs |= {"dedup": "duplicates.parquet", "decide": "decisions.parquet", "pack": "dataset/00000.tar"}
    for stage, name in outputs.items():
        files = {name: Output(sha256="0" * 64, bytes=1)}
        entry = ShardReport(stage=stage, shard=0, fingerprint="f" * 64, num_in=2, num_out=2, outputs=files)
        write_entry(dataset, entry)
    return dataset


def fingerprints(dataset, recipe):
    recipe = recipe.model_copy(update={"encode": EncodeConfig(vae="demo", resolution=recipe.encode.resolution)})
    return [stage.fingerprint(dataset, recipe, 0)[:16] for stage in (DEDUP, DECIDE, PACK, ENCODE)]


def test_every_shipped_recipe_has_the_fingerprints_that_finished_datasets_recorded(dataset):
    assert {name: fingerprints(dataset, load_recipe(name)) for name in known_recipes()} == RECORDED


def test_captions_change_those_of_decide_and_what_follows(dataset):
    recipe = load_recipe("demo")
    write_entry(dataset, ShardReport(stage="caption", shard=0, num_in=2, num_out=2))
    on = recipe.model_copy(update={"caption": CaptionConfig(from_duplicates=True)})
    before, after = fingerprints(dataset, recipe), fingerprints(dataset, on)
    assert before == RECORDED["demo"]
    assert (before[0], before[1] == after[1]) == (after[0], False)
