"""Prompts that training saw most often, which are the ones whose images a model remembers first."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from functools import partial
from pathlib import Path

import duckdb

from filters.memorization.samples import Sample
from filters.search.search import read_image_file
from sdtrain.dataset.layout import DatasetDir
from sdtrain.dataset.selection import selected_shards
from sdtrain.errors import UserError
from sdtrain.sampling.sampler import SampleSettings

_CAPTIONS = """
SELECT caption, count(*) AS num FROM read_parquet($images, union_by_name = true) JOIN read_parquet($decisions) d
USING (uid) WHERE d.reason IS NULL AND trim(caption) != '' GROUP BY caption ORDER BY num DESC, caption LIMIT $num
"""


def repeated_captions(dataset: DatasetDir, num: int) -> list[tuple[str, int]]:
    """The captions that most kept images have, and how many do.

    Raises:
        UserError: nothing is decided yet, or kept.
    """
    images = [str(path) for shard in selected_shards(dataset) if (path := dataset.images_table(shard)).exists()]
    if not dataset.decisions.exists() or not images:
        raise UserError(f"{dataset.root} is not built as far as `keep`. Run `sdtrain build` again.")
    with closing(duckdb.connect()) as connection:
        asked = {"images": images, "decisions": str(dataset.decisions), "num": num}
        rows = connection.execute(_CAPTIONS, asked).fetchall()
    if not rows:
        raise UserError(f"{dataset.root} holds no captions of kept images.")
    return rows


def draw_samples(
    model: Path, prompts: Sequence[str], per_prompt: int, seed: int, folder: Path, settings: SampleSettings
) -> list[Sample]:
    """Draws images for prompts into a folder, as `sdtrain sample --keep` does: what is there already is not drawn.

    Raises:
        UserError: no such model.
    """
    from sdtrain.formats.any_model import resolve_checkpoint
    from sdtrain.sampling.batch import Model, all_devices, cut, draw_batches, make_jobs
    from sdtrain.sampling.output_folder import Album, Writer

    album, jobs = Album(folder, Model(resolve_checkpoint(model)), settings), make_jobs(prompts, seed, per_prompt)
    pending = album.pending(cut(jobs, settings))
    with Writer(album) as writer:
        for job, image in draw_batches(album.model, pending, settings, all_devices()):
            writer.save(job, image, flagged=False)
    paths = [(job, album.path(job)) for job in jobs]
    return [Sample(path.name, partial(read_image_file, path), job.prompt) for job, path in paths]
