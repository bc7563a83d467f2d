"""From metadata to latents, stage after stage."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from prefect import flow, task
from prefect.artifacts import create_link_artifact, create_table_artifact
from prefect.cache_policies import NO_CACHE
from prefect.logging import get_run_logger
from prefect.runtime import flow_run
from pydantic import Field

from filters.recipe import Overrides, Recipe, known_recipes, load_recipe
from filters.recipe_record import output_dataset, record_recipe, require_metadata, with_precision
from flows.support.credentials import s3_credentials
from flows.support.parameters import records_no_secrets
from flows.support.stage_runner import StageOptions, run_stage
from flows.support.task_runners import Engine, start_engine
from flows.support.user_errors import report_user_errors
from sdtrain.dataset.layout import DatasetDir
from sdtrain.dataset.lock import lock_to_change
from sdtrain.dataset.s3.sync import keep_local as keep_files
from sdtrain.settings import Location

RecipeName = Annotated[str, Field(pattern=rf"^({'|'.join(known_recipes())}|.+\.ya?ml)$")]
Count = Annotated[int, Field(ge=1)]
Workers = Annotated[int, Field(ge=1, le=256)]
AestheticScore = Annotated[float, Field(ge=0, le=10)]
Probability = Annotated[float, Field(gt=0, le=1)]


@dataclass(frozen=True)
class WorkFolder:
    """Of a dataset on S3.

    Attributes:
        parent: of all work folders; without, in the user's cache.
        keep: whether large files stay in it once they are on S3.
    """

    parent: str | None = None
    keep: bool = True


def _run_name() -> str:
    return Path(flow_run.parameters["recipe"]).stem


@records_no_secrets
@flow(name="build-dataset", flow_run_name=_run_name)
@report_user_errors
def build_dataset(
    recipe: RecipeName = "laion-aesthetics",
    metadata: Location | None = None,
    output: Location = "data/{recipe}",
    limit: Count | None = None,
    min_side: Count | None = None,
    min_aesthetic: AestheticScore | None = None,
    max_watermark: Probability | None = None,
    samples_per_shard: Count | None = None,
    allow_private_hosts: bool | None = None,
    new_files: Literal["append", "reshuffle"] | None = None,
    retry_failed: bool = False,
    engine: Engine = "threads",
    engine_address: Location | None = None,
    workers: Workers = 2,
    shards_per_task: Count = 1,
    work_dir: str | None = None,
    keep_local: bool = True,
    credentials: str | None = None,
) -> str:
    """Select, download, score, dedup, keep, pack, encode; what an earlier run finished is not done again.

    Args:
        recipe: A recipe's name, or a YAML file.
        metadata: Parquet with LAION's columns: a file, a folder or a glob. Prefect keeps parameters: for a URL with a
            query or password write ${NAME} and set that environment variable for the worker, from a Secret block.
        output: The dataset's directory; {recipe} stands for the recipe's name.
        limit: At most this many rows, the first in shuffled order.
        min_side: Shorter side in pixels, at least.
        min_aesthetic: Aesthetic score (V2), more than.
        max_watermark: Watermark probability, less than.
        samples_per_shard: Samples in one shard.
        allow_private_hosts: Fetch from loopback and private networks too.
        new_files: Metadata files added since: shards after the finished ones, or a new shuffle of everything.
        retry_failed: Fetch rows again that failed in an earlier run for a reason that may have passed.
        engine: What runs the batches of shards: threads or processes of this machine, or Dask or Ray.
        engine_address: A running Dask or Ray cluster's; without, one is started on this machine. All its machines must
            see the dataset under the same path.
        workers: Batches of shards at once, unless a running cluster decides that.
        shards_per_task: Shards in one batch.
        work_dir: With output s3://...: where its files lie on this machine; without, the user's cache.
        keep_local: With output s3://...: whether images and latents stay on this machine once they are there.
        credentials: Name of a block AwsCredentials for metadata and output on s3://; without, the environment's.

    Returns:
        The dataset's directory, or its URL.
    """
    overrides = Overrides(
        metadata=metadata,
        limit=limit,
        min_side=min_side,
        min_aesthetic=min_aesthetic,
        max_watermark=max_watermark,
        samples_per_shard=samples_per_shard,
        allow_private_hosts=allow_private_hosts,
        new_files=new_files,
    )
    options = StageOptions(workers, shards_per_task, engine, engine_address)
    with s3_credentials(credentials):
        return build(load_recipe(recipe, overrides), output, options, retry_failed, WorkFolder(work_dir, keep_local))


def build(
    recipe: Recipe,
    output: str,
    options: StageOptions,
    retry_failed: bool = False,
    work: WorkFolder = WorkFolder(),
) -> str:
    """The pipeline, in a flow. Returns the dataset's directory, or its URL."""
    from filters.pipeline import STAGES
    from filters.preflight import BuildPreflight

    require_metadata(recipe)
    dataset = output_dataset(output, recipe, work.parent)
    with lock_to_change(dataset, "The flow build-dataset"):
        recipe = with_precision(dataset, recipe)
        _begin(dataset, recipe)
        keep_files(dataset, work.keep)
        preflight = BuildPreflight(dataset, recipe)
        with start_engine(options.engine, options.engine_address, options.workers) as runner:
            for stage in STAGES:
                if retry_failed and stage.name == "download":
                    _retry_failed(dataset, recipe)
                run_stage(stage, dataset, recipe, options, runner, preflight)
        _finish(dataset, recipe)
    return str(dataset)


def _begin(dataset: DatasetDir, recipe: Recipe) -> None:
    logger = get_run_logger()
    changes = record_recipe(dataset, recipe)
    logger.info("Building %s into %s", recipe.name, dataset)
    if changes:
        logger.warning("Not the recipe of the run before; what this touches is redone: %s", "; ".join(changes))


@task(name="retry-failed", task_run_name="retry-failed", cache_policy=NO_CACHE, persist_result=False)
def _retry_failed(dataset: DatasetDir, recipe: Recipe) -> None:
    from sdtrain.download.recovery import recover

    get_run_logger().info("%s", recover(dataset, recipe))


def _finish(dataset: DatasetDir, recipe: Recipe) -> None:
    from filters.decide.funnel import funnel
    from filters.inspect.report import finish_dataset
    from filters.pipeline import STAGES

    finish_dataset(dataset, recipe)
    rows = [dict(row) for row in funnel(dataset, recipe, STAGES)]
    create_table_artifact(rows, key="funnel", description=f"What each rule of {recipe.name} dropped")
    create_link_artifact(dataset.url or dataset.root.as_uri(), link_text=str(dataset), key="dataset")
    create_link_artifact(dataset.report.as_uri(), link_text=str(dataset.report), key="report")
