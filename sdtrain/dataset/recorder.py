"""Records finished shards while their stage works on the next."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import copy_context
from types import TracebackType

from sdtrain.dataset.layout import DatasetDir
from sdtrain.dataset.manifest import write_entry
from sdtrain.dataset.s3.eviction import evict_after
from sdtrain.dataset.s3.mirror import mirror_of
from sdtrain.dataset.shard_report import ShardReport


class Recorder:
    """Makes shards count as finished; their upload to S3 goes on beside the work, one at a time.

    Attributes:
        reports: of the shards that are recorded.

    Args:
        dataset: whose shards.
        on_report: called for each of them, in the thread that reports.
    """

    def __init__(self, dataset: DatasetDir, on_report: Callable[[ShardReport], None]) -> None:
        self.reports: list[ShardReport] = []
        self._dataset, self._on_report = dataset, on_report
        self._thread = ThreadPoolExecutor(1, "upload") if mirror_of(dataset) else None
        self._waiting: tuple[ShardReport, Future[None]] | None = None

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        try:
            if error is None:
                self._end(self._waiting)
        finally:
            if self._thread:
                self._thread.shutdown()  # after an error too, what is finished is recorded

    def add(self, report: ShardReport) -> None:
        """Records a shard whose outputs have their final names.

        Raises:
            UserError: it, or the one before, cannot be written.
        """
        if self._thread is None:
            write_entry(self._dataset, report)
            self._tell(report)
            return
        before = self._waiting
        self._waiting = report, self._thread.submit(copy_context().run, self._upload, report)
        self._end(before)

    def _upload(self, report: ShardReport) -> None:
        write_entry(self._dataset, report)
        evict_after(self._dataset, report)

    def _end(self, waiting: tuple[ShardReport, Future[None]] | None) -> None:
        """Waits for a shard that is being written, if there is one."""
        if waiting:
            report, upload = waiting
            upload.result()
            self._tell(report)

    def _tell(self, report: ShardReport) -> None:
        self.reports.append(report)
        self._on_report(report)
