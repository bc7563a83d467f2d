"""Evaluates checkpoints: draws images over guidance scales, measures them, plots FID against agreement."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from prefect import flow
from prefect.artifacts import create_link_artifact, create_markdown_artifact, create_table_artifact
from prefect.logging import get_run_logger
from prefect.runtime import flow_run
from prefect.task_runners import TaskRunner
from pydantic import Field

from flows.support.batches import ShardsPerTask
from flows.support.decorators import records_no_secrets, report_user_errors
from flows.support.stage_runner import StageOptions, run_stage
from flows.support.task_runners import Engine, start_engine
from sdtrain.endpoint.config import EndpointConfig
from sdtrain.evaluation.protocol import CARD_SCALES, Protocol
from sdtrain.evaluation.results import Results, protocol_lines, table_of, table_of_skills
from sdtrain.preflight.checks import require
from sdtrain.redaction import Location
from sdtrain.settings import parse_settings

if TYPE_CHECKING:
    from sdtrain.evaluation.sweep import Step

Several = Annotated[int, Field(ge=2)]
Workers = Annotated[int, Field(ge=1, le=256)]
Scale = Annotated[float, Field(ge=0)]


def _run_name() -> str:
    models = flow_run.parameters["model"]
    return Path(models if isinstance(models, str) else models[0]).name


@records_no_secrets
@flow(name="evaluate-checkpoint", flow_run_name=_run_name)
@report_user_errors
def evaluate_checkpoint(
    model: Location | list[Location] = "runs/sd-v1-4",
    prompts: Location = "data/coco/captions_val2017.json",
    reference: Location = "data/coco/val2017",
    output: Location | None = None,
    num_prompts: Several = 10_000,
    scales: list[Scale] = list(CARD_SCALES),  # noqa: B006  # Prefect copies the defaults
    x: str | None = None,
    y: str | None = None,
    training_data: list[Location] | None = None,
    contamination: bool = True,
    questions: Location | None = None,
    judge: dict[str, Any] | None = None,
    protocol: dict[str, Any] | None = None,
    engine: Engine = "threads",
    engine_address: Location | None = None,
    workers: Workers = 1,
    parts_per_task: ShardsPerTask = "auto",
    retries: Annotated[int, Field(ge=0, le=10)] = 1,
) -> str:
    """Draws images of the prompts at each guidance scale and measures them; what is finished is not done again.

    Args:
        model: A run, a checkpoint, a diffusers folder or a CompVis file; or a list of them, a line each in the plot.
        prompts: Text file with one prompt a line, or COCO's captions (.json).
        reference: Real images: a dataset, a folder, or an .npz of statistics.
        output: The evaluation's directory; by default `evaluation` in the run's.
        num_prompts: Prompts, and images for each scale.
        scales: Guidance scales.
        x: The plot's axis across: a column of the results, or guidance_scale. By default agreement.
        y: The plot's axis up: a column, as fd_dinov2. By default FID.
        training_data: Datasets on which the models were trained, besides those that runs record.
        contamination: Look for the prompts and reference images in the training data.
        questions: GenEval 2's geneval2_data.jsonl, for prompt following.
        judge: Settings of sdtrain.endpoint.config.EndpointConfig, by name: the server that answers the questions.
        protocol: Any other setting of sdtrain.evaluation.protocol.Protocol, by name.
        engine: What runs the parts: threads or processes of this machine, or Dask or Ray.
        engine_address: A running Dask or Ray cluster's; without, one is started on this machine.
        workers: Parts at once, unless a running cluster decides that. One a GPU, with `processes`.
        parts_per_task: Parts in one task: a number, or auto for about a minute of work, by what parts took so far.
        retries: How often a step begins again with the parts that failed, for another reason than a user's mistake.

    Returns:
        The evaluation's directory.
    """
    given = {"prompts": prompts, "reference": reference, "num_prompts": num_prompts, "scales": tuple(scales)}
    settings = parse_settings(Protocol, given | (protocol or {}), "parameters")
    options = StageOptions(workers, parts_per_task, engine, engine_address)
    data = tuple(training_data or ()) if contamination else None
    asked = (questions, parse_settings(EndpointConfig, judge or {}, "parameter judge")) if questions else None
    models = [model] if isinstance(model, str) else model
    return evaluate(models, settings, output, options, retries, data, asked, (x, y))


def evaluate(
    models: list[str],
    protocol: Protocol,
    output: str | None,
    options: StageOptions,
    retries: int = 0,
    training_data: Sequence[str] | None = (),
    asked: tuple[str, EndpointConfig] | None = None,
    columns: tuple[str | None, str | None] = (None, None),
) -> str:
    """Evaluates within a flow; returns the evaluation's directory.

    `training_data` are datasets to search besides those that runs record; None to search none. `asked` are a file of
    questions about prompts of its own, and the judge that answers them. `columns` are the plot's, across and up.

    UserError for a mistake that the user can correct; finished parts are kept.
    """
    from filters.contamination.training_data import search_training_data  # late: imports all networks
    from sdtrain.evaluation.judging.scores import AXES
    from sdtrain.evaluation.sweep import plan

    further = AXES if asked else {}
    sweep = plan(protocol, [Path(model) for model in models], Path(output) if output else None, *columns, further)
    if asked is not None:
        from sdtrain.evaluation.judging.following import with_prompt_following

        sweep = with_prompt_following(sweep, Path(asked[0]), asked[1])
    if training_data is not None:
        sweep = search_training_data(sweep, training_data)
    require(sweep.checks())
    with start_engine(options.engine, options.engine_address, options.workers) as runner:
        for step in sweep.steps():
            _run_step(step, options, runner, retries)
    results = sweep.finish()
    _show(results, sweep.directory.curve)
    return str(sweep.directory.root)


def _run_step(step: "Step", options: StageOptions, runner: TaskRunner[Any], retries: int) -> None:
    for left in range(retries, -1, -1):
        try:
            run_stage(step.stage, step.directory, step.job, options, runner)
            return
        except RuntimeError as error:
            if not left:
                raise
            get_run_logger().warning("%s The parts that failed are tried again.", error)


def _show(results: Results, curve: Path) -> None:
    create_table_artifact(table_of(results), key="evaluation", description="; ".join(results.notes) or None)
    if results.skills:
        create_table_artifact(table_of_skills(results), key="evaluation-skills")
    lines = "\n".join(f"- {line}" for line in protocol_lines(results))
    create_markdown_artifact(f"# Protocol\n\n{lines}\n", key="evaluation-protocol")
    if curve.exists():
        create_link_artifact(curve.as_uri(), link_text=str(curve), key="guidance-curve")
