"""Limits concurrent requests and request rate per host, and waits out a host's cooldown."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from yarl import URL

from sdtrain.download.http.failures import FetchError
from sdtrain.download.http.retry import LONGEST_PAUSE_S

_BURST = 4
"""This many requests may follow at once before spacing begins, enough for the images of one page."""
_REMEMBERED = 4096
_DEAD_COOLDOWN_S = 60
_DEAD_AFTER_ROUNDS = 2


def host_of(url: URL) -> str:
    """The server of a URL: its name, the same for http and https, and a non-standard port.

    One owner's names (img1.example.com, img2.example.com) stay apart, as nothing identifies owners.
    """
    host = url.raw_host or ""
    return host if url.port in (80, 443) else f"{host}:{url.port}"


class Host:
    """Schedules the requests to one host.

    A leaky bucket spaces requests. A host that asks for a cooldown (429, or 503 with Retry-After) gets no request until
    it is over: URLs wait up to `LONGEST_PAUSE_S`. If the cooldown is longer, or repeated cooldowns bring no answer,
    URLs fail at once, without a request, until it is over. So do the URLs of a host to which connections keep failing:
    a shard may hold hundreds of them.
    """

    def __init__(self, connections: int, requests_s: float, max_cooldowns: int) -> None:
        self.slots = asyncio.Semaphore(connections)
        self.num_users = 0
        self._interval_s = 1 / requests_s
        self._max_cooldowns = max_cooldowns
        self._dead_after = _DEAD_AFTER_ROUNDS * connections
        self._due = self._cooldown_until = self._closed_until = 0.0
        self._refusal = FetchError("connection_failed", "closed")
        self._cooldowns_in_a_row = self._failures_in_a_row = 0

    async def may_begin(self) -> None:
        """Returns when the next request may begin; during a refusal raises the host's last FetchError."""
        while True:
            now = time.monotonic()
            if now < self._closed_until:
                raise self._refusal.again()
            begin = max(self._cooldown_until, self._due - _BURST * self._interval_s)
            if begin <= now:
                self._due = max(self._due, now) + self._interval_s
                return
            await asyncio.sleep(begin - now)

    def start_cooldown(self, seconds: float, failure: FetchError) -> FetchError:
        """Starts a cooldown after `failure`; returns that, not transient if the cooldown is too long to wait for."""
        now = time.monotonic()
        self._failures_in_a_row = 0
        if now >= self._cooldown_until:  # else the request began before the cooldown
            self._cooldowns_in_a_row += 1
        if seconds > LONGEST_PAUSE_S or self._cooldowns_in_a_row > self._max_cooldowns:
            self._close(now + seconds, failure)
        self._cooldown_until = max(self._cooldown_until, now + seconds)
        return self._refusal.again() if self._cooldown_until <= self._closed_until else failure

    def answered(self) -> None:
        """Records any other answer."""
        self._cooldowns_in_a_row = self._failures_in_a_row = 0

    def not_reached(self, failure: FetchError) -> None:
        """Records a failed connection."""
        self._failures_in_a_row += 1
        if self._failures_in_a_row >= self._dead_after:
            self._close(time.monotonic() + _DEAD_COOLDOWN_S, failure)

    def is_idle(self) -> bool:
        """Whether it holds no state worth keeping."""
        now = time.monotonic()
        quiet = now >= max(self._due, self._cooldown_until, self._closed_until)
        return quiet and not (self.num_users or self._failures_in_a_row or self._cooldowns_in_a_row)

    def _close(self, until: float, failure: FetchError) -> None:
        self._closed_until = max(self._closed_until, until)
        self._refusal = FetchError(failure.reason, failure.detail, transient=False)


class Hosts:
    """All recently asked hosts."""

    def __init__(self, connections: int, requests_s: float, max_cooldowns: int) -> None:
        self._limits = connections, requests_s, max_cooldowns
        self._hosts: dict[str, Host] = {}
        self._sweep_at = _REMEMBERED

    @asynccontextmanager
    async def turn(self, url: URL) -> AsyncIterator[Host]:
        """Waits until the host may be asked, and counts the block as one request; FetchError if it is refusing."""
        host = self._host(host_of(url))
        host.num_users += 1
        try:
            async with host.slots:
                await host.may_begin()
                yield host
        finally:
            host.num_users -= 1

    def _host(self, name: str) -> Host:
        if name not in self._hosts:
            if len(self._hosts) >= self._sweep_at:
                self._hosts = {name: host for name, host in self._hosts.items() if not host.is_idle()}
                self._sweep_at = _REMEMBERED + 2 * len(self._hosts)
            self._hosts[name] = Host(*self._limits)
        return self._hosts[name]
