"""`sdtrain card` describes a run; `sdtrain plan` estimates one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sdtrain.cli.output import AsJson, print_json, print_table
from sdtrain.errors import UserError

if TYPE_CHECKING:
    from sdtrain.plan.estimate import Line, Machines
    from sdtrain.plan.rates import Rates

_GENERAL = {
    *("text_embedding_bytes", "link_rot", "kept_share", "cpu_cores", "metadata_row_bytes", "score_row_bytes"),
    *("image_bytes_256", "image_bytes_512", "image_bytes_1024"),
}
"""Rates shown with every plan; others are shown with their stages."""

# Our own code is imported inside the commands, so that help does not wait for torch.


def card(
    run: Annotated[Path, typer.Argument(help="A run's directory.")],
    word_lists: Annotated[
        Path | None, typer.Option(help="Words by which captions are counted: a YAML file like sdtrain's own.")
    ] = None,
    training_summary: Annotated[
        bool,
        typer.Option(
            "--training-summary", help="Also the EU's summary of the training content, RUN/training-summary.md."
        ),
    ] = False,
) -> None:
    """Write a run's model card, RUN/README.md, again, and measure who and what its datasets' captions speak of."""
    from sdtrain.model_card import measure_representation, write_card, write_training_summary

    measure_representation(run, word_lists)
    print(write_card(run))
    if training_summary:
        print(*write_training_summary(run), sep="\n")


def plan(
    recipe: Annotated[
        str | None, typer.Option(help="A recipe's name or YAML file, with the run that it is for.")
    ] = None,
    chain: Annotated[str | None, typer.Option(help="A whole chain of runs: v1-1 to v1-5.")] = None,
    retrain: Annotated[
        Path | None, typer.Option(help="A run, to be trained again without what was removed from its data since.")
    ] = None,
    gpus: Annotated[int, typer.Option(help="How many GPUs.", min=1)] = 8,
    gpu: Annotated[str, typer.Option(help="Which: a100, h100, h200, b200 or gb200.")] = "h200",
    rows: Annotated[
        int | None, typer.Option(help="Rows selected; by default the recipe's known number.", min=1)
    ] = None,
    region: Annotated[str | None, typer.Option(help="Where the electricity is from, as in aws/us-east-1.")] = None,
    price_per_gpu_hour: Annotated[float | None, typer.Option(help="In your money.", min=0)] = None,
    assume: Annotated[list[str] | None, typer.Option(help="Another rate, as in link_rot=0.4.")] = None,
    as_json: AsJson = False,
) -> None:
    """Estimate images, disk, hours, cost and CO2 of a dataset or a chain of runs, each with its source."""
    from filters.planned import dataset_job, planned_work
    from filters.recipe import load_recipe
    from sdtrain.impact.carbon import find_region
    from sdtrain.plan.chain import PHASES, configs_of, find_chain
    from sdtrain.plan.estimate import Machines, Planner, not_counted, total
    from sdtrain.plan.rates import load_rates

    if sum(given is not None for given in (recipe, chain, retrain)) != 1 or (rows and not recipe):
        raise UserError("Give --recipe NAME, with --rows N if you like, --chain v1-4, or --retrain RUN.")
    if retrain is not None:
        _plan_retraining(retrain, as_json)
        return
    rates = load_rates(assume or (), gpu.lower())
    machines = Machines(gpus, gpu.lower(), find_region(region).kg_per_kwh if region else None, price_per_gpu_hour)
    planner = Planner(rates, machines)
    phases = find_chain(chain) if chain else []
    recipes = [load_recipe(name) for name in dict.fromkeys([recipe] if recipe else (each.recipe for each in phases))]
    jobs = [dataset_job(each, rows) for each in recipes]
    stages = [planned_work(each) for each in recipes]
    if rows:  # stated, so the known number is unused
        rates.pop(f"rows_{jobs[0].recipe}", None)
    if recipe:  # with the first run on that dataset
        phases = [phase for phase in PHASES if phase.recipe == jobs[0].recipe][:1]
    runs = configs_of(phases)
    lines = [line for job, work in zip(jobs, stages, strict=True) for line in planner.dataset(job, work)]
    lines += [planner.training(run) for run in runs]
    left_out = list(dict.fromkeys(name for work in stages for name in not_counted(work)))
    if as_json:
        described = {name: rate.model_dump(exclude_none=True) for name, rate in rates.items()}
        shown = [asdict(line) for line in (*lines, total(lines))]
        print_json({"lines": shown, "rates": described, "not_counted": left_out})
        return
    print_table([_shown(line) for line in (*lines, total(lines))])
    print(*_remarks(lines, rates, machines, chain), sep="\n")
    if left_out:
        print(f"not counted, as their rates are not known: {', '.join(left_out)}")


def _plan_retraining(run: Path, as_json: bool) -> None:
    from sdtrain.model_card.removals import open_removals

    found = open_removals(run)
    if as_json:
        cost = found.cost.row() if found.cost else None
        print_json({"num_samples": found.num_samples, "retraining": cost, "remarks": found.remarks})
    elif found.cost:
        print(f"{run} and the runs before it used {found.num_samples:,} samples that were removed since.")
        print(found.cost.sentence(), *found.remarks, sep="\n")
    else:
        print(f"No sample that {run} is known to have used was removed since.", *found.remarks, sep="\n")


def _shown(line: Line) -> dict[str, object]:
    columns: dict[str, object] = {
        "part": line.part,
        "stage": line.stage,
        "in": f"{line.num:,.0f}" if line.num else "",
        "disk": f"{line.disk_bytes / 1e12:,.2f} TB",
        "hours": "not known" if line.hours is None else f"{line.hours:,.1f}",
        "GPU-hours": f"{line.gpu_hours:,.0f}",
        "core-hours": f"{line.core_hours:,.0f}",
    }
    if line.cost is not None:
        columns["cost"] = f"{line.cost:,.0f}"
    if line.kg is not None:
        columns["kg CO2"] = f"{line.kg:,.0f}"
    return columns


def _remarks(lines: list[Line], rates: Rates, machines: Machines, chain: str | None) -> list[str]:
    from sdtrain.impact.carbon import CORE_W
    from sdtrain.impact.gpus import board_watts

    sources = _by(lines, lambda line: [line.source])
    beyond = _by(lines, lambda line: list(line.remarks))
    recipes = {line.part for line in lines if line.stage == "download"}
    names = [name for name in rates if name.partition("_")[2] in recipes or name in _GENERAL]
    general = [f"{name} {rates[name].value:,.10g} {rates[name].unit}: {rates[name]}" for name in names]
    untimed = [line.stage for line in lines if line.hours is None]
    return [
        "",
        *([f"not in the hours, nor in what follows from them: {', '.join(untimed)}"] if untimed else []),
        *(_beside_the_card(lines, rates, machines, chain) if chain else []),
        _whose(lines),
        *(f"{', '.join(parts)}: {source}" for source, parts in sources.items()),
        *(f"note on {', '.join(parts)}: {remark}" for remark, parts in beyond.items()),
        *general,
        "hours: by the clock on all GPUs and cores, one stage after the other; in: what goes into a stage; into score "
        "go the images that link rot leaves",
        f"CO2: {board_watts(machines.gpu):g} W a GPU and {CORE_W:g} W a core; cost: GPUs alone",
    ]


def _by(lines: list[Line], of: Callable[[Line], list[str]]) -> dict[str, list[str]]:
    """Groups the lines' names by each thing that `of` says about them."""
    found: dict[str, dict[str, None]] = {}
    for line in lines:
        for said in of(line):
            found.setdefault(said, {})[line.stage if line.stage != "train" else line.part] = None
    return {said: list(names) for said, names in found.items()}


def _whose(lines: list[Line]) -> str:
    """Which lines rest on our own measurements, and which on others' figures."""
    kinds = _by(lines, lambda line: [line.source.partition(":")[0]])
    words = {"measured": "measured by us", "published": "published by others", "stated": "stated by you"}
    return "; ".join(f"{words.get(kind, kind)}: {', '.join(names)}" for kind, names in kinds.items())


def _beside_the_card(lines: list[Line], rates: Rates, machines: Machines, chain: str) -> list[str]:
    """The training of a chain next to what SD v1's model card states."""
    hours = sum(line.gpu_hours for line in lines if line.stage == "train")
    data = sum(line.gpu_hours for line in lines if line.stage != "train")
    card = rates["card_a100_hours"]
    return [
        f"training up to {chain}: {hours:,.0f} {machines.gpu.upper()}-hours, and {data:,.0f} for scoring and encoding; "
        f"SD v1's model card: {card.value:,.0f} {card.unit} ({card.source})"
    ]
