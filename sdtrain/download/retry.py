"""Retries failed rows of finished shards, leaving the rest of each shard byte for byte as it is."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass

from sdtrain.dataset.config import DownloadConfig, ImageRecipe
from sdtrain.dataset.files import scratch
from sdtrain.dataset.layout import DatasetDir
from sdtrain.dataset.manifest import forget_entry, read_entry
from sdtrain.dataset.shard_report import ShardReport
from sdtrain.dataset.stage import clear_leftovers, current_entries, is_finished, record, release
from sdtrain.dataset.sync import fetch_outputs
from sdtrain.download.http.failures import is_transient
from sdtrain.download.image_shards import read_shard_table
from sdtrain.download.publish import discard_next_table, final_files
from sdtrain.download.stage import DOWNLOAD, new_request, publish_checked
from sdtrain.download.worker_process import EarlierShard, Finished, Request, ShardRequest, download_process


def is_retryable(reason: str) -> bool:
    """Whether the failure may be gone by the next day."""
    return reason == "timeout" or is_transient(reason)


def retry_failed(
    dataset: DatasetDir,
    recipe: ImageRecipe,
    reasons: Collection[str] | None = None,
    on_report: Callable[[ShardReport], None] = lambda report: None,
) -> list[ShardReport]:
    """Fetches failed rows of finished shards again, adding the images that arrive; returns the changed shards' reports.

    A shard changes only if one of its hosts could be reached. Killed anywhere, each shard is as before or as after. The
    build does unfinished shards. `reasons` are the failures to retry, by default the retryable ones (`is_retryable`);
    `on_report` is called for each changed shard.
    """
    clear_leftovers(DOWNLOAD, dataset)
    asked = [
        request for shard in DOWNLOAD.shards(dataset, recipe) if (request := _ask(dataset, recipe, shard, reasons))
    ]
    size, reports = recipe.download.shards_per_process, []
    for begin in range(0, len(asked), size):
        group = asked[begin : begin + size]
        fetch_outputs(dataset, "download", [request.shard for request in group])
        for report in _retry(dataset, recipe, group):
            on_report(report)
            reports.append(report)
        for entry in (read_entry(dataset, "download", request.shard) for request in group):
            if entry:
                release(DOWNLOAD, dataset, entry)
    return reports


def _ask(dataset: DatasetDir, recipe: ImageRecipe, shard: int, reasons: Collection[str] | None) -> ShardRequest | None:
    if not is_finished(DOWNLOAD, dataset, recipe, shard):
        return None
    fetch_outputs(dataset, "download", [shard], tars=False)
    table = read_shard_table(dataset.images_table(shard))
    failures = {reason for reason in (table.reasons if table else ()) if reason is not None}
    wanted = failures & (set(reasons) if reasons is not None else _retryable(failures, recipe.download))
    if not wanted:
        return None
    fetch_outputs(dataset, "select")
    files = final_files(dataset, shard)
    earlier = EarlierShard(tar=files.tar, table=files.table, retried=sorted(wanted), selection_changed=False)
    digest = DOWNLOAD.fingerprint(dataset, recipe, shard)
    return ShardRequest(shard=shard, selection=dataset.selection(shard), fingerprint=digest, earlier=earlier)


def _retryable(failures: Collection[str], config: DownloadConfig) -> set[str]:
    """Those that may be gone by the next day, or with what the recipe trusts by now."""
    trusts_more = bool(config.ca_file) or config.unverified_tls != "never"
    return {reason for reason in failures if is_retryable(reason) or (trusts_more and reason == "tls_failed")}


def _retry(dataset: DatasetDir, recipe: ImageRecipe, asked: list[ShardRequest]) -> Iterator[ShardReport]:
    digests = {shard.shard: shard.fingerprint for shard in asked}
    started = time.monotonic()
    with scratch(dataset.root, f"retry-{asked[0].shard:05d}") as folder:
        request = new_request(dataset, recipe, folder, asked)
        with download_process(request) as finished:
            for done in finished:
                if done.num_unreached == done.num_fetched:
                    continue
                report = _publish(dataset, request, done)
                now = time.monotonic()
                described = {"fingerprint": digests[done.shard], "seconds": round(now - started, 3)}
                report, started = report.model_copy(update=described), now
                record(DOWNLOAD, dataset, report)
                yield report


def _publish(dataset: DatasetDir, request: Request, done: Finished) -> ShardReport:
    # The entry describes the files now replaced; after a kill here, the build finds the whole pair.
    discard_next_table(dataset, done.shard)
    forget_entry(dataset, "download", done.shard)
    return publish_checked(dataset, request, done)


@dataclass(frozen=True)
class RetryCounts:
    """Failed rows of finished shards before a retry, those with an image now, and the shards that changed."""

    num_failed: int
    num_recovered: int
    num_shards: int
    seconds: float

    def __str__(self) -> str:
        """One line for terminal and log."""
        if not self.num_failed:
            return "retry-failed: no row has failed"
        return (
            f"retry-failed: {self.num_recovered:,} of {self.num_failed:,} failed rows recovered "
            f"({self.num_shards:,} shards changed), {self.seconds:.1f} s"
        )


def retry_and_count(dataset: DatasetDir, recipe: ImageRecipe) -> RetryCounts:
    """Runs `retry_failed` on retryable rows, and counts."""
    started = time.monotonic()
    before = {entry.shard: entry for entry in current_entries(DOWNLOAD, dataset, recipe)}
    changed = retry_failed(dataset, recipe)
    return RetryCounts(
        num_failed=sum(entry.num_in - entry.num_out for entry in before.values()),
        num_recovered=sum(report.num_out - before[report.shard].num_out for report in changed),
        num_shards=len(changed),
        seconds=time.monotonic() - started,
    )
