"""Names to addresses: looked up once, judged as a whole, and pinned."""

import asyncio
import socket
import threading
import time

from sdtrain.download.http.client import Fetcher
from sdtrain.download.http.dns import Resolver
from tests.sdtrain.download.http.web_fixtures import fetch_all, quick


def test_a_name_is_looked_up_once_for_all_who_ask(web, names):
    names.delay_s["hostile.example"] = 0.2
    results = fetch_all(quick(), [web.url("ok", f"/{number}") for number in range(50)])
    assert {reason for reason, _, _ in results} == {"ok"}
    assert names.asked["hostile.example"] == 1


def test_an_unknown_name_is_looked_up_once_and_not_tried_again(web, names):
    results = fetch_all(quick(retries=5), [f"http://gone.example/{number}.jpg" for number in range(20)])
    assert {str(error) for _, error, _ in results} == {"dns_failed: the name is not known"}
    assert names.asked["gone.example"] == 1


def test_slow_names_do_not_hold_up_others(web, names):
    names.delay_s |= {f"slow{number}.example": 0.6 for number in range(40)}
    urls = [f"http://slow{number}.example/" for number in range(40)] + [web.url("ok")]
    results = fetch_all(quick(timeout_s=0.5), urls)
    assert {str(error) for _, error, _ in results[:-1]} == {"dns_failed: no name server answers"}
    assert results[-1][0] == "ok"
    assert results[-1][2] < min(seconds for _, _, seconds in results[:-1])
    assert max(seconds for _, _, seconds in results) < 10  # one after the other they would take 20


def test_a_name_server_that_changes_its_answer_gains_nothing(web, names):
    async def run():
        async with Fetcher(quick()) as fetcher:
            await fetcher.fetch(web.url("http_1_0_first").replace("http_1_0_first", "ok_http_1_0"))
            names.known["hostile.example"] = ["127.0.0.1"]
            return await fetcher.fetch(web.url("ok_http_1_0", "/again"))  # over a new connection

    assert asyncio.run(run()).body
    assert names.asked["hostile.example"] == 1


def test_the_socket_refuses_what_got_past_the_resolver(web, names, monkeypatch):
    monkeypatch.setattr("sdtrain.download.http.dns.is_public", lambda address: True)
    ((reason, error, _),) = fetch_all(quick(), ["http://private.example/a.jpg"])
    assert (reason, str(error)) == ("blocked_address", "blocked_address: the address is private or reserved")


def test_a_temporary_failure_is_tried_again_when_it_may_be_over(names, monkeypatch):
    def busy(host, *args, **options):
        raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")

    monkeypatch.setattr(socket, "getaddrinfo", busy)
    ((reason, error, _),) = fetch_all(quick(), ["http://some.example/a.jpg"])
    assert (reason, error.transient) == ("dns_failed", True)


def test_closing_does_not_wait_for_a_look_up_under_way(names):
    names.delay_s["slow.example"] = 3

    async def run():
        resolver = Resolver(allow_private=False, timeout_s=5)
        waiting = asyncio.create_task(resolver.resolve("slow.example"))
        await asyncio.sleep(0.1)
        await resolver.close()
        await asyncio.gather(waiting, return_exceptions=True)

    started = time.monotonic()
    asyncio.run(run())
    assert time.monotonic() - started < 3
    assert all(thread.daemon for thread in threading.enumerate() if thread.name.startswith("dns-"))
