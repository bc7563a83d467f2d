"""How many files a process may open, and what the pool keeps open."""

import asyncio
import resource

from sdtrain.download.http.client import Fetcher
from sdtrain.download.http.connections import raise_file_limit
from tests.sdtrain.download.http.hostile_cases import BODY
from tests.sdtrain.download.http.web_fixtures import quick


def test_the_soft_limit_is_raised_as_far_as_the_hard_one():
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (100, before[1]))
        assert raise_file_limit(150) == 150
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (150, before[1])
        assert raise_file_limit(120) == 150
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_connections_are_closed_where_enough_are_kept_open(web, names, monkeypatch):
    monkeypatch.setattr("sdtrain.download.http.connections._KEPT_HOSTS", 2)
    names.known |= {f"h{number}.example": ["127.0.0.2"] for number in range(4)}

    async def run():
        async with Fetcher(quick()) as fetcher:
            for number in [0, 1, 2, 3, 0]:
                url = web.url("ok", "/kept").replace("hostile", f"h{number}")
                assert (await fetcher.fetch(url)).body == BODY

    web.requests.clear()
    asyncio.run(run())
    assert [b"Connection: close" in head for _, _, head in web.requests] == [False, False, True, True, False]
