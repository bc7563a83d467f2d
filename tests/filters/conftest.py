"""A finished dataset of photos, built once for all tests that take something out of it."""

from __future__ import annotations

import pytest

from sdtrain.dataset.layout import DatasetDir
from tests.filters.embedded_fixtures import embedded_dataset, search  # noqa: F401 (fixtures)
from tests.filters.removal_fixtures import NUM_ROWS, build, make_recipe, serve, write_metadata, write_photos


@pytest.fixture(scope="session")
def photo_site(tmp_path_factory):
    """(folder of the web server's files, port)."""
    folder = tmp_path_factory.mktemp("site") / "www"
    write_photos(folder)
    with serve(folder) as port:
        yield folder, port


@pytest.fixture(scope="session")
def photo_dataset(photo_site, tmp_path_factory):
    """A dataset with all of its stages finished; tests work on copies."""
    folder = tmp_path_factory.mktemp("built")
    recipe = make_recipe(write_metadata(folder / "metadata" / "a.parquet", photo_site[1], range(NUM_ROWS)))
    dataset = DatasetDir(folder / "data")
    build(dataset, recipe)
    return dataset
