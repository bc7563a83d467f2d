"""Puts the card together."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
from pydantic import ValidationError

from sdtrain import __version__
from sdtrain.config import TrainConfig
from sdtrain.dataset.files import publish
from sdtrain.dataset.s3.url import is_s3, parse_url, work_folder
from sdtrain.impact.energy_log import Spent
from sdtrain.model_card.dataset import DatasetFacts, dataset_facts
from sdtrain.model_card.energy import EnergyRow, amount, preparation_row, training_row
from sdtrain.model_card.evaluation import read_evaluation
from sdtrain.model_card.front_matter import front_matter
from sdtrain.model_card.lineage import lineage
from sdtrain.settings import load_settings
from sdtrain.training.run_dir import RunDir

_TEMPLATE = Path(__file__).parent / "card.md.jinja"
_KEPT_FACTS = "datasets.json"


def write_card(run: Path) -> Path:
    """Writes RUN/README.md from the records of a run and of its datasets; returns its path.

    Raises:
        UserError: `run` is no training run, or one of its records is damaged.
    """
    chain = lineage(run)
    config = load_settings(TrainConfig, run / "config.yaml")
    datasets = _datasets(run, config)
    energy = _energy(chain[:-1], chain[-1].sessions, datasets, config)
    total_kg = _total(energy)
    previews = sorted(RunDir(run).previews.glob("step-*.png"))
    sessions = chain[-1].sessions
    hardware = _hardware(sessions)
    text = _environment().from_string(_TEMPLATE.read_text()).render(
        front_matter=front_matter(config, datasets, total_kg, hardware),
        config=config,
        chain=chain,
        step=chain[-1].step,
        datasets=datasets,
        energy=energy,
        total_kg=total_kg,
        intensity=config.card.intensity(),
        hardware=hardware,
        evaluation=read_evaluation(run / "evaluation"),
        preview=previews[-1].relative_to(run) if previews else None,
        run=run.name,
        version=__version__,
    )  # fmt: skip
    path = run / "README.md"
    with publish(path) as temporary:
        temporary.write_text(text)
    return path


def _datasets(run: Path, config: TrainConfig) -> list[DatasetFacts]:
    """The facts of the datasets; kept beside the run, for the time when these have gone or moved."""
    kept = _kept(run / _KEPT_FACTS)
    found = [dataset_facts(_here(source.root)) for source in config.data.all_sources]
    facts = [fact if fact.name or fact.root not in kept else kept[fact.root] for fact in found]
    with publish(run / _KEPT_FACTS) as temporary:
        temporary.write_text(json.dumps([fact.model_dump(mode="json") for fact in facts], indent=1) + "\n")
    return facts


def _here(root: str) -> Path:
    """Where a dataset is on this machine: of one on S3, its work folder."""
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
    """Kg of all rows; None where one of them is not known, for a part is no total."""
    known = [row.kg for row in rows if row.kg is not None]
    return sum(known) if len(known) == len(rows) else None


def _hardware(sessions: Sequence[Spent]) -> str | None:
    used = dict.fromkeys(f"{s.num_devices} x {s.device} on {s.num_hosts} host(s)" for s in sessions)
    return ", then ".join(used) or None


def _environment() -> jinja2.Environment:
    # Markdown, not HTML: what comes from captions or names is shortened to one line and cannot end a table's cell.
    environment = jinja2.Environment(  # noqa: S701
        trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined, keep_trailing_newline=True
    )
    environment.filters["cell"] = lambda value: " ".join(str(value).split()).replace("|", "\\|").replace("<", "&lt;")
    environment.filters["amount"] = amount
    return environment
