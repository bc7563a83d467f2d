"""Credentials in DuckDB's own s3:// URLs, and those of the environment, come out nowhere."""

from __future__ import annotations

from urllib.parse import urlsplit

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from filters.inspect.views import write_views
from filters.recipe import Recipe
from filters.recipe_record import read_recipe, record_recipe
from filters.select.metadata_files import find_metadata
from filters.select.stage import SELECT
from sdtrain.dataset.layout import DatasetDir
from sdtrain.dataset.stage import run_batch
from sdtrain.errors import UserError
from tests.filters.store_fixtures import needs_httpfs
from tests.sdtrain.dataset.s3.s3_fixtures import BUCKET, KEY_ID, SECRET

pytestmark = needs_httpfs


def url_of(store, name, secret=SECRET):
    keys = f"s3_access_key_id={KEY_ID}&s3_secret_access_key={secret}&s3_region=us-east-1"
    return f"s3://{BUCKET}/{name}?{keys}&s3_endpoint={urlsplit(store.url).netloc}&s3_use_ssl=false&s3_url_style=path"


def files_with(root, words):
    contents = {path: path.name.encode() + path.read_bytes() for path in root.rglob("*") if path.is_file()}
    return [str(path) for path, content in contents.items() if any(word.encode() in content for word in words)]


@pytest.fixture
def signed(store, tmp_path, monkeypatch):
    """The store, with metadata in it, and no credentials but those in URLs."""
    for name in store.environment:
        monkeypatch.delenv(name)
    for number in range(2):
        path = tmp_path / "metadata.parquet"
        pq.write_table(pa.table({"URL": [f"https://e.com/{number}.jpg"], "TEXT": ["a"]}), path)
        store.put(path, f"signed/part-{number}.parquet")
    path.unlink()
    return store


@pytest.mark.parametrize("name", ["signed/part-0.parquet", "signed/part-*.parquet"])
def test_metadata_is_selected_and_its_keys_are_recorded_nowhere(signed, tmp_path, name):
    recipe = Recipe.model_validate({"name": "x", "select": {"metadata": url_of(signed, name)}})
    dataset = DatasetDir(tmp_path / "data")
    record_recipe(dataset, recipe)
    (report,) = run_batch(SELECT, dataset, recipe, [0])
    write_views(dataset, recipe)
    assert report.num_out == (1 if name.endswith("0.parquet") else 2)
    assert read_recipe(dataset).select.metadata == f"s3://{BUCKET}/{name}?credential-not-recorded"
    assert files_with(tmp_path, [SECRET, SECRET.replace("/", "%2F"), KEY_ID]) == []
    with pytest.raises(UserError, match="needs its query or password, which a record never holds"):
        find_metadata(read_recipe(dataset).select.metadata)


@pytest.mark.parametrize("name", ["signed/none.parquet", "none/*.parquet", "signed/part-?.parquet"])
def test_what_goes_wrong_shows_no_key(signed, name):
    with pytest.raises(UserError, match=f"s3://{BUCKET}/(signed|none)/") as raised:
        find_metadata(url_of(signed, name))
    assert [
        word for word in (SECRET, SECRET.replace("/", "%2F"), KEY_ID, "s3_secret") if word in str(raised.value)
    ] == []
