"""What a build leaves beside its shards once every stage is finished."""

from __future__ import annotations

from filters.recipe import Recipe
from filters.views import write_views
from sdtrain.data.dataset import DatasetDir
from sdtrain.data.pack import write_index


def finish_dataset(dataset: DatasetDir, recipe: Recipe) -> None:
    """Writes the index of the packed shards and the DuckDB views, both anew."""
    write_index(dataset)
    write_views(dataset, recipe)
