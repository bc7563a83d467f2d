"""The report's section on captions: each source in numbers, and images beside all that they are called."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import duckdb

from sdtrain.dataset.layout import DatasetDir
from sdtrain.model_card.caption_facts import MAX_TOKENS, CaptionFacts, measure_captions
from sdtrain.model_card.word_lists import load_word_lists
from sdtrain.report.examples import Thumbnails, shorten
from sdtrain.report.plots import plot_histogram

NUM_EXAMPLES = 20
# More do not change a histogram; of texts beyond it, only the number matters.
_MAX_VALUES, _LONGEST = 100_000, 2 * MAX_TOKENS
_KEPT = "SELECT uid FROM decisions WHERE reason IS NULL"


@dataclass(frozen=True)
class CaptionExample:
    """One image with its captions, each with its source."""

    thumbnail: str
    captions: list[tuple[str, str]]


@dataclass(frozen=True)
class CaptionSection:
    """Facts by source, diagrams, and examples; paths are relative to the page."""

    facts: list[CaptionFacts]
    diagrams: list[str]
    examples: list[CaptionExample]


def draw_captions(connection: duckdb.DuckDBPyConnection, dataset: DatasetDir, images: Path) -> CaptionSection | None:
    """Measures and draws the view `captions`; None where there is none, or it is empty.

    `images`, beside the page, gets diagrams and thumbnails.
    """
    views = connection.execute("SELECT count(*) FROM duckdb_views() WHERE view_name = 'captions'").fetchone()
    if not views or not views[0]:
        return None
    facts = measure_captions(connection, "FROM captions", _KEPT, {}, load_word_lists())
    if not facts:
        return None
    return CaptionSection(facts, _diagrams(connection, facts, images), _examples(connection, dataset, images))


def _diagrams(connection: duckdb.DuckDBPyConnection, facts: list[CaptionFacts], images: Path) -> list[str]:
    sources = [one.source for one in facts]
    tokens = _values(connection, f"least(num_tokens, {_LONGEST})", sources)
    plot_histogram(tokens, MAX_TOKENS, "tokens of CLIP", images / "caption_tokens.png", of="captions")
    drawn = [f"{images.name}/caption_tokens.png"]
    similarities = _values(connection, "similarity", sources)
    if any(similarities.values()):
        label = "CLIP's cosine between image and caption"
        plot_histogram(similarities, None, label, images / "caption_similarity.png", of="captions")
        drawn.append(f"{images.name}/caption_similarity.png")
    return drawn


def _values(connection: duckdb.DuckDBPyConnection, column: str, sources: list[str]) -> dict[str, list[float]]:
    query = (
        f"SELECT value FROM (SELECT {column} AS value FROM captions SEMI JOIN ({_KEPT}) k USING (uid) "  # noqa: S608
        f"WHERE source = ? AND {column} IS NOT NULL) USING SAMPLE reservoir({_MAX_VALUES} ROWS) REPEATABLE (1)"
    )
    return {source: [row[0] for row in connection.execute(query, [source]).fetchall()] for source in sources}


def _examples(connection: duckdb.DuckDBPyConnection, dataset: DatasetDir, images: Path) -> list[CaptionExample]:
    """Kept images at random, first those with captions of several sources."""
    chosen = (
        f"SELECT uid FROM captions SEMI JOIN ({_KEPT}) k USING (uid) GROUP BY uid "  # noqa: S608 - from here
        f"ORDER BY count(DISTINCT source) DESC, md5(uid) LIMIT {NUM_EXAMPLES}"
    )
    rows = connection.execute(
        "SELECT any_value((i.key, i.shard, i.picture_offset, i.picture_bytes)), "  # noqa: S608 - from here
        "list({'source': c.source, 'text': c.text} "
        "ORDER BY c.source <> 'alt', c.origin_uid <> c.uid, c.source, c.text) "
        f"FROM ({chosen}) JOIN captions c USING (uid) JOIN images i USING (uid) GROUP BY uid ORDER BY md5(uid)"
    ).fetchall()
    thumbnails = Thumbnails(dataset, images)
    made = ((thumbnails.make(*_place(place)), captions) for place, captions in rows)
    return [
        CaptionExample(f"{images.name}/{path.name}", [(one["source"], shorten(one["text"])) for one in captions])
        for path, captions in made
        if path
    ]


def _place(place: Any) -> tuple[str, int, int | None, int | None]:
    key, shard, offset, num_bytes = place.values() if isinstance(place, dict) else place
    return key, shard, offset, num_bytes
