"""Prompts that training saw most often, which are the ones whose pictures a model remembers first."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import duckdb

from filters.search.memorised import Sample, read_samples
from sdtrain.data.dataset import DatasetDir
from sdtrain.data.selection import selected_shards
from sdtrain.errors import UserError

_CAPTIONS = """
SELECT caption, count(*) AS num FROM read_parquet($images, union_by_name = true) JOIN read_parquet($decisions) d
USING (uid) WHERE d.reason IS NULL AND trim(caption) != '' GROUP BY caption ORDER BY num DESC, caption LIMIT $num
"""


def repeated_captions(dataset: DatasetDir, num: int) -> list[tuple[str, int]]:
    """The captions that most kept pictures have, and how many do.

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
        raise UserError(f"{dataset.root} holds no captions of kept pictures.")
    return rows


def draw_samples(
    model: Path, prompts: Sequence[str], per_prompt: int, seed: int, folder: Path, guidance_scale: float, num_steps: int
) -> list[Sample]:
    """Draws pictures for prompts, as `sdtrain sample` does, into a folder, and reads them.

    Raises:
        UserError: no such model, or the folder holds pictures already.
    """
    from sdtrain.draw import Model, all_devices, draw, make_jobs, save_picture
    from sdtrain.sample import SampleSettings

    if folder.exists() and any(folder.glob("*.png")):
        raise UserError(f"{folder} holds pictures already. Choose another --output.")
    settings, chosen = SampleSettings(guidance_scale, num_steps), Model(model)
    for job, picture in draw(chosen, make_jobs(prompts, seed, per_prompt), settings, all_devices()):
        save_picture(folder / f"{job.seed:05d}.png", picture, job, chosen, settings)
    return read_samples(folder)
