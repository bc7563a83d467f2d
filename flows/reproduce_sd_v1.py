"""The model card's chain of runs: sd-v1-1 (256, then 512) -> sd-v1-2 -> sd-v1-3, -4 or -5, each from the last."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from prefect import flow
from prefect.logging import get_run_logger
from pydantic import Field

from flows.support.decorators import records_no_secrets, report_user_errors
from flows.train_unet import SLURM_SCRIPT, Launcher, all_parameters, cancel_job, train_unet
from sdtrain.plan.chain import Dataset, Phase, RunName, chain
from sdtrain.preflight.checks import require
from sdtrain.preflight.training import training_checks
from sdtrain.redaction import Location
from sdtrain.train import configure
from sdtrain.training.run_dir import RunDir


def _cancel_jobs(flow: Any, flow_run: Any, state: Any) -> None:
    given = all_parameters(flow, flow_run)
    if given["launcher"] == "slurm":
        for phase in chain(given["until"]):
            cancel_job(Path(given["output"]) / phase.name)


@records_no_secrets
@flow(name="reproduce-sd-v1", on_cancellation=[_cancel_jobs])
@report_user_errors
def reproduce_sd_v1(
    laion2b_en: Location = "data/laion2b-en",
    high_resolution: Location = "data/laion-high-resolution",
    aesthetics: Location = "data/laion-aesthetics",
    output: Location = "runs",
    until: RunName = "sd-v1-4",
    configs: str | None = None,
    num_gpus: Annotated[int, Field(ge=1)] | None = None,
    launcher: Launcher = "deepspeed",
    hostfile: str | None = None,
    slurm_options: str = "",
    slurm_script: str = str(SLURM_SCRIPT),
) -> str:
    """Trains Stable Diffusion v1 from scratch, run after run; started again, it resumes.

    Args:
        laion2b_en: Dataset of the first run, encoded at 256 px.
        high_resolution: Dataset of the second, at 512 px.
        aesthetics: Dataset of all later ones, at 512 px.
        output: Folder of the runs, each in a folder of its name.
        until: The last run; the ones it builds on come before it.
        configs: Folder with configs named after the runs, to change them; by default the model card's.
        num_gpus: GPUs to use; by default all of them. Without GPUs: CPU processes, by default one.
        launcher: deepspeed on this machine (or, with a hostfile, on several), or a job on SLURM for each run.
        hostfile: Machines for DeepSpeed, as of the flow train-unet.
        slurm_options: More options for sbatch, such as "--nodes=4 --partition=gpu".
        slurm_script: The batch script.

    Returns:
        The last run's directory.
    """
    roots: dict[Dataset, str] = {"laion2b_en": laion2b_en, "high_resolution": high_resolution, "aesthetics": aesthetics}
    phases = chain(until)
    check(phases, roots, configs, Path(output))
    for phase in phases:
        get_run_logger().info("%s, from %s", phase.name, phase.after or "nothing")
        train_unet(
            config=_config(phase, configs),
            data=roots[phase.dataset],
            output=str(Path(output) / phase.name),
            num_gpus=num_gpus,
            init_from=str(Path(output) / phase.after) if phase.after else None,
            launcher=launcher,
            hostfile=hostfile,
            slurm_options=slurm_options,
            slurm_script=slurm_script,
        )
    return str((Path(output) / until).absolute())


def check(
    phases: Sequence[Phase], roots: Mapping[Dataset, str], configs: str | None = None, output: Path = Path("runs")
) -> None:
    """Checks every run's needs, before the first one trains for a month.

    UserError if configs, latents, networks, trackers or disk space are missing or do not match.
    """
    for phase in phases:
        config = configure(_config(phase, configs), roots[phase.dataset])
        if RunDir(output / phase.name).finished_step() is None:
            require(training_checks(config, output / phase.name, is_later_in_chain=phase.after is not None))


def _config(phase: Phase, configs: str | None) -> str:
    return str(Path(configs) / f"{phase.name}.yaml") if configs else phase.name
