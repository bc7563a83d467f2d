"""Summarises the content that a model was trained on, in the order of the EU's template for such a public summary.

The template is the European Commission's of July 2025, for Article 53(1)(d) of Regulation (EU) 2024/1689 (the AI Act).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
import yaml
from pydantic import Field

from sdtrain import __version__
from sdtrain.config import TrainConfig
from sdtrain.dataset.config import DownloadConfig
from sdtrain.dataset.files import publish
from sdtrain.dataset.layout import DatasetDir
from sdtrain.dataset.removal_ledger import read_ledger
from sdtrain.download.http.connections import user_agent
from sdtrain.download.http.permissions import OUR_NAMES
from sdtrain.exposure.lineage import Ancestor, lineage
from sdtrain.model_card import content_queries as ask
from sdtrain.model_card.content_queries import Listed, Number, asking
from sdtrain.model_card.records import DatasetFacts, dataset_facts
from sdtrain.model_card.representation import KEPT, Representation
from sdtrain.model_card.representation_record import read_representation
from sdtrain.settings import Settings, load_settings

TEMPLATE_NAME = "European Commission, template for the public summary of training content, July 2025"
MARKDOWN, JSON = "training-summary.md", "training-summary.json"
NUM_SHOWN = 50
"""Domains in the text; the others are in the table beside it."""
MAX_TOKENS = 77
"""Tokens of a caption that CLIP's text encoder reads, the two marks at its ends included."""
_SME_DOMAINS = 1000
_TEMPLATE = Path(__file__).parent / "training_summary.md.jinja"
_IMAGE_RANGES = ((10**6, "less than 1 million images"), (10**9, "1 million to 1 billion images"))
_TEXT_RANGES = ((10**9, "less than 1 billion tokens"), (10**13, "1 billion to 10 trillion tokens"))


class Crawling(Settings):
    """How the images were fetched: what the recipe set."""

    names: list[str]
    user_agent: str
    robots_txt: bool
    robots_header: bool
    tdm_reservation: bool
    requests_per_host_s: float
    connections_per_host: int


class Domains(Settings):
    """The domains of the kept images.

    Attributes:
        num: how many there are.
        num_top: of these, the ten percent with the most images; `images_top` is their number of images.
        num_sme: how many of those a small or medium-sized enterprise lists: five percent, at most 1,000.
        first: the first of the list.
        file: the table of the whole list.
    """

    num: Number
    num_top: int
    images_top: Number
    num_sme: int
    first: Listed
    file: str


class DatasetContent(Settings):
    """What the summary says of one dataset; see `summarise_dataset`."""

    name: str
    description: str
    public_dataset: str | None
    """Link of the public metadata, if that is from the Hub."""
    metadata: str
    own_images: str
    """Name of the publisher's own images, if they were imported."""
    num_rows: Number
    num_selected: Number
    num_fetched: Number
    num_kept: Number
    num_bytes: Number
    first_day: Number
    last_day: Number
    crawling: Crawling | None
    domains: Domains | None
    opt_outs: Listed
    lists: Listed
    illegal: Listed
    rules: dict[str, Any] = Field(default={})
    synthetic: Listed | None
    removals: dict[str, int]
    """Entries of the ledger of removals, by the kind of key that was listed."""
    languages: dict[str, float] = Field(default={})
    """Share of the kept captions, 0 to 1; empty if not measured."""


class Summary(Settings):
    """The whole summary."""

    template: str = TEMPLATE_NAME
    version: str = __version__
    run: str
    config: str
    step: int | None
    began_from: list[str]
    image_range: str
    text_range: str
    num_images: int
    datasets: list[DatasetContent]


def write_summary(run: Path, datasets: Sequence[tuple[str, Path]]) -> list[Path]:
    """Writes RUN/training-summary.md and .json, and a table of domains for each dataset; returns their paths.

    `datasets` are the run's, by their names as the user gives them and their local folders. Reads tables, never
    images, in memory that hardly grows with their number.

    Raises:
        UserError: `run` is no training run, or a dataset cannot be asked.
    """
    chain, config = lineage(run), load_settings(TrainConfig, run / "config.yaml")
    measured = {one.name: one for one in read_representation(run)}
    found = [
        summarise_dataset(name, here, run / f"training-domains-{number}.csv", measured)
        for number, (name, here) in enumerate(datasets, 1)
    ]
    num_images = sum(int(one.num_kept.value or 0) for one in found)
    summary = Summary(
        run=run.name,
        config=config.description or config.name,
        step=chain[-1].step,
        began_from=[_described(link) for link in chain[:-1]],
        image_range=_range(num_images, _IMAGE_RANGES, "more than 1 billion images"),
        text_range=_range(num_images * MAX_TOKENS, _TEXT_RANGES, "more than 10 trillion tokens"),
        num_images=num_images,
        datasets=found,
    )
    with publish(run / JSON) as temporary:
        temporary.write_text(json.dumps(summary.model_dump(mode="json"), indent=1, ensure_ascii=False) + "\n")
    with publish(run / MARKDOWN) as temporary:
        temporary.write_text(_rendered(summary))
    tables = [run / one.domains.file for one in found if one.domains]
    return [run / MARKDOWN, run / JSON, *tables]


