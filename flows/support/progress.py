"""Progress bars on Prefect's page, throttled to spare the server."""

import time
from collections.abc import Callable
from types import TracebackType
from typing import Any

import httpx
from prefect.artifacts import create_progress_artifact, update_progress_artifact
from prefect.exceptions import PrefectException
from prefect.logging import get_run_logger

MIN_INTERVAL_S = 2.0


class Throttle:
    """Permits an action at most once per interval."""

    def __init__(self, interval_s: float):
        self._interval_s, self._last = interval_s, float("-inf")

    def ready(self) -> bool:
        """Whether an interval has passed since the last True."""
        now = time.monotonic()
        if now - self._last < self._interval_s:
            return False
        self._last = now
        return True


class ProgressArtifact:
    """A progress bar in the run's artifacts; an unreachable server costs the bar, not the run."""

    def __init__(self, name: str, total: int, unit: str):
        self._name, self._total, self._unit = name, total, unit
        self._logger, self._throttle = get_run_logger(), Throttle(MIN_INTERVAL_S)
        self._done = 0
        self._artifact_id = self._quietly(
            lambda: create_progress_artifact(0.0, key=f"progress-{name}", description=self._describe())
        )

    def __enter__(self) -> "ProgressArtifact":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if kind is None or issubclass(kind, Exception):  # a cancelled run has no time left for requests
            self._write()

    def show(self, done: int) -> None:
        """Moves the bar to `done` of `total`."""
        self._done = done
        if self._throttle.ready():
            self._write()

    def _describe(self) -> str:
        return f"{self._name}: {self._done:,} of {self._total:,} {self._unit}"

    def _write(self) -> None:
        artifact_id, percent = self._artifact_id, 100.0 * min(1.0, self._done / max(1, self._total))
        if artifact_id is not None:
            self._quietly(lambda: update_progress_artifact(artifact_id, percent, description=self._describe()))

    def _quietly(self, request: Callable[[], Any]) -> Any:
        try:
            return request()
        except (httpx.HTTPError, PrefectException) as error:
            self._logger.debug("The progress bar of %s was not written: %s", self._name, error)
            return None
