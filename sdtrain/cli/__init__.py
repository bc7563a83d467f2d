"""The `sdtrain` command: the flows' work without Prefect."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sdtrain.cli import card, check, curate, evaluate, importing, model, search, status
from sdtrain.cli.output import Form, print_table
from sdtrain.errors import UserError
from sdtrain.redaction import hide_secrets_in_logs, print_error

if TYPE_CHECKING:
    from sdtrain.dataset.layout import DatasetDir

# Our own code is imported inside the commands, so that help does not wait for torch.

app = typer.Typer(
    help="Rebuilds Stable Diffusion v1 from public data.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)


def main() -> None:
    """The console script; a user error is one sentence and exit code 2."""
    hide_secrets_in_logs()
    try:
        app()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except Exception as error:  # typer would print it unredacted
        print_error(type(error), error, error.__traceback__)
        sys.exit(1)


app.command("import")(importing.import_images)
app.command()(curate.build)
app.command()(curate.recipes)
app.command()(curate.recipe)


@app.command()
def funnel(dataset: curate.NamedDataset) -> None:
    """Show what each rule dropped."""
    from filters.decide import funnel as numbers
    from filters.pipeline import STAGES
    from filters.recipe_record import read_recipe
    from sdtrain.dataset.open import open_to_ask

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
    """Write metadata.duckdb again, for instance after the dataset was moved."""
    from filters.inspect.views import write_views
    from filters.recipe_record import read_recipe
    from sdtrain.dataset.open import open_to_ask

    directory = open_to_ask(dataset, "sdtrain views")
    write_views(directory, read_recipe(directory))
    print(directory.database)


@app.command()
def report(dataset: curate.NamedDataset) -> None:
    """Write report.html again: the funnel, score histograms, examples of what was kept and dropped."""
    from filters.inspect.report import report_on
    from filters.recipe_record import read_recipe
    from sdtrain.dataset.lock import lock_to_read

    directory = _with_views(dataset, "sdtrain report")
    recipe = read_recipe(directory)
    with lock_to_read(directory, "sdtrain report"):
        print(report_on(directory, recipe))


def _with_views(name: str, command: str) -> DatasetDir:
    """A dataset with its metadata.duckdb, rewritten for S3, since it names local files."""
    from filters.inspect.views import write_views
    from filters.recipe_record import read_recipe
    from sdtrain.dataset.open import open_to_ask

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
