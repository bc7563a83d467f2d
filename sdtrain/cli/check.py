"""`sdtrain check`: opens everything that a build or training run needs, without running it."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
import yaml

from sdtrain.cli.output import AsJson, print_json
from sdtrain.errors import UserError

if TYPE_CHECKING:
    from sdtrain.preflight.checks import Check

# Our own code is imported inside the commands, so that help does not wait for torch.


def _complete_name(begun: str) -> list[str]:
    from filters.recipe import known_recipes
    from sdtrain.config import known_configs

    return [name for name in (*known_recipes(), *known_configs()) if name.startswith(begun)]


def check(
    name: Annotated[
        str,
        typer.Argument(help="A recipe or a training config: a name or a YAML file.", autocompletion=_complete_name),
    ],
    metadata: Annotated[str | None, typer.Option(help="Of a recipe: Parquet with LAION's columns.")] = None,
    limit: Annotated[int | None, typer.Option(help="Of a recipe: at most this many rows.", min=1)] = None,
    data: Annotated[str | None, typer.Option(help="Of a config: the dataset's directory.")] = None,
    init_from: Annotated[str | None, typer.Option(help="Of a config: run or model to start from.")] = None,
    output: Annotated[str | None, typer.Option(help="Where the dataset or the run goes.")] = None,
    as_json: AsJson = False,
) -> None:
    """Open every file, network and folder that a build or a run will need; nothing is downloaded but weights."""
    from sdtrain.preflight.checks import findings

    if _is_recipe(name):
        checks = _of_recipe(name, metadata, limit, output)
    else:
        checks = _of_config(name, data, init_from, output)
    found = findings(checks)
    if as_json:
        print_json([asdict(finding) for finding in found])
    else:
        width = max(len(finding.name) for finding in found)
        for finding in found:
            print(f"{'PROBLEM' if finding.is_problem else 'ok':8}{finding.name:{width}}  {finding.text}")
    if num := sum(finding.is_problem for finding in found):
        raise UserError(f"{num} of {len(found)} checks of '{name}' failed.")


def _is_recipe(name: str) -> bool:
    """Tells recipes from configs, names by their lists, files by keys that only one kind has."""
    from filters.recipe import Recipe, known_recipes
    from sdtrain.config import TrainConfig, known_configs
    from sdtrain.settings import nearest

    if not name.endswith((".yaml", ".yml")):
        if name not in (*known_recipes(), *known_configs()):
            raise UserError(
                f"There is no recipe or training config '{name}'.{nearest(name, known_recipes() + known_configs())}"
            )
        return name in known_recipes()
    try:
        content = yaml.safe_load(Path(name).read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{name} cannot be read as YAML: {error}") from error
    keys = set(content) if isinstance(content, dict) else set()
    of_recipe, of_config = (len(keys & set(model.model_fields)) for model in (Recipe, TrainConfig))
    if of_recipe == of_config:
        raise UserError(f"{name} is neither a recipe nor a training config; `sdtrain recipe NAME` shows a recipe.")
    return of_recipe > of_config


def _of_recipe(name: str, metadata: str | None, limit: int | None, output: str | None) -> list[Check]:
    from filters.build_options import BuildOptions
    from filters.preflight import local_checks, network_checks, size_check_before_selection
    from filters.recipe import load_recipe
    from filters.recipe_record import output_dataset, require_metadata, with_source

    recipe = load_recipe(name, BuildOptions(metadata=metadata, limit=limit))
    dataset = output_dataset(output or "data/{recipe}", recipe)
    recipe = recipe if dataset.url else with_source(dataset, recipe)
    require_metadata(recipe)
    return [
        *local_checks(dataset, recipe),
        size_check_before_selection(dataset, recipe),
        *network_checks(dataset, recipe),
    ]


def _of_config(name: str, data: str | None, init_from: str | None, output: str | None) -> list[Check]:
    from sdtrain.preflight.training import training_checks
    from sdtrain.train import configure

    config = configure(name, data, init_from=init_from)
    return training_checks(config, Path(output or Path("runs") / config.name))
