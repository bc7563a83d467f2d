"""`sdtrain …`: what the flows do, without Prefect."""

from __future__ import annotations

import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sdtrain.cli import card, check, curate, evaluate, model, search, status
from sdtrain.cli.output import Form, print_table
from sdtrain.errors import UserError
from sdtrain.redaction import hide_secrets_in_logs, print_error

if TYPE_CHECKING:
    from filters.recipe import Recipe
    from sdtrain.dataset.layout import DatasetDir

# Imports of our own code are inside the commands, so that a help text does not wait for torch.

app = typer.Typer(
    help="Rebuilds Stable Diffusion v1 from public data.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)

RecipeArgument = Annotated[str, typer.Argument(help="A recipe's name (see `sdtrain recipes`) or a YAML file.")]


def main() -> None:
    """The console script: a mistake that the user can put right is one sentence and exit code 2."""
    hide_secrets_in_logs()
    try:
        app()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except Exception as error:  # typer would print it itself, as it is
        print_error(type(error), error, error.__traceback__)
        sys.exit(1)


class NewFiles(StrEnum):
    """What becomes of metadata files that were added since the last build."""

    append = "append"
    reshuffle = "reshuffle"


@app.command()
def build(
    recipe: RecipeArgument,
    metadata: Annotated[str | None, typer.Option(help="Parquet with LAION's columns: file, folder, glob.")] = None,
    output: Annotated[str, typer.Option(help="The dataset's directory.")] = "data/{recipe}",
    limit: Annotated[int | None, typer.Option(help="At most this many rows, first in shuffled order.")] = None,
    min_side: Annotated[int | None, typer.Option(help="Shorter side in pixels, at least.")] = None,
    min_aesthetic: Annotated[float | None, typer.Option(help="Aesthetic score (V2), more than.")] = None,
    max_watermark: Annotated[float | None, typer.Option(help="Watermark probability, less than.")] = None,
    samples_per_shard: Annotated[int | None, typer.Option(help="Samples in one shard.")] = None,
    allow_private_hosts: Annotated[
        bool | None, typer.Option(help="Fetch from loopback and private networks too.")
    ] = None,
    new_files: Annotated[
        NewFiles | None, typer.Option(help="Metadata files added since: shards after the others, or a new shuffle.")
    ] = None,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Fetch rows again whose failure may have passed.")
    ] = False,
    work_dir: Annotated[
        str | None, typer.Option(help="With --output s3://…: where its files lie here. Default: the user's cache.")
    ] = None,
    keep_local: Annotated[
        bool, typer.Option(help="With --output s3://…: whether images and latents stay here once they are there.")
    ] = True,
) -> None:
    """Build a dataset, from metadata to latents; what is finished is not done again."""
    from filters.recipe import Overrides, load_recipe
    from filters.recipe_record import output_dataset
    from sdtrain.settings import parse_settings

    given = {
        "metadata": metadata,
        "limit": limit,
        "min_side": min_side,
        "min_aesthetic": min_aesthetic,
        "max_watermark": max_watermark,
        "samples_per_shard": samples_per_shard,
        "allow_private_hosts": allow_private_hosts,
        "new_files": new_files,
    }
    chosen = load_recipe(recipe, parse_settings(Overrides, given, "command line"))
    _build(chosen, output_dataset(output, chosen, work_dir), retry_failed, keep_local)


@app.command()
def recipes() -> None:
    """List the recipes that come with sdtrain."""
    from filters.recipe import known_recipes, load_recipe

    for name in known_recipes():
        print(f"{name:24} {load_recipe(name).description}")


@app.command()
def recipe(name: RecipeArgument) -> None:
    """Show a recipe whole, defaults included; saved to a file it is a recipe of your own to edit."""
    from filters.recipe import load_recipe
    from sdtrain.settings import dump_settings

    print(dump_settings(load_recipe(name)), end="")


@app.command()
def funnel(dataset: curate.NamedDataset) -> None:
    """Show what each rule dropped."""
    from filters.decide import funnel as numbers
    from filters.pipeline import STAGES
    from filters.recipe_record import read_recipe
    from sdtrain.dataset.s3.open import open_to_ask

    directory = open_to_ask(dataset, "sdtrain funnel")
    recipe = read_recipe(directory)
    print_table([dict(row) for row in numbers.funnel(directory, recipe, STAGES)])
    print(*numbers.remarks(directory, recipe, STAGES), sep="\n")


