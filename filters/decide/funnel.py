"""The funnel: from metadata rows to kept samples, what dropped how many, and that the sum is right."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import TypedDict

from filters.recipe import Recipe
from filters.rules import RuleValue, explain
from sdtrain.dataset.layout import DatasetDir
from sdtrain.dataset.manifest import read_entry, require_entry
from sdtrain.dataset.selection import selected_shards, selection
from sdtrain.dataset.shard_report import ShardReport
from sdtrain.download.http.failures import meaning_of
from sdtrain.errors import UserError

# Reasons in the order in which they are looked for, after the recipe's rules.
_AFTER_RULES = (
    *("url_missing", "url_not_allowed", "blocklisted", "not_allowlisted", "removed"),
    *("duplicate_row", "over_limit"),
    *("duplicate_exact", "duplicate_perceptual", "duplicate_semantic"),
)
_MEANINGS = {
    "url_missing": "no URL",
    "url_not_allowed": "not a plain http or https URL of a public host",
    "blocklisted": "on one of the recipe's blocklists",
    "not_allowlisted": "not on one of the recipe's allowlists",
    "removed": "taken out of this dataset for good",
    "duplicate_row": "the same URL and caption again",
    "over_limit": "over the recipe's limit",
    "undecodable": "the stored image cannot be decoded",
    "duplicate_exact": "the same pixels as a kept image",
    "duplicate_perceptual": "looks like a kept image",
    "duplicate_semantic": "shows the same as a kept image",
}


class FunnelRow(TypedDict):
    """What one reason dropped. The first row has no reason: it holds the rows of the metadata."""

    stage: str
    reason: str
    meaning: str
    dropped: int
    remaining: int


def funnel(dataset: DatasetDir, recipe: Recipe, keep: ShardReport | None = None) -> list[FunnelRow]:
    """Drops by stage and reason, from all metadata rows to the kept samples.

    Args:
        dataset: with finished stages.
        recipe: whose rules the reasons are.
        keep: decisions to show in place of the recorded ones.

    Raises:
        UserError: a stage up to `keep` is not finished, or the counts of two stages do not fit.
    """
    select, keep = selection(dataset), keep or require_entry(dataset, "keep", 0)
    shards = selected_shards(dataset)
    download = _total([require_entry(dataset, "download", shard) for shard in shards])
    score = _total([require_entry(dataset, "score", shard) for shard in shards])
    rows = [FunnelRow(stage="select", reason="", meaning="rows of the metadata", dropped=0, remaining=select.num_in)]
    _append(rows, "select", select.dropped, recipe.select.rules, select.num_out)
    _append(rows, "download", download.dropped, {}, download.num_out)
    _append(rows, "score", score.dropped, {}, score.num_out)
    _append(rows, "keep", _own(keep, download, score), recipe.keep.rules, keep.num_out)
    return rows


def remarks(dataset: DatasetDir, recipe: Recipe) -> list[str]:
    """What one should know beside the numbers: the published size of the subset, and how odd input was handled.

    Raises:
        UserError: nothing has been selected yet.
    """
    selected = selection(dataset)
    ours = f"{selected.num_out:,} of {selected.num_in:,} rows selected"
    published = f"; published: {recipe.expected_rows}" if recipe.expected_rows else ""
    copies = read_entry(dataset, "dedup", 0)
    return [ours + published, *selected.notes, *(copies.notes if copies else ())]


def _total(reports: Iterable[ShardReport]) -> ShardReport:
    done = list(reports)
    dropped: Counter[str] = Counter()
    for report in done:
        dropped.update(report.dropped)
    num_in, num_out = sum(r.num_in for r in done), sum(r.num_out for r in done)
    return ShardReport(stage=done[0].stage, shard=0, num_in=num_in, num_out=num_out, dropped=dict(dropped))


def _own(keep: ShardReport, download: ShardReport, score: ShardReport) -> dict[str, int]:
    """What `keep` itself dropped: its report repeats what the stages before had dropped already."""
    own = Counter(keep.dropped)
    own.subtract(download.dropped)
    own.subtract(score.dropped)
    return {reason: count for reason, count in own.items() if count}


def _append(
    rows: list[FunnelRow], stage: str, dropped: dict[str, int], rules: dict[str, RuleValue], num_out: int
) -> None:
    for reason in sorted(dropped, key=lambda reason: _place(reason, rules)):
        remaining = rows[-1]["remaining"] - dropped[reason]
        meaning = _meaning(stage, reason, rules)
        rows.append(
            FunnelRow(stage=stage, reason=reason, meaning=meaning, dropped=dropped[reason], remaining=remaining)
        )
    if rows[-1]["remaining"] != num_out or any(count < 0 for count in dropped.values()):
        raise UserError(
            f"The counts do not add up: after stage '{stage}' {rows[-1]['remaining']:,} samples should be left, but it "
            f"reports {num_out:,}. Its input was made anew since; run the build again to bring it up to date."
        )


def _place(reason: str, rules: dict[str, RuleValue]) -> tuple[int, int, str]:
    if reason in _AFTER_RULES:
        return 3, _AFTER_RULES.index(reason), reason
    return (1, list(rules).index(reason), reason) if reason in rules else (2, 0, reason)


def _meaning(stage: str, reason: str, rules: dict[str, RuleValue]) -> str:
    if stage == "download":
        return meaning_of(reason)
    return _MEANINGS.get(reason) or explain(reason, rules)
