"""`sdtrain build`, `recipes` and `recipe`, and `decide` and `remove`, which change a finished dataset."""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager, nullcontext
from dataclasses import Field
from enum import StrEnum
from inspect import Parameter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from filters.build_options import BuildOptions
from sdtrain.cli.output import AsJson, print_json, print_table
from sdtrain.options import with_options

if TYPE_CHECKING:
    from filters.recipe import Recipe
    from sdtrain.dataset.layout import DatasetDir
    from sdtrain.dataset.progress import StageTotals
    from sdtrain.dataset.stage import Stage

# Our own code is imported inside the commands, so that help does not wait for torch.


def _complete_recipe(begun: str) -> list[str]:
    from filters.recipe import known_recipes

    return [name for name in known_recipes() if name.startswith(begun)]


RecipeArgument = Annotated[
    str,
    typer.Argument(help="A recipe's name (see `sdtrain recipes`) or a YAML file.", autocompletion=_complete_recipe),
]
NamedDataset = Annotated[str, typer.Argument(help="A dataset: its directory, or s3://…")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would become of it, and write nothing.")]


class DecideBy(StrEnum):
    """The source of the scores that rules compare."""

    metadata = "metadata"
    image = "image"

    @classmethod
    def parse(cls, text: str) -> DecideBy:
        """Parses the option, also `picture`, as `image` was called; raises `typer.BadParameter` for anything else."""
        try:
            return cls("image" if text == "picture" else text)
        except ValueError:
            raise typer.BadParameter(f"{text!r} is not one of {', '.join(map(repr, map(str, cls)))}.") from None


class RemoveBy(StrEnum):
    """The kind of a list's entries."""

    uid = "uid"
    url = "url"
    host = "host"
    sha256 = "sha256"
    phash = "phash"


def _typer_option(field: Field[Any], hint: Any) -> Parameter:
    """A command-line option for a field of `sdtrain.options`; switches that default to off get no --no-."""
    names = [f"--{field.name.replace('_', '-')}"] if field.default is False else []
    annotation = Annotated[hint, typer.Option(*names, help=field.metadata["help"])]
    return Parameter(field.name, Parameter.KEYWORD_ONLY, default=field.default, annotation=annotation)


@with_options(_typer_option, with_bounds=False)
def build(recipe: RecipeArgument, options: BuildOptions) -> None:
    """Build a dataset, from metadata to latents; what is finished is not done again."""
    from filters.build import open_build
    from filters.recipe import load_recipe
    from sdtrain.dataset.terminal_progress import run_with_bar
    from sdtrain.download.retry import retry_and_count
    from sdtrain.settings import check_options

    check_options(options, "command line")
    with open_build(load_recipe(recipe, options), options, "sdtrain build") as build:
        if build.changes:
            print(f"Not the recipe of the run before; what this touches is redone: {build.changes}")

        def run_stage(stage: Stage[Recipe]) -> StageTotals:
            totals = run_with_bar(stage, build.dataset, build.recipe, build.preflight)
            print(totals, flush=True)
            return totals

        build.run(
            run_stage,
            lambda: print(retry_and_count(build.dataset, build.recipe), flush=True),
            lambda sentence: print(f"warning: {sentence}", file=sys.stderr, flush=True),
        )
    print(f"{build.recipe.name}: {build.dataset}")


def recipes(as_json: AsJson = False) -> None:
    """List the recipes that come with sdtrain."""
    from filters.recipe import known_recipes, load_recipe

    described = {name: load_recipe(name).description for name in known_recipes()}
    if as_json:
        print_json(described)
        return
    for name, description in described.items():
        print(f"{name:24} {description}")


def recipe(name: RecipeArgument, as_json: AsJson = False) -> None:
    """Show a recipe whole, defaults included; saved to a file it is a recipe of your own to edit."""
    from filters.recipe import load_recipe
    from sdtrain.settings import dump_settings

    shown = load_recipe(name)
    if as_json:
        print_json(shown.model_dump(mode="json"))
    else:
        print(dump_settings(shown), end="")


def decide(
    dataset: NamedDataset,
    min_side: Annotated[int | None, typer.Option(help="Shorter side in pixels, at least.")] = None,
    min_aesthetic: Annotated[float | None, typer.Option(help="Aesthetic score (V2), more than.")] = None,
    max_watermark: Annotated[float | None, typer.Option(help="Watermark probability, less than.")] = None,
    rule: Annotated[list[str] | None, typer.Option(help="Any rule of `decide` as name=value; may be repeated.")] = None,
    decide_by: Annotated[
        DecideBy | None,
        typer.Option(
            help="Scores of the metadata, or of our own models.", parser=DecideBy.parse, metavar="<metadata|image>"
        ),
    ] = None,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Decide again which downloaded images stay, by other rules; no image is touched."""
    from filters.decide.stage import DECIDE
    from filters.decide.what_if import compare, decide_again, parse_rules, with_decide_rules
    from filters.pipeline import STAGES
    from filters.recipe_record import read_recipe
    from filters.remove.apply import finish_interrupted_removal
    from sdtrain.dataset.open import open_dataset
    from sdtrain.dataset.sync import fetch_inputs

    directory = open_dataset(dataset)
    limits = {"min_side": min_side, "min_aesthetic": min_aesthetic, "max_watermark": max_watermark}
    recipe = with_decide_rules(read_recipe(directory), limits | parse_rules(rule or []), decide_by)
    with _to_change(directory, "sdtrain decide", dry_run):
        if not dry_run:
            finish_interrupted_removal(directory)
        fetch_inputs(directory, DECIDE.inputs, [0])
        rows = compare(directory, recipe, STAGES)
        if not as_json:
            print_table(rows)
        changes = [] if dry_run else decide_again(directory, recipe)
    if as_json:
        print_json({"reasons": rows, "changes": changes, "written": not dry_run})
    elif dry_run:
        print("Nothing was written.")
    else:
        print("; ".join(changes) or "The recipe stays as it was.")
        print(f"To pack by this: sdtrain build {directory.recipe} --output {directory}")


def remove(
    dataset: NamedDataset,
    entries: Annotated[
        Path, typer.Option("--list", help="One entry a line (.txt), or Parquet with a column named like --by.")
    ],
    by: Annotated[RemoveBy, typer.Option(help="What an entry is; a host means its subdomains too.")] = RemoveBy.uid,
    radius: Annotated[
        int | None,
        typer.Option(
            help="Near-duplicates too: perceptual hashes that differ in at most this many bits.", min=0, max=16
        ),
    ] = None,
    run: Annotated[
        list[Path] | None, typer.Option(help="A run that may have seen them, besides those known; may be repeated.")
    ] = None,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Take samples out for good: from images, scores, dataset and latents; they do not come back."""
    from filters.exposure.seen import runs_that_saw
    from filters.recipe_record import read_recipe
    from filters.remove.apply import finish_removal, start_removal
    from filters.remove.plan import find_removal
    from sdtrain.dataset.open import open_dataset
    from sdtrain.dataset.sync import fetch_tables

    directory = open_dataset(dataset)
    read_recipe(directory)  # raises if there is no dataset
    with _to_change(directory, "sdtrain remove", dry_run):
        said = _Sentences(are_kept=as_json)
        if not dry_run and finish_removal(directory):
            said.add("A removal that had been interrupted is finished now.")
        fetch_tables(directory)
        removal = find_removal(directory, entries, by.value, radius)
        said.add(*removal.sentences())
        seen_by = runs_that_saw(directory, sorted(removal.uids), run or ()) if removal.uids else []
        said.add(*(sentence for seen in seen_by for sentence in seen.sentences()))
        if dry_run:
            said.add("Nothing was written.")
        elif removal.has_effect:
            start_removal(directory, removal)
            said.add(*finish_removal(directory))
    if as_json:
        written = not dry_run and removal.has_effect
        runs = [seen.row() for seen in seen_by]
        print_json(removal.counts() | {"runs": runs, "written": written, "said": said.lines})


class _Sentences:
    """Prints sentences as they come, or keeps them for a JSON document."""

    def __init__(self, are_kept: bool) -> None:
        self.lines: list[str] = []
        self._are_kept = are_kept

    def add(self, *sentences: str) -> None:
        self.lines += sentences
        if sentences and not self._are_kept:
            print(*sentences, sep="\n")


def _to_change(directory: DatasetDir, command: str, dry_run: bool) -> AbstractContextManager[object]:
    from sdtrain.dataset.lock import lock_to_change

    return nullcontext() if dry_run else lock_to_change(directory, command)
