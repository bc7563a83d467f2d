import functools
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import yaml
from prefect.logging import disable_run_logger
from prefect.states import State
from pydantic import TypeAdapter

from filters.build_options import BuildOptions
from filters.recipe import known_recipes, load_recipe
from filters.rules import RULES
from flows.build_dataset import build_dataset
from flows.evaluate_checkpoint import evaluate_checkpoint
from flows.train_unet import train_unet
from sdtrain.dataset.layout import DatasetDir
from sdtrain.dataset.lock import lock_to_change

ROOT = Path(__file__).parents[2]
DEPLOYMENTS = yaml.safe_load((ROOT / "prefect.yaml").read_text())["deployments"]
PARAMETERS = build_dataset.parameters.model_dump()["properties"]


def bounds(schema: dict[str, Any]) -> dict[str, Any]:
    options = [option for option in schema.get("anyOf", [schema]) if option.get("type") != "null"]
    return {
        key: value for key, value in options[0].items() if key not in ("title", "description", "default", "position")
    }


@pytest.mark.parametrize("name", [field.name for field in fields(BuildOptions)])
def test_parameter_has_the_type_and_bounds_of_the_option(name: str) -> None:
    assert bounds(PARAMETERS[name]) == bounds(TypeAdapter(BuildOptions).json_schema()["properties"][name])


def test_parameter_has_the_bounds_that_its_option_declares() -> None:
    assert bounds(PARAMETERS["limit"]) == {"type": "integer", "minimum": 1}
    assert bounds(PARAMETERS["min_aesthetic"]) == {"type": "number", "minimum": 0, "maximum": 10}
    assert bounds(PARAMETERS["max_watermark"]) == {"type": "number", "exclusiveMinimum": 0, "maximum": 1}
    assert bounds(PARAMETERS["workers"]) == {"type": "integer", "minimum": 1, "maximum": 256}


def test_every_setting_that_an_option_overrides_exists() -> None:
    """Rules are named by the user, so that only their section is looked up."""
    recipe = load_recipe("laion-aesthetics").model_dump()
    for field in fields(BuildOptions):
        for setting in (*field.metadata["sets"], *field.metadata["sets_if_given"]):
            *sections, name = setting.split(".")
            section = functools.reduce(dict.__getitem__, sections, recipe)
            assert name in (RULES if sections[-1] == "rules" else section), setting


def test_every_parameter_is_explained() -> None:
    assert [name for name, schema in PARAMETERS.items() if not schema.get("description")] == []


@pytest.mark.parametrize("name", [*known_recipes(), "mine.yaml", "deep/er/mine.yml"])
def test_recipe_names_and_files_are_accepted(name: str) -> None:
    assert re.search(PARAMETERS["recipe"]["pattern"], name)


@pytest.mark.parametrize("name", ["laion", "laion-aesthetics2", "", ".yaml", "recipe.json"])
def test_unknown_recipe_is_refused_by_the_pattern(name: str) -> None:
    assert not re.search(PARAMETERS["recipe"]["pattern"], name)


def test_mistake_ends_the_flow_as_failed_with_the_sentence() -> None:
    with disable_run_logger():
        ended = build_dataset.fn(recipe="laion-aesthetics")
    assert isinstance(ended, State)
    assert ended.is_failed()
    assert "names no metadata" in str(ended.message)


def test_a_second_build_of_one_dataset_ends_with_the_name_of_the_first(tmp_path: Path) -> None:
    with lock_to_change(DatasetDir(tmp_path), "sdtrain remove"), disable_run_logger():
        ended = build_dataset.fn(recipe="demo", metadata="x", output=str(tmp_path))
    assert isinstance(ended, State)
    assert ended.is_failed()
    assert "sdtrain remove is running" in str(ended.message)


def test_deployments_that_the_readme_names_exist() -> None:
    assert {deployment["name"] for deployment in DEPLOYMENTS} == {
        "build-laion-aesthetics",
        "build-laion-high-resolution",
        "build-laion2b-en",
        "build-demo",
        "evaluate-checkpoint",
        "reproduce-sd-v1",
        "train-sd-v1",
    }
    assert all((ROOT / deployment["entrypoint"].split(":")[0]).exists() for deployment in DEPLOYMENTS)


@pytest.mark.parametrize("deployment", DEPLOYMENTS, ids=lambda deployment: deployment["name"])
def test_parameters_of_the_deployment_are_valid(deployment: dict[str, Any]) -> None:
    flows = {"build_dataset": build_dataset, "train_unet": train_unet, "evaluate_checkpoint": evaluate_checkpoint}
    flow = flows.get(deployment["entrypoint"].split(":")[1])
    if flow is not None:
        flow.validate_parameters(deployment["parameters"])
