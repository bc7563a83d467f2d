"""Settings of SELECT, the rows that are worth downloading: metadata, joins, rules and lists."""

from __future__ import annotations

from functools import partial
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, ValidationInfo

from filters.columns import ALIASES, RESERVED, SwappedSizes
from filters.rules import RULES, RuleValue, check_rules
from sdtrain.errors import UserError
from sdtrain.settings import Settings, nearest


def checked_rules(rules: Any, info: ValidationInfo, in_decide: bool) -> Any:
    """Normalises the rules of a section; ValueError for unknown rules and values. `in_decide`: those of DECIDE."""
    if not isinstance(rules, dict):
        raise ValueError("rules are `name: value` lines")
    try:
        return check_rules(rules, in_decide, None if in_decide else info.data.get("carry", ()))
    except UserError as error:
        raise ValueError(str(error)) from error


Rules = Annotated[dict[str, RuleValue], BeforeValidator(partial(checked_rules, in_decide=False))]

JOINABLE = frozenset(ALIASES) - {"url", "caption", "hash", "source_row"}


def _joinable(columns: list[str] | None) -> list[str] | None:
    for name in columns or []:
        if name not in JOINABLE:
            raise ValueError(f"column '{name}' cannot be joined.{nearest(name, sorted(JOINABLE))}")
    return columns


class JoinConfig(Settings):
    """Separate files of scores, which fill gaps in the metadata."""

    files: str
    """Parquet, CSV, TSV or JSON lines: a file, a folder or a glob."""
    by: Literal["hash", "url_caption"] = "hash"
    """The key of a score's row in the metadata: LAION's `hash` of URL and TEXT, or these themselves."""
    columns: Annotated[list[str] | None, AfterValidator(_joinable)] = None
    """The columns to take, by our names; all that the files have by default."""


class ListConfig(Settings):
    """Entries that drop rows (a blocklist) or that rows must be among (an allowlist)."""

    files: str
    """Parquet, or text with one entry a line and comments after # (but by url_caption only in lines of their own): a
    file, a folder or a glob."""
    by: Literal["url", "host", "hash", "uid", "md5", "sha256", "url_caption"]
    """The kind of an entry. A host means its subdomains too; in text, url_caption is URL, tab, caption. A uid is
    sdtrain's (the md5 of URL, line feed and caption) or, if the metadata has a column uid as DataComp's, that one."""


def _known_columns(columns: dict[str, str]) -> dict[str, str]:
    for name in columns:
        if name not in ALIASES:
            raise ValueError(f"'{name}' is none of our columns.{nearest(name, list(ALIASES))}")
    return columns


def _carriable(names: list[str]) -> list[str]:
    for number, name in enumerate(names):
        if name.lower() in RESERVED:
            raise ValueError(f"'{name}' is a column of our own tables; carry it under another name of the metadata's")
        if name.lower() in map(str.lower, names[:number]):
            raise ValueError(f"'{name}' is there twice")
        if not name.strip() or not name.isprintable() or set(name) & set("\"'?{}\\"):
            raise ValueError(f"{name!r} cannot be a column of our tables")
        if name in RULES:
            raise ValueError(f"'{name}' is the name of a rule")
    return names


Carried = Annotated[list[str], AfterValidator(_carriable)]
Columns = Annotated[dict[str, str], AfterValidator(_known_columns)]


class SelectConfig(Settings):
    """Selection of the metadata rows that are worth downloading."""

    metadata: str = ""
    """Parquet, CSV, TSV or JSON lines (also .gz, .zst) with LAION's columns: a file, a folder or a glob; local, or on
    s3://, gs://, hf:// or https://. Records keep no query or password of a URL: give it again, or write ${NAME} and set
    that environment variable."""
    swapped_sizes: SwappedSizes = "auto"
    """Whether WIDTH and HEIGHT are exchanged; "auto": in the raw files of laion400m and laion2B-en, where they are."""
    columns: Columns = Field(default={})
    """Our names of columns -> the files', where they are none of the usual: {url: image_url, caption: raw_caption}."""
    carry: Carried = Field(default=[])
    """Further columns to carry into the selection, views and the JSON of packed samples, and to use in rules."""
    joins: list[JoinConfig] = Field(default=[])
    """Files with scores for the rows, joined before the rules; the first that has a score wins."""
    rules: Rules = Field(default={})
    """Rule name -> value, checked in this order; the first that fails is the reason."""
    blocklists: list[ListConfig] = Field(default=[])
    """Rows on any of these are dropped."""
    allowlists: list[ListConfig] = Field(default=[])
    """Rows must be on each of these."""
    null_policy: Literal["drop", "score_later"] = "drop"
    """A NULL score drops the row as SQL would, or leaves the decision to the image's own score."""
    limit: int | None = Field(default=None, ge=1)
    """At most this many rows, the first in shuffled order."""
    seed: int = 42
    shuffle_by: Literal["uid", "url"] = "uid"
    """The order is of single rows, or of URLs, whose rows with other captions come together: one fetch serves them."""
    samples_per_shard: int = Field(default=10_000, ge=1)
    new_files: Literal["append", "reshuffle"] = "append"
    """Metadata files that were added since give shards after the finished ones, or a new shuffle of everything."""