def summarise_dataset(
    name: str, root: Path, domains_file: Path, measured: dict[str, Representation] | None = None
) -> DatasetContent:
    """Asks one dataset; UserError if it cannot answer, or its ledger of removals is damaged."""
    dataset, facts = DatasetDir(root), dataset_facts(root)
    with asking(dataset.database, name) as questions:
        is_crawled = not facts.source
        return DatasetContent(
            name=facts.name or name,
            description=facts.description,
            public_dataset=f"https://huggingface.co/datasets/{facts.hub_id}" if facts.hub_id else None,
            metadata=_shown_metadata(facts),
            own_images=facts.source,
            num_rows=questions.number(ask.NUM_ROWS),
            num_selected=questions.number(ask.NUM_SELECTED),
            num_fetched=questions.number(ask.NUM_FETCHED),
            num_kept=questions.number(ask.NUM_KEPT),
            num_bytes=questions.number(ask.BYTES),
            first_day=questions.number(ask.FIRST),
            last_day=questions.number(ask.LAST),
            crawling=_crawling(dataset.recipe) if is_crawled else None,
            opt_outs=questions.rows(ask.OPT_OUTS),
            lists=questions.rows(ask.LISTS),
            illegal=questions.rows(ask.ILLEGAL),
            rules=facts.select_rules | facts.decide_rules,
            synthetic=questions.rows(ask.SYNTHETIC) if questions.has("captions") else None,
            removals=_removals(dataset.removed),
            languages=_languages((measured or {}).get(facts.name or name)),
            domains=_domains(questions, domains_file) if is_crawled else None,
        )


def _domains(questions: ask.Questions, path: Path) -> Domains:
    questions.group_by_domain()
    num = questions.number(ask.NUM_DOMAINS)
    total = int(num.value or 0)
    questions.write_csv(ask.TOP, path)
    return Domains(
        num=num,
        num_top=-(-total // 10),
        images_top=questions.number(ask.TOP_IMAGES),
        num_sme=min(-(-total // 20), _SME_DOMAINS),
        first=questions.rows(ask.TOP, NUM_SHOWN),
        file=path.name,
    )


def _crawling(recipe: Path) -> Crawling:
    try:
        stated = (yaml.safe_load(recipe.read_text()) or {}).get("download") or {}
    except (OSError, yaml.YAMLError):
        stated = {}
    fields = DownloadConfig.model_fields
    settings = {name: stated.get(name, fields[name].default) for name in Crawling.model_fields if name in fields}
    contact = str(stated.get("contact", ""))
    return Crawling(names=list(OUR_NAMES), user_agent=user_agent(contact), **settings)


def _shown_metadata(facts: DatasetFacts) -> str:
    """Where the metadata came from, without the folders of a machine."""
    return facts.metadata if "://" in facts.metadata else Path(facts.metadata).name


def _removals(ledger: Path) -> dict[str, int]:
    listed = [kind for kind in read_ledger(ledger)["listed_by"].to_pylist() if kind]
    return {kind: listed.count(kind) for kind in sorted(set(listed))}


def _languages(found: Representation | None) -> dict[str, float]:
    if found is None:
        return {}
    shares = {one.name: found.shares(one, KEPT) or 0.0 for one in found.languages}
    return {name: share for name, share in sorted(shares.items(), key=lambda item: -item[1]) if share}


def _described(link: Ancestor) -> str:
    return link.config.description or link.config.name if link.config else Path(link.source).name


def _range(num: int, ranges: Sequence[tuple[int, str]], otherwise: str) -> str:
    return next((text for limit, text in ranges if num < limit), otherwise)


def _rendered(summary: Summary) -> str:
    """The Markdown; every number refers to its query at the end."""
    queries: dict[str, int] = {}
    environment = jinja2.Environment(  # noqa: S701 - Markdown, whose table cells are escaped
        trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined, keep_trailing_newline=True
    )
    environment.filters["cell"] = lambda value: " ".join(str(value).split()).replace("|", "\\|").replace("<", "&lt;")
    environment.filters["shown"] = _shown
    environment.globals["cite"] = lambda query: f"[Q{queries.setdefault(query, len(queries) + 1)}]"
    text = environment.from_string(_TEMPLATE.read_text()).render(summary=summary)
    listed = "".join(f"\nQ{number}\n\n```sql\n{query}\n```\n" for query, number in queries.items())
    return f"{text}{listed}"


def _shown(value: object) -> str:
    if value is None:
        return "not recorded"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