@app.command()
def query(
    dataset: curate.NamedDataset,
    sql: Annotated[str, typer.Argument(help="One SELECT over the views; leave it out to see them.")] = "",
    explain: Annotated[bool, typer.Option("--explain", help="Show the plan and what each step took.")] = False,
    form: Annotated[Form | None, typer.Option("--format", help="Default: as the output file ends, or a table.")] = None,
    output: Annotated[Path | None, typer.Option(help="Write the answer to this file.")] = None,
) -> None:
    """Ask a dataset in SQL: it can be read, and nothing else can."""
    from filters.inspect.query import VIEWS_SQL, ask
    from sdtrain.cli.output import form_of, save, show

    form = form or form_of(output)
    with ask(_with_views(dataset, "sdtrain query"), sql or VIEWS_SQL, explain) as answer:
        if explain:
            print(answer.read_all().column(1)[0].as_py())
        elif output:
            print(f"{save(answer, output, form):,} rows: {output}")
        else:
            show(answer, form)


@app.command()
def views(dataset: curate.NamedDataset) -> None:
    """Write metadata.duckdb anew, for instance after the dataset was moved."""
    from filters.inspect.views import write_views
    from filters.recipe_record import read_recipe
    from sdtrain.dataset.s3.open import open_to_ask

    directory = open_to_ask(dataset, "sdtrain views")
    write_views(directory, read_recipe(directory))
    print(directory.database)


@app.command()
def report(dataset: curate.NamedDataset) -> None:
    """Write report.html anew: the funnel, score histograms, examples of what was kept and dropped."""
    from filters.inspect.report import report_on
    from filters.recipe_record import read_recipe
    from sdtrain.dataset.lock import lock_to_read

    directory = _with_views(dataset, "sdtrain report")
    recipe = read_recipe(directory)
    with lock_to_read(directory, "sdtrain report"):
        print(report_on(directory, recipe))


def _with_views(name: str, command: str) -> DatasetDir:
    """A dataset with its metadata.duckdb, which is made anew for one on S3: it names files of this machine."""
    from filters.inspect.views import write_views
    from filters.recipe_record import read_recipe
    from sdtrain.dataset.s3.open import open_to_ask

    directory = open_to_ask(name, command)
    if directory.url:
        write_views(directory, read_recipe(directory))
    return directory


app.command()(status.status)
app.command()(status.metrics)
app.command()(card.card)
app.command()(card.plan)
app.command()(check.check)
app.command()(curate.decide)
app.command()(curate.remove)
app.command()(model.sample)
app.command(cls=evaluate.FromProtocol)(evaluate.evaluate)
app.command()(model.export)
app.command()(search.search)
app.command()(search.memorised)


def _build(recipe: Recipe, dataset: DatasetDir, retry_failed: bool, keep_files: bool) -> None:
    from filters.inspect.report import finish_dataset
    from filters.pipeline import STAGES
    from filters.preflight import BuildPreflight
    from filters.recipe_record import record_recipe, require_metadata, with_precision
    from sdtrain.dataset.lock import lock_to_change
    from sdtrain.dataset.s3.sync import keep_local
    from sdtrain.dataset.terminal_progress import run_with_bar
    from sdtrain.download.recovery import recover

    require_metadata(recipe)
    with lock_to_change(dataset, "sdtrain build"):
        recipe = with_precision(dataset, recipe)
        changes = record_recipe(dataset, recipe)
        if changes:
            print(f"Not the recipe of the run before; what this touches is redone: {'; '.join(changes)}")
        keep_local(dataset, keep_files)
        preflight = BuildPreflight(dataset, recipe)
        for stage in STAGES:
            if retry_failed and stage.name == "download":
                print(recover(dataset, recipe), flush=True)
            print(run_with_bar(stage, dataset, recipe, preflight), flush=True)
        finish_dataset(dataset, recipe)
    print(f"{recipe.name}: {dataset}")
