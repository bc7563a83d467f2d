"""Measures the captions of kept images by source: how many and how long, how near to the image, in which language."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import duckdb
from pydantic import Field

from sdtrain.model_card.word_lists import WordLists, language_sql, words_sql
from sdtrain.settings import Settings

MAX_TOKENS = 77
"""Of CLIP, with the start and the end token; what is longer is cut off."""
MAX_LANGUAGES = 5


class CaptionFacts(Settings):
    """The captions of one source.

    Attributes:
        source: `alt`, or the name of a prompt.
        num_captions, num_images: captions, and kept images that have one.
        truncated: share of them longer than `MAX_TOKENS`, 0 to 1.
        median_tokens: with the start and the end token.
        similarity: mean of CLIP's cosine between image and caption; None where it was not measured.
        languages: the most frequent with their numbers of captions.
    """

    source: str
    num_captions: int
    num_images: int
    truncated: float
    median_tokens: float
    similarity: float | None = None
    languages: list[tuple[str, int]] = Field(default=[])

    def language_text(self) -> str:
        """The languages with their shares, in words."""
        return ", ".join(f"{name} {num / self.num_captions:.0%}" for name, num in self.languages)


def measure_captions(
    connection: duckdb.DuckDBPyConnection, captions: str, kept: str, bound: Mapping[str, Any], lists: WordLists
) -> list[CaptionFacts]:
    """Measures captions by source, the most frequent first.

    `captions` is SQL for rows of uid, source, text, num_tokens and similarity, `kept` for the uids of kept images;
    `bound` are the values bound in both.
    """
    rows = f"FROM ({captions}) c SEMI JOIN ({kept}) k USING (uid)"
    found = connection.execute(
        "SELECT source, count(*) AS num_captions, count(DISTINCT uid) AS num_images, "
        f"avg((num_tokens > {MAX_TOKENS})::INTEGER), median(num_tokens), avg(similarity) {rows} "
        "GROUP BY source ORDER BY num_captions DESC, source",
        dict(bound),
    ).fetchall()
    languages = _languages(connection, rows, bound, lists) if found else {}
    return [
        CaptionFacts(
            **dict(zip(CaptionFacts.model_fields, row, strict=False)), languages=languages[row[0]][:MAX_LANGUAGES]
        )
        for row in found
    ]


def _languages(
    connection: duckdb.DuckDBPyConnection, rows: str, bound: Mapping[str, Any], lists: WordLists
) -> dict[str, list[tuple[str, int]]]:
    language, words = language_sql(lists)
    named = f"SELECT source, text AS caption {rows}"
    counted = connection.execute(
        f"SELECT source, {language} AS language, count(*) AS num "  # noqa: S608 - names are from here
        f"FROM (SELECT *, {words_sql()} AS words FROM ({named})) GROUP BY ALL ORDER BY num DESC, language",
        {**bound, **words},
    ).fetchall()
    found: dict[str, list[tuple[str, int]]] = {}
    for source, name, num in counted:
        found.setdefault(source, []).append((name, num))
    return found
