"""The flow build-dataset: from metadata to latents, stage after stage."""

from pathlib import Path
from typing import Annotated

from prefect import flow, task
from prefect.artifacts import create_link_artifact, create_table_artifact
from prefect.cache_policies import NO_CACHE
from prefect.logging import get_run_logger
from prefect.runtime import flow_run
from pydantic import Field

from filters.build import Build, open_build
from filters.build_options import BuildOptions
from filters.recipe import Recipe, known_recipes, load_recipe
from flows.support.credentials import s3_credentials
from flows.support.decorators import flow_parameter, records_no_secrets, report_user_errors
from flows.support.stage_runner import StageOptions, run_stage
from flows.support.task_runners import start_engine
from sdtrain.dataset.layout import DatasetDir
from sdtrain.options import with_options

RecipeName = Annotated[str, Field(pattern=rf"^({'|'.join(known_recipes())}|.+\.ya?ml)$")]


def _run_name() -> str:
    return Path(flow_run.parameters["recipe"]).stem


@records_no_secrets
@flow(name="build-dataset", flow_run_name=_run_name)
@report_user_errors
@with_options(flow_parameter)
def build_dataset(
    options: BuildOptions,
    engine_options: StageOptions,
    recipe: RecipeName = "laion-aesthetics",
    credentials: str | None = None,
) -> str:
    """Select, download, score, dedup, decide, pack, encode; what an earlier run finished is not done again.

    Prefect keeps parameters: for a URL with a query or password write ${NAME} and set that environment variable for the
    worker, from a Secret block.

    Args:
        options: A parameter for each of its fields.
        engine_options: A parameter for each of its fields.
        recipe: A recipe's name, or a YAML file.
        credentials: Name of a block AwsCredentials for metadata and output on s3://; without, the environment's.

    Returns:
        The dataset's directory, or its URL.
    """
    with s3_credentials(credentials):
        return build(load_recipe(recipe, options), options, engine_options)


def build(recipe: Recipe, options: BuildOptions, engine_options: StageOptions) -> str:
    """Builds a dataset within a flow; returns its directory or URL."""
    with open_build(recipe, options, "The flow build-dataset") as build:
        _log_recipe(build)
        with start_engine(engine_options.engine, engine_options.engine_address, engine_options.workers) as runner:
            build.run(
                lambda stage: run_stage(stage, build.dataset, build.recipe, engine_options, runner, build.preflight),
                lambda: _retry_failed(build.dataset, build.recipe),
                get_run_logger().warning,
            )
    _show(build.dataset, build.recipe)
    return str(build.dataset)


def _log_recipe(build: Build) -> None:
    logger = get_run_logger()
    logger.info("Building %s into %s", build.recipe.name, build.dataset)
    if build.changes:
        logger.warning("Not the recipe of the run before; what this touches is redone: %s", build.changes)


@task(name="retry-failed", task_run_name="retry-failed", cache_policy=NO_CACHE, persist_result=False)
def _retry_failed(dataset: DatasetDir, recipe: Recipe) -> None:
    from sdtrain.download.retry import retry_and_count

    get_run_logger().info("%s", retry_and_count(dataset, recipe))


def _show(dataset: DatasetDir, recipe: Recipe) -> None:
    from filters.decide.funnel import funnel
    from filters.pipeline import STAGES

    rows = [dict(row) for row in funnel(dataset, recipe, STAGES)]
    create_table_artifact(rows, key="funnel", description=f"What each rule of {recipe.name} dropped")
    create_link_artifact(dataset.url or dataset.root.as_uri(), link_text=str(dataset), key="dataset")
    create_link_artifact(dataset.report.as_uri(), link_text=str(dataset.report), key="report")
