"""An import whose dataset lies on S3 goes on from another machine."""

from __future__ import annotations

import pytest

from filters.recipe import load_recipe
from filters.recipe_record import read_recipe, with_source
from filters.select.stage import SELECT
from sdtrain.dataset.lock import lock_to_change
from sdtrain.dataset.manifest import entries
from sdtrain.dataset.open import dataset_at
from sdtrain.dataset.stage import pending
from sdtrain.download.stage import DOWNLOAD
from tests.filters.importing.source_fixtures import import_into, jpeg, write_files
from tests.sdtrain.dataset.s3.s3_fixtures import BUCKET


def test_an_import_interrupted_here_is_finished_and_extended_from_an_empty_machine(server, store, tmp_path):
    source = write_files(tmp_path / "in", {f"{n}.jpg": jpeg(n) for n in range(6)})
    output = f"s3://{BUCKET}/imported"
    with pytest.raises(KeyboardInterrupt):
        import_into(output, source, max_shards=1, work_dir=str(tmp_path / "a"))
    assert "import/00000.parquet" in server.objects("imported")
    dataset, update = import_into(output, source, work_dir=str(tmp_path / "b"))
    assert (update.num_new, update.num_known) == (0, 6)
    write_files(source, {"new.jpg": jpeg(9)})
    dataset, update = import_into(output, source, work_dir=str(tmp_path / "c"))
    assert (update.num_new, update.num_known) == (1, 6)
    assert sorted(shard.num_out for shard in entries(dataset, "download")) == [1, 2, 4]
    other = dataset_at(output, tmp_path / "d")
    with lock_to_change(other, "test"):
        recipe = with_source(other, load_recipe("own-images"))
        assert recipe.source == read_recipe(dataset).source
        recipe = recipe.model_copy(update={"select": recipe.select.model_copy(update={"samples_per_shard": 4})})
        assert pending(SELECT, other, recipe) == pending(DOWNLOAD, other, recipe) == []
