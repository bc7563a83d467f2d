"""Fetches whole images, or raises a `FetchError` with the reason."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from types import TracebackType

from multidict import CIMultiDictProxy
from protego import Protego
from yarl import URL

from sdtrain.dataset.config import DownloadConfig
from sdtrain.download.http.connections import user_agent
from sdtrain.download.http.failures import FetchError, failure_of
from sdtrain.download.http.permissions import (
    ROBOTS_PATH,
    TDM_PATH,
    SiteFile,
    check_robots_header,
    check_robots_txt,
    check_tdm_header,
    check_tdm_rules,
    parse_robots_txt,
    parse_tdm_file,
)
from sdtrain.download.http.retry import Budget, with_retries
from sdtrain.download.http.transport import Terms, Transport
from sdtrain.download.http.urls import request_url


@dataclass(frozen=True)
class Fetched:
    """A fetched URL: its whole, unpacked body, and its type in lower case without parameters ("" if none was sent)."""

    body: bytes
    content_type: str


class Fetcher:
    """Fetches images concurrently for one process: `async with Fetcher(config) as fetcher`.

    At most `config.connections` requests run at once. Start more calls of `fetch` than that if many URLs share a host:
    those that wait for their host's turn do not block others.
    """

    def __init__(self, config: DownloadConfig) -> None:
        user_agent(config.contact)  # refuses a contact that cannot be sent before any work
        self._config = config

    async def __aenter__(self) -> Fetcher:
        self._transport = Transport(self._config)
        self._robots: SiteFile[Protego | None] = SiteFile(self._transport, self._config, ROBOTS_PATH, parse_robots_txt)
        self._tdm = SiteFile(self._transport, self._config, TDM_PATH, parse_tdm_file)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for part in (self._robots, self._tdm, self._transport):
            await part.close()

    async def fetch(self, url: str, is_verified: bool = True) -> Fetched:
        """Fetches one URL within `deadline_s` of the time its host may be asked; FetchError says why it failed.

        Without `is_verified`, servers' certificates are not: the caller must prove the bytes.
        """
        try:
            start = request_url(url, self._config.allow_private_hosts)
            budget = Budget(self._config.deadline_s)
            terms = Terms(self._config.max_bytes, self._permit, self._check, is_verified=is_verified)
            attempt = partial(self._transport.follow, start, budget, terms)
            answer = await with_retries(attempt, self._config.retries, budget)
        except FetchError:
            raise
        except Exception as error:
            raise failure_of(error) from error
        if not answer.body:
            raise FetchError("empty_body", "no bytes came")
        content_type = answer.headers.get("Content-Type", "").partition(";")[0].strip().lower()
        return Fetched(answer.body, content_type)

    async def _permit(self, url: URL) -> None:
        if self._config.robots_txt:
            check_robots_txt(await self._robots.rules_for(url), url)
        if self._config.tdm_reservation:
            check_tdm_rules(await self._tdm.rules_for(url), url)

    def _check(self, headers: CIMultiDictProxy[str]) -> None:
        if self._config.robots_header:
            check_robots_header(headers.getall("X-Robots-Tag", ()))
        if self._config.tdm_reservation:
            check_tdm_header(headers.getall("tdm-reservation", ()))
