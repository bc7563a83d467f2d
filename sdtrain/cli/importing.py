"""`sdtrain import`: a dataset of the user's own images."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

# Our own code is imported inside the command, so that help does not wait for torch.

_COLUMNS = ("image", "caption")


def import_images(
    source: Annotated[
        Path, typer.Argument(help="A folder of images, WebDataset tars or Parquet with image bytes, or one such file.")
    ],
    output: Annotated[str, typer.Option(help="The dataset: its directory, or s3://…")],
    recipe: Annotated[
        str | None, typer.Option(help="A recipe's name or a YAML file. Default: own-images, or the dataset's own.")
    ] = None,
    columns: Annotated[
        str,
        typer.Option(help="Columns of Parquet, or keys of JSON: image=NAME,caption=NAME. Default: usual names."),
    ] = "",
    require_caption: Annotated[
        bool, typer.Option("--require-caption", help="Drop images without a caption. Default: an empty caption.")
    ] = False,
    encoding: Annotated[str | None, typer.Option(help="Of caption files. Default: utf-8.")] = None,
    follow_links: Annotated[
        bool | None, typer.Option(help="Read symbolic links that lead out of the source too, as the Hub's cache has.")
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="Stands for the source in URLs, import://NAME/path. Default: the folder's name.")
    ] = None,
    samples_per_shard: Annotated[int | None, typer.Option(help="Samples in one shard.", min=1)] = None,
    work_dir: Annotated[
        str | None, typer.Option(help="For an output on s3://: where its files lie on this machine.")
    ] = None,
) -> None:
    """Import your own images into a dataset; run it again to add those that are new. `sdtrain build` goes on."""
    from filters.importing import STAGES, ImportOptions, open_import
    from sdtrain.dataset.terminal_progress import run_with_bar

    given = {"columns": _parsed(columns), "encoding": encoding, "follow_links": follow_links, "name": name}
    options = ImportOptions(
        source=source,
        output=output,
        recipe=recipe,
        settings={setting: value for setting, value in given.items() if value not in (None, {})},
        require_caption=require_caption,
        samples_per_shard=samples_per_shard,
        work_dir=work_dir,
    )
    with open_import(options, lambda number: print(f"{number:,} images listed", file=sys.stderr)) as work:
        print(*work.update.sentences(), sep="\n", flush=True)
        if work.changes:
            print(f"Not the recipe of the import before; what this touches is redone: {work.changes}")
        for stage in STAGES:
            print(run_with_bar(stage, work.dataset, work.recipe, work.check_room), flush=True)
    print(f"{work.dataset}\nTo go on: sdtrain build {work.dataset.recipe} --output {work.dataset}")


def _parsed(columns: str) -> dict[str, str]:
    """The pairs of `image=NAME,caption=NAME`; raises `typer.BadParameter` for anything else."""
    pairs = [part.partition("=") for part in columns.split(",") if part.strip()]
    found = {ours.strip(): theirs.strip() for ours, _, theirs in pairs}
    if len(found) < len(pairs) or not all(found.values()) or not set(found) <= set(_COLUMNS):
        raise typer.BadParameter(f"--columns {columns}: expected {' and '.join(f'{c}=NAME' for c in _COLUMNS)}.")
    return found
