"""Failed rows of finished shards, tried again alone: what was had stays as it is, byte for byte."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator

from sdtrain.dataset.config import ImageRecipe
from sdtrain.dataset.files import scratch
from sdtrain.dataset.layout import DatasetDir
from sdtrain.dataset.manifest import forget_entry, read_entry
from sdtrain.dataset.s3.sync import fetch_outputs
from sdtrain.dataset.shard_report import ShardReport
from sdtrain.dataset.stage import clear_leftovers, is_finished, record, release
from sdtrain.download.download_request import Finished, Request, RetryRequest, ShardRequest
from sdtrain.download.http.failures import is_worth_another_try
from sdtrain.download.image_shards import read_shard_table
from sdtrain.download.publish import forget_next_table
from sdtrain.download.stage import DOWNLOAD, new_request, publish_checked
from sdtrain.download.worker_process import download_process


def may_have_passed(reason: str) -> bool:
    """Whether a failure may be gone by the next day."""
    return reason == "timeout" or is_worth_another_try(reason)


def retry_failed(
    dataset: DatasetDir,
    recipe: ImageRecipe,
    reasons: Collection[str] | None = None,
    on_report: Callable[[ShardReport], None] = lambda report: None,
) -> list[ShardReport]:
    """Fetches failed rows of finished shards again and puts what comes beside what was there.

    A shard changes only if a host of it could be reached. Killed anywhere, each shard is as before or as after.

    Args:
        dataset: whose shards; those that this recipe's download has not finished are left to the build.
        recipe: as it was built with.
        reasons: which failures; without, those that may have passed (`may_have_passed`).
        on_report: called for each changed shard.

    Returns:
        The new reports of the shards that changed.
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
    wanted = failures & set(reasons) if reasons is not None else set(filter(may_have_passed, failures))
    if not wanted:
        return None
    fetch_outputs(dataset, "select")
    retry = RetryRequest(tar=dataset.images_tar(shard), table=dataset.images_table(shard), reasons=sorted(wanted))
    digest = DOWNLOAD.fingerprint(dataset, recipe, shard)
    return ShardRequest(shard=shard, selection=dataset.selection(shard), fingerprint=digest, retry=retry)


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
    # The entry tells of the files that are replaced now; if this is killed, the build finds the whole pair.
    forget_next_table(dataset, done.shard)
    forget_entry(dataset, "download", done.shard)
    return publish_checked(dataset, request, done)
