"""Counts what was spent at an endpoint, over all processes and runs that share a folder."""

from __future__ import annotations

import json
import os
import time
import uuid
from dataclasses import asdict
from functools import cache
from pathlib import Path
from threading import RLock

from sdtrain.dataset.files import publish
from sdtrain.endpoint.answers import Usage
from sdtrain.endpoint.config import EndpointConfig
from sdtrain.endpoint.failures import EndpointError

_SAVED_EVERY_S = 1.0
_OTHERS_READ_EVERY_S = 10.0


class Budget:
    """What was spent, and whether more may be.

    Each process keeps its sum, over all shards that it asks about, in one file of its own in `folder`, so that none
    waits for another; a process that is killed loses at most a second of its count. Without a folder only this object's
    own spending counts.
    """

    def __init__(self, config: EndpointConfig, folder: Path | None = None) -> None:
        self._config = config
        self._account = _account(folder.absolute(), os.getpid()) if folder else _Account(None)

    @property
    def spent(self) -> Usage:
        """All that was spent, here and by others."""
        return self._account.total()

    @property
    def is_spent(self) -> bool:
        """Whether a limit is reached."""
        config = self._config
        if not config.has_budget:
            return False
        spent = self.spent
        too_many = config.max_total_tokens is not None and spent.total_tokens >= config.max_total_tokens
        return too_many or (config.max_cost is not None and cost_of(spent, config) >= config.max_cost)

    def add(self, usage: Usage) -> None:
        """Counts an answer."""
        self._account.add(usage)

    def save(self) -> None:
        """Writes this process's sum."""
        self._account.save()

    def spent_error(self, setting: str) -> EndpointError:
        """Says that the budget is spent, and how to go on."""
        spent, limits = self.spent, []
        if self._config.max_cost is not None:
            limits.append(f"{setting}.max_cost is {self._config.max_cost:g} dollars")
        if self._config.max_total_tokens is not None:
            limits.append(f"{setting}.max_total_tokens is {self._config.max_total_tokens:,}")
        return EndpointError(
            f"The budget is spent: {spent.prompt_tokens:,} tokens of questions and {spent.completion_tokens:,} of "
            f"answers, {cost_of(spent, self._config):.2f} dollars; {' and '.join(limits)}. All answers are kept: raise "
            "the limit and run the same command to go on."
        )


class _Account:
    """A process's sum in its file, and the sums of others in the files beside it, read now and then."""

    def __init__(self, path: Path | None) -> None:
        self._path, self._lock = path, RLock()
        self._own = self._others = Usage()
        self._read_at: float | None = None
        self._saved_at = 0.0

    def total(self) -> Usage:
        now = time.monotonic()
        with self._lock:
            if self._path and (self._read_at is None or now - self._read_at > _OTHERS_READ_EVERY_S):
                self._others, self._read_at = usage_in(self._path.parent, but=self._path), now
            return self._others + self._own

    def add(self, usage: Usage) -> None:
        with self._lock:
            self._own += usage
            if time.monotonic() - self._saved_at > _SAVED_EVERY_S:
                self.save()

    def save(self) -> None:
        with self._lock:
            self._saved_at = time.monotonic()
            if self._path and self._own.total_tokens:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                with publish(self._path) as temporary:
                    temporary.write_text(json.dumps(asdict(self._own)))


@cache
def _account(folder: Path, process: int) -> _Account:
    return _Account(folder / f"{uuid.uuid4().hex}.json")


def usage_in(folder: Path, but: Path | None = None) -> Usage:
    """The sum of the files of a folder, without `but`."""
    total = Usage()
    for path in folder.glob("*.json"):
        if path != but:
            total += Usage(**json.loads(path.read_text()))
    return total


def cost_of(usage: Usage, config: EndpointConfig) -> float:
    """US dollars."""
    return (usage.prompt_tokens * config.prompt_price + usage.completion_tokens * config.completion_price) / 1e6
