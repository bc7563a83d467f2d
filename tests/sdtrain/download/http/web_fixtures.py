"""What the tests of the web client share: names, limits that suit tests, and many fetches at once."""

from __future__ import annotations

import asyncio
import socket
import time
from collections import Counter

from sdtrain.dataset.config import DownloadConfig
from sdtrain.download.http.client import Fetcher
from sdtrain.download.http.failures import FetchError

PUBLIC = "127.0.0.2"
NAMES = {
    "hostile.example": [PUBLIC],
    "private.example": ["10.0.0.8"],
    "half.example": ["93.184.216.34", "10.0.0.8"],
    "xn--mller-kva.example": [PUBLIC],
}


class Names:
    """Stands in for the name servers: what they know, what they were asked, and how long they take."""

    def __init__(self):
        self.known = dict(NAMES)
        self.asked = Counter()
        self.delay_s = {"dead-name-server.example": 1.5}

    def getaddrinfo(self, host, port, *args, **options):
        self.asked[host] += 1
        time.sleep(self.delay_s.get(host, 0))
        if host not in self.known:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port or 0)) for address in self.known[host]]


def quick(**settings):
    """Limits that suit tests."""
    limits = {"timeout_s": 0.7, "deadline_s": 2, "retries": 1, "max_bytes": 1 << 22}
    manners = {"connections": 200, "connections_per_host": 200, "requests_per_host_s": 2000}
    return DownloadConfig(**(limits | manners | settings))


async def outcome(fetcher, url):
    """What `fetch` gives: ("ok", answer, seconds) or (reason, error, seconds)."""
    started = time.monotonic()
    try:
        fetched = await fetcher.fetch(url)
    except FetchError as error:
        return error.reason, error, time.monotonic() - started
    return "ok", fetched, time.monotonic() - started


def fetch_all(config, urls):
    """The outcomes of all URLs, fetched at the same time by one `Fetcher`."""

    async def run():
        async with Fetcher(config) as fetcher:
            return await asyncio.gather(*(outcome(fetcher, url) for url in urls))

    return asyncio.run(run())
