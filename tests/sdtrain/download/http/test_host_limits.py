"""Manners: how many requests at once, how fast, and the rests that a host asks for."""

import asyncio
import email.utils
import time
from types import SimpleNamespace

import pytest

from sdtrain.download.http import host_limits
from sdtrain.download.http.client import Fetcher
from tests.sdtrain.download.http.hostile_cases import answer, moved
from tests.sdtrain.download.http.web_fixtures import fetch_all, outcome, quick


class Counting:
    """A case that notes how many requests it serves at once."""

    def __init__(self, seconds):
        self.seconds = seconds
        self.now = self.most = 0

    async def __call__(self, visit):
        self.now += 1
        self.most = max(self.most, self.now)
        await asyncio.sleep(self.seconds)
        self.now -= 1
        await visit.answer()


def test_a_host_gets_no_more_requests_at_once_than_allowed_and_a_shard_of_one_host_completes(web, names):
    web.acts["slow"] = counting = Counting(0.02)
    results = fetch_all(quick(connections_per_host=5), [web.url("slow", f"/{number}") for number in range(200)])
    assert {reason for reason, _, _ in results} == {"ok"}
    assert counting.most == 5


def test_requests_in_all_are_limited_too(web, names):
    web.acts["slow"] = counting = Counting(0.02)
    fetch_all(quick(connections=3), [web.url("slow", f"/{number}") for number in range(30)])
    assert counting.most == 3


def test_waiting_for_the_turn_is_no_failure_however_long_it_takes(web, names):
    web.acts["slow"] = Counting(0.1)
    settings = quick(connections_per_host=1, deadline_s=0.5)
    results = fetch_all(settings, [web.url("slow", f"/{number}") for number in range(15)])
    assert {reason for reason, _, _ in results} == {"ok"}
    assert max(seconds for _, _, seconds in results) > 1.4


def test_urls_that_wait_for_a_busy_host_hold_up_no_other(web, names):
    web.acts["slow"] = Counting(0.25)
    names.known["other.example"] = ["127.0.0.2"]
    busy = [web.url("slow", f"/{number}") for number in range(6)]
    other = web.url("ok").replace("hostile", "other")
    results = fetch_all(quick(connections=2, connections_per_host=1), [*busy, other])
    assert results[-1][2] < results[-2][2]


def test_requests_are_evenly_spaced_after_a_burst(monkeypatch):
    now = 100.0

    async def sleep(seconds):
        nonlocal now
        now += seconds

    monkeypatch.setattr(host_limits, "time", SimpleNamespace(monotonic=lambda: now))
    monkeypatch.setattr(host_limits, "asyncio", SimpleNamespace(sleep=sleep, Semaphore=asyncio.Semaphore))

    async def starts():
        host = host_limits.Host(connections=16, requests_s=20, max_cooldowns=1)
        return [await host.may_begin() or now for _ in range(16)]

    assert asyncio.run(starts()) == pytest.approx([100.0] * 5 + [100 + 0.05 * number for number in range(1, 12)])


def test_a_site_gets_its_requests_no_faster_than_that(web, names):
    web.requests.clear()
    began = time.monotonic()
    fetch_all(quick(requests_per_host_s=20), [web.url("ok", f"/spaced/{number}") for number in range(16)])
    assert len([path for _, path, _ in web.requests if path.startswith("/ok/spaced")]) == 16
    assert time.monotonic() - began >= 11 * 0.05


def test_a_rest_that_a_server_asks_for_is_kept_by_all_urls_of_the_host(web, names):
    web.acts["busy"] = lambda visit: (
        visit.answer("Retry-After: 1", status="503 Busy") if visit.number == 1 else visit.answer()
    )

    async def run():
        async with Fetcher(quick()) as fetcher:
            first = asyncio.create_task(outcome(fetcher, web.url("busy", f"/{time.monotonic()}")))
            await asyncio.sleep(0.3)
            second = await outcome(fetcher, web.url("ok", "/after_the_rest"))
            return await first, second

    first, second = asyncio.run(run())
    assert first[0] == second[0] == "ok"
    assert first[2] >= 1
    assert 0.6 < second[2] < 30


def test_a_rest_may_be_a_date(web, names):
    date = email.utils.formatdate(time.time() + 2, usegmt=True)
    web.acts["dated"] = lambda visit: (
        visit.answer(f"Retry-After: {date}", status="429 Slow Down") if visit.number == 1 else visit.answer()
    )
    ((reason, _, seconds),) = fetch_all(quick(), [web.url("dated", f"/{time.monotonic()}")])
    assert reason == "ok"
    assert 0.9 < seconds < 30


def test_a_rest_that_is_too_long_fails_the_urls_of_the_host_without_another_request(web, names):
    web.acts["hour"] = answer("Retry-After: 3600", status="429 Slow Down")

    async def run():
        async with Fetcher(quick(retries=5)) as fetcher:
            first = await outcome(fetcher, web.url("hour", "/1"))
            others = await asyncio.gather(*(outcome(fetcher, web.url("ok", f"/hour/{number}")) for number in range(20)))
            return [first, *others]

    web.asked.clear()
    results = asyncio.run(run())
    assert {reason for reason, _, _ in results} == {"http_429"}
    assert len({str(error) for _, error, _ in results}) == 1
    assert web.asked.total() == 1
    assert max(seconds for _, _, seconds in results) < 60


def test_a_host_that_never_stops_asking_for_rests_does_not_hold_up_the_shard(web, names):
    web.acts["never"] = answer("Retry-After: 1", status="429 Slow Down")
    web.asked.clear()
    urls = [web.url("never", f"/{number}") for number in range(100)]
    results = fetch_all(quick(retries=1, connections_per_host=4), urls)
    assert {reason for reason, _, _ in results} == {"http_429"}
    assert max(seconds for _, _, seconds in results) < 20
    assert web.asked.total() < 20


def test_a_host_to_which_no_connection_comes_about_is_given_up(web, names, monkeypatch):
    tried = []
    monkeypatch.setattr("sdtrain.download.http.connections.is_public", lambda address: not tried.append(address))
    urls = [f"http://hostile.example:1/{number}" for number in range(100)]
    results = fetch_all(quick(connections_per_host=4, retries=0), urls)
    assert {str(error) for _, error, _ in results} == {"connection_failed: Connection refused"}
    assert len(tried) < 15


def test_each_redirect_waits_for_the_turn_of_its_own_host(web, names):
    names.known["other.example"] = ["127.0.0.2"]
    web.acts["there"] = moved("http://other.example:{port}/back")
    web.acts["back"] = moved("http://hostile.example:{port}/ok")
    settings = quick(connections_per_host=1, connections=1)
    results = fetch_all(settings, [web.url("there", f"/{number}") for number in range(10)])
    assert {reason for reason, _, _ in results} == {"ok"}
