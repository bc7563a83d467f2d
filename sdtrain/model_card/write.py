"""Writes the card of a run: front matter for the Hub, then Markdown from a template."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from huggingface_hub import EvalResult, ModelCardData
from pydantic import ValidationError

from sdtrain import __version__
from sdtrain.config import TrainConfig
from sdtrain.dataset.files import publish
from sdtrain.dataset.s3.url import is_s3, parse_url, work_folder
from sdtrain.errors import UserError
from sdtrain.exposure.lineage import lineage
from sdtrain.impact.energy import Spent
from sdtrain.model_card.energy import EnergyRow, amount, preparation_row, training_row
from sdtrain.model_card.records import DatasetFacts, dataset_facts
from sdtrain.model_card.removals import open_removals
from sdtrain.model_card.representation_record import measure_datasets, plot_all, sections
from sdtrain.model_card.word_lists import load_word_lists
from sdtrain.settings import load_settings
from sdtrain.training.run_dir import RunDir

_TEMPLATE = Path(__file__).parent / "card.md.jinja"
_REPRESENTATION = Path(__file__).parent / "representation.md.jinja"
_KEPT_FACTS = "datasets.json"
TAGS = ["stable-diffusion", "stable-diffusion-diffusers", "text-to-image"]

_PROMPT = (
    "The weights are open to everybody under the licence named above, which has conditions. In short: do not use the "
    "model to make or spread what is illegal or does harm; what you make is yours, and so is the responsibility for "
    "it; whoever gets the weights or a service from you has to get the same conditions, with a copy of the licence. "
    "Read the licence in full before you agree."
)
_SHOWN = ("prompts_source", "num_prompts", "reference_source", "reference_sha256", "num_steps", "sampler", "weights")
_SPREADS = ("_ci95", "_std")
_ALSO = ("seed", "size_px", "network", "network_sha256", "networks", "networks_sha256", "resize")


def write_card(run: Path) -> Path:
    """Writes RUN/README.md from the records of a run and its datasets; returns its path.

    UserError if `run` is no training run, or one of its records is damaged.
    """
    chain = lineage(run)
    config = load_settings(TrainConfig, run / "config.yaml")
    datasets = _datasets(run, config)
    energy = _energy(chain[:-1], chain[-1].sessions, datasets, config)
    total_kg = _total(energy)
    previews = sorted(RunDir(run).previews.glob("step-*.png"))
    sessions = chain[-1].sessions
    hardware = _hardware(sessions)
    evaluation = read_evaluation(run / "evaluation")
    text = _environment().from_string(_TEMPLATE.read_text()).render(
        front_matter=front_matter(config, datasets, total_kg, hardware, evaluation),
        config=config,
        chain=chain,
        step=chain[-1].step,
        datasets=datasets,
        crops=_crops(config, datasets),
        removals=open_removals(run),
        energy=energy,
        total_kg=total_kg,
        intensity=config.card.intensity(),
        hardware=hardware,
        evaluation=evaluation,
        preview=previews[-1].relative_to(run) if previews else None,
        run=run.name,
        version=__version__,
        representation=_representation(run),
    )  # fmt: skip
    path = run / "README.md"
    with publish(path) as temporary:
        temporary.write_text(text)
    return path


def measure_representation(run: Path, word_lists: Path | None = None) -> None:
    """Measures who and what the captions of a run's datasets speak of; `write_card` then shows it.

    UserError if `run` is no training run, or the word lists cannot be read.
    """
    lineage(run)
    lists, config = load_word_lists(word_lists), load_settings(TrainConfig, run / "config.yaml")
    roots = {source.root: _here(source.root) for source in config.data.all_sources}
    plot_all(run, measure_datasets(run, {_name_of(root, here): here for root, here in roots.items()}, lists))


def write_training_summary(run: Path) -> list[Path]:
    """Writes the summary of what a run's datasets hold; returns its files. UserError as for `write_summary`."""
    from sdtrain.model_card.training_summary import write_summary

    lineage(run)
    config = load_settings(TrainConfig, run / "config.yaml")
    return write_summary(run, [(source.root, _here(source.root)) for source in config.data.all_sources])


def _name_of(root: str, here: Path) -> str:
    return dataset_facts(here).name or Path(root).name


def _representation(run: Path) -> str:
    template = _environment().from_string(_REPRESENTATION.read_text())
    return template.render(sections=list(sections(run)), run=run.name)


def _datasets(run: Path, config: TrainConfig) -> list[DatasetFacts]:
    """The facts of the datasets, kept in the run in case these are deleted or moved."""
    kept = _kept(run / _KEPT_FACTS)
    found = [dataset_facts(_here(source.root)) for source in config.data.all_sources]
    facts = [fact if fact.name or fact.root not in kept else kept[fact.root] for fact in found]
    with publish(run / _KEPT_FACTS) as temporary:
        temporary.write_text(json.dumps([fact.model_dump(mode="json") for fact in facts], indent=1) + "\n")
    return facts


def _crops(config: TrainConfig, datasets: Sequence[DatasetFacts]) -> str:
    """How images were cropped for the network."""
    if config.data.online_vae:
        return "resized, then a random crop, new whenever an image is seen"
    return "; ".join(dict.fromkeys(facts.crops for facts in datasets if facts.crops)) or "not recorded"


def _here(root: str) -> Path:
    """A dataset's local directory; for S3, its work folder."""
    return work_folder(parse_url(root)) if is_s3(root) else Path(root)


def _kept(path: Path) -> dict[str, DatasetFacts]:
    try:
        return {content["root"]: DatasetFacts.model_validate(content) for content in json.loads(path.read_text())}
    except (OSError, ValueError, ValidationError, KeyError, TypeError):
        return {}


