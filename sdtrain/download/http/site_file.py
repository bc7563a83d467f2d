"""Fetches and caches each site's file of rules for robots."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

from yarl import URL

from sdtrain.dataset.config import DownloadConfig
from sdtrain.download.http.failures import FetchError
from sdtrain.download.http.retry import Budget, with_retries
from sdtrain.download.http.single_flight import SingleFlightCache
from sdtrain.download.http.transport import Transport

R = TypeVar("R")
_MAX_BYTES = 500 * 2**10
"""The size that RFC 9309 requires to be read; the rest is ignored."""
_KEPT_S = 24 * 3600
_KEPT_FAILURE_S = 300


class SiteFile(Generic[R]):
    """The rules of each site (scheme, host and port) from which an image is requested, fetched once.

    Fetched like an image, with the same checks, limits and manners, but its own budget.

    Args:
        transport: sends the requests.
        config: its limits.
        path: of the file.
        parse: turns the file, or the failure to fetch it, into rules.
    """

    def __init__(
        self, transport: Transport, config: DownloadConfig, path: str, parse: Callable[[bytes | FetchError], R]
    ) -> None:
        self._transport = transport
        self._config = config
        self._path = path
        self._parse = parse
        self._rules: SingleFlightCache[URL, R] = SingleFlightCache(
            self._fetch, lambda outcome: _KEPT_FAILURE_S if isinstance(outcome, FetchError) else _KEPT_S
        )

    async def rules_for(self, url: URL) -> R:
        """The rules of the site of `url`; FetchError as `parse` raises."""
        return await self._rules.get(URL.build(scheme=url.scheme, authority=url.raw_authority, encoded=True))

    async def close(self) -> None:
        """Cancels the fetches in progress."""
        await self._rules.close()

    async def _fetch(self, site: URL) -> R:
        budget = Budget(self._config.deadline_s)
        url = site.with_path(self._path)
        try:
            answer = await with_retries(
                lambda: self._transport.follow(url, budget, _always, _anything, _MAX_BYTES, cut=True),
                self._config.retries,
                budget,
            )
        except FetchError as error:
            return self._parse(error)
        return self._parse(answer.body)


async def _always(url: URL) -> None:
    pass


def _anything(headers: object) -> None:
    pass
