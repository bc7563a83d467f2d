"""The `sdtrain` command: the flows' work without Prefect."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sdtrain import __version__
from sdtrain.cli import batch, card, check, curate, doctor, evaluate, exposed, importing, model, search, status
from sdtrain.cli.output import AsJson, Form, print_json, print_table
from sdtrain.errors import UserError, user_error_of
from sdtrain.redaction import hide_secrets_in_logs, print_error

if TYPE_CHECKING:
    from sdtrain.dataset.layout import DatasetDir

# Our own code is imported inside the commands, so that help does not wait for torch.

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    epilog="Exit codes: 0 done; 1 a fault, with a traceback; 2 something to mend, said in a sentence.",
)


def _print_version(is_asked: bool) -> None:
    if is_asked:
        print(f"sdtrain {__version__}")
        raise typer.Exit


@app.callback()
def _sdtrain(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Rebuilds Stable Diffusion v1 from public data."""


def main() -> None:
    """The console script; exits with 2 and a sentence for what the user can mend, 1 and a traceback for the rest."""
    hide_secrets_in_logs()
    try:
        app()
    except Exception as error:  # typer would print it unredacted
        problem = user_error_of(error)
        if problem is None:
            print_error(type(error), error, error.__traceback__)
            sys.exit(1)
        print(f"error: {problem}", file=sys.stderr)
        sys.exit(2)


app.command("import")(importing.import_images)
app.command()(curate.build)
app.command()(curate.recipes)
app.command()(curate.recipe)


@app.command()
def funnel(dataset: curate.NamedDataset, as_json: AsJson = False) -> None:
    """Show what each rule dropped."""
    from filters.decide import funnel as numbers
    from filters.pipeline import STAGES
    from filters.recipe_record import read_recipe
    from sdtrain.dataset.open import open_to_ask

    directory = open_to_ask(dataset, "sdtrain funnel")
    recipe = read_recipe(directory)
    rows, remarks = numbers.funnel(directory, recipe, STAGES), numbers.remarks(directory, recipe, STAGES)
    if as_json:
        print_json({"reasons": rows, "remarks": remarks})
        return
    print_table([dict(row) for row in rows])
    print(*remarks, sep="\n")


@app.command()
def query(
    dataset: curate.NamedDataset,
    sql: Annotated[str, typer.Argument(help="One SELECT over the views; leave it out to see them.")] = "",
    explain: Annotated[bool, typer.Option("--explain", help="Show the plan and what each step took.")] = False,
    form: Annotated[Form | None, typer.Option("--format", help="Default: as the output file ends, or a table.")] = None,
    output: Annotated[Path | None, typer.Option(help="Write the answer to this file.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="As --format json: one object a line.")] = False,
) -> None:
    """Ask a dataset in SQL: it can be read, and nothing else can."""
    from filters.inspect.query import VIEWS_SQL, ask
    from sdtrain.cli.output import form_of, save, show

    if as_json and form not in (None, Form.json):
        raise UserError(f"Give --json or --format {form}, not both.")
    form = Form.json if as_json else form or form_of(output)
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
app.command()(doctor.doctor)
app.command()(curate.decide)
app.command()(curate.remove)
app.command()(batch.batch)
app.command()(exposed.exposed)
app.command()(model.sample)
app.command(cls=evaluate.FromProtocol)(evaluate.evaluate)
app.command()(model.export)
app.command()(search.search)
app.command()(search.memorised)