def _energy(
    ancestors: Sequence[Any], sessions: Sequence[Spent], datasets: Sequence[DatasetFacts], config: TrainConfig
) -> list[EnergyRow]:
    before = [training_row(f"Training before: {link.source}", link.sessions, config.card) for link in ancestors]
    own = training_row("Training of this run", sessions, config.card)
    return [*before, own, *(preparation_row(facts, config.card) for facts in datasets)]


def _total(rows: Sequence[EnergyRow]) -> float | None:
    """Kg of all rows; None if any is unknown: a part is no total."""
    known = [row.kg for row in rows if row.kg is not None]
    return sum(known) if len(known) == len(rows) else None


def _hardware(sessions: Sequence[Spent]) -> str | None:
    used = dict.fromkeys(f"{s.num_devices} x {s.device} on {s.num_hosts} host(s)" for s in sessions)
    return ", then ".join(used) or None


def _environment() -> jinja2.Environment:
    # Markdown, not HTML: captions and names are cut to one line and cannot end a table cell.
    environment = jinja2.Environment(  # noqa: S701
        trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined, keep_trailing_newline=True
    )
    environment.filters["cell"] = lambda value: " ".join(str(value).split()).replace("|", "\\|").replace("<", "&lt;")
    environment.filters["amount"] = amount
    return environment


def front_matter(
    config: TrainConfig,
    datasets: Sequence[DatasetFacts],
    total_kg: float | None,
    hardware: str | None,
    evaluation: Evaluation | None = None,
) -> str:
    """The Hub's YAML, with its dashes; `total_kg` is CO2 equivalents of training and data, None if unknown."""
    more: dict[str, Any] = {"inference": True}
    results = list(evaluation.results) if evaluation else []
    if total_kg is not None:
        more["co2_eq_emissions"] = {
            "emissions": round(1000 * total_kg, 3),  # the Hub counts in grams
            "source": "energy of training, measured or estimated, and of data preparation: see the card",
            "training_type": "pre-training" if config.init_from is None else "fine-tuning",
            "geographical_location": config.card.region or "own figure of the grid",
            "hardware_used": hardware or "not recorded",
        }
    if config.card.gated:
        more |= {
            "extra_gated_heading": "Please read the licence and agree to it",
            "extra_gated_prompt": _PROMPT,
            "extra_gated_fields": {"I have read the licence and agree to its conditions": "checkbox"},
        }
    data = ModelCardData(
        license=config.card.license,
        language=["en"],
        library_name="diffusers",
        pipeline_tag="text-to-image",
        tags=list(TAGS),
        datasets=sorted({facts.hub_id for facts in datasets if facts.hub_id}) or None,
        model_name=config.name if results else None,
        eval_results=results or None,
        **more,
    )
    return f"---\n{data.to_yaml()}\n---"


@dataclass(frozen=True)
class Evaluation:
    """The table and plot of an evaluation.

    Attributes:
        metrics: name -> description.
        results: the numbers in the Hub's form; empty if several models were compared.
    """

    header: list[str]
    rows: list[list[str]]
    metrics: dict[str, str]
    notes: list[str]
    protocol: dict[str, Any]
    curve: bool
    results: tuple[EvalResult, ...]


def read_evaluation(folder: Path) -> Evaluation | None:
    """Reads an evaluation's results; None if there are none, UserError if they are damaged."""
    path = folder / "results.json"
    if not path.exists():
        return None
    try:
        content = json.loads(path.read_text())
        rows, protocol, metrics = content["rows"], content["protocol"], dict(content["metrics"])
        header = [name for name in rows[0] if any(row.get(name) is not None for row in rows) and not _is_spread(name)]
        shown = {name: _words(protocol[name]) for name in (*_SHOWN, *_ALSO) if name in protocol}
        table = [[_cell(row, name) for name in header] for row in rows]
        results = _eval_results(rows, metrics, protocol) if len({row["model"] for row in rows}) == 1 else ()
        notes = [str(note) for note in content.get("notes", [])]
        return Evaluation(header, table, metrics, notes, shown, (folder / "curve.png").exists(), tuple(results))
    except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise UserError(f"{path} holds no results of an evaluation. Run `sdtrain evaluate` again.") from error


def _eval_results(
    rows: Sequence[Mapping[str, Any]], metrics: Mapping[str, str], protocol: Mapping[str, Any]
) -> Iterator[EvalResult]:
    for row, name in itertools.product(rows, metrics):
        scale = f"{row['guidance_scale']:g}"
        if isinstance(row.get(name), float) and math.isfinite(row[name]):
            yield EvalResult(
                task_type="text-to-image",
                dataset_type="images",
                dataset_name=str(protocol.get("reference_source", "not recorded")),
                metric_type=name,
                metric_name=f"{name}, guidance scale {scale}",
                metric_value=round(row[name], 6),
                metric_args={"guidance_scale": row["guidance_scale"]},
            )


def _is_spread(column: str) -> bool:
    return column.endswith(_SPREADS)


def _cell(row: Mapping[str, Any], column: str) -> str:
    """A number with its spread: a table with a column for each of them would be too wide."""
    spreads = [spread for kind in _SPREADS if (spread := row.get(f"{column}{kind}")) is not None]
    return " ± ".join([_text(row.get(column)), *(f"{spread:.2g}" for spread in spreads)])


def _words(value: Any) -> str:
    if isinstance(value, dict):
        value = [f"{name} {part}" for name, part in value.items()]
    return ", ".join(value) if isinstance(value, list) else str(value)


def _text(value: Any) -> str:
    if isinstance(value, list):
        return " to ".join(_text(part) for part in value)
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value).replace("|", "\\|")
