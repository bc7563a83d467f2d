"""A finished dataset of photos with embeddings, built once; tests that change it work on copies."""

from __future__ import annotations

import pytest

from filters.search.search import Search
from sdtrain.dataset.layout import DatasetDir
from tests.filters.removal_fixtures import NO_MODELS, NUM_ROWS, build, make_recipe, write_metadata

SCORED = NO_MODELS | {"clip_model": "ViT-demo", "clip_weights": "random:0", "store_embeddings": True}


@pytest.fixture(scope="session")
def embedded_dataset(photo_site, tmp_path_factory):
    """Scored by the demo's CLIP; `photo_site` says which images are copies of which."""
    pytest.importorskip("faiss")
    folder = tmp_path_factory.mktemp("embedded")
    metadata = write_metadata(folder / "metadata" / "a.parquet", photo_site[1], range(NUM_ROWS))
    dataset = DatasetDir(folder / "data")
    build(dataset, make_recipe(metadata, score=SCORED))
    return dataset


@pytest.fixture
def search(embedded_dataset):
    return Search(embedded_dataset)
