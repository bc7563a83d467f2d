"""Fetching from a hostile web: each case ends in its own reason, none hangs, none reaches a private address."""

import asyncio
import gzip
import ssl
import tracemalloc
from collections import Counter

import pytest

from sdtrain.download.http.client import Fetcher
from sdtrain.download.http.failures import MEANINGS, FetchError
from sdtrain.errors import UserError
from tests.sdtrain.download.http.hostile_cases import BAD_URLS, BODY, CASES, TLS_CASES, answer, chunked, raw
from tests.sdtrain.download.http.web_fixtures import Names, fetch_all, outcome, quick

# It keeps a processor busy until its deadline, and would make the others late.
ALONE = {"flood_of_hints"}
EXPECTED = (
    {name: case.reason for name, case in CASES.items() if name not in ALONE}
    | TLS_CASES
    | {name: reason for name, (_, reason) in BAD_URLS.items()}
)


def url_of(web, name):
    return BAD_URLS[name][0] if name in BAD_URLS else web.url(name)


def config_for(name, **settings):
    options = CASES[name].settings if name in CASES else ()
    return quick(**dict.fromkeys(options, True), **settings)


@pytest.fixture(scope="module")
def outcomes(web):
    """Two runs over all cases at once."""

    async def run():
        async with asyncio.TaskGroup() as group:
            tasks = {}
            for name in EXPECTED:
                tasks[name] = group.create_task(one(name))
                # Server and clients share two cores with other tests: all in one instant would time out in the queue.
                await asyncio.sleep(0.005)
        return {name: task.result() for name, task in tasks.items()}

    async def one(name):
        return await outcome(fetchers[bool(name in CASES and CASES[name].settings)], url_of(web, name))

    fetchers = {}

    async def main():
        limits = {"timeout_s": 1.5, "deadline_s": 3}
        async with Fetcher(quick(**limits)) as plain, Fetcher(quick(tdm_reservation=True, **limits)) as careful:
            fetchers.update({False: plain, True: careful})
            return [await run(), await run()]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("socket.getaddrinfo", Names().getaddrinfo)
        web.asked.clear()
        first, second = asyncio.run(main())
    return first, second


def test_there_are_enough_cases():
    assert len(EXPECTED) >= 100


@pytest.mark.parametrize("name", EXPECTED)
def test_each_case_ends_in_its_own_reason(outcomes, name):
    reason, result, seconds = outcomes[0][name]
    assert reason == (EXPECTED[name] or "ok"), result
    if reason == "ok":
        assert result.body == BODY
    else:
        assert str(result).startswith(f"{reason}: ")
        assert reason in MEANINGS or reason == f"http_{int(reason[5:])}"
    assert seconds < 30


def test_counts_add_up(outcomes):
    counted = Counter(reason for reason, _, _ in outcomes[0].values())
    assert counted == Counter(reason or "ok" for reason in EXPECTED.values())
    assert counted.total() == len(EXPECTED)


def test_a_failure_has_the_same_words_every_time(outcomes):
    # Those that are one-off are good the second time round.
    words = [{name: str(result) for name, (reason, result, _) in run.items() if reason != "ok"} for run in outcomes]
    assert words[0] == words[1]


def test_the_type_is_told_in_lower_case_and_without_parameters(outcomes):
    assert outcomes[0]["ok"][1].content_type == "image/jpeg"
    assert outcomes[0]["ok_chunked"][1].content_type == ""


def test_what_comes_too_slowly_stops_at_the_deadline_whatever_the_retries(web, names):
    drips = ["drip_body", "drip_chunks", "drip_headers", "drip_one_header"]
    urls = [web.url(name, scheme=scheme) for name in drips for scheme in ("http", "https")]
    # A busy server may be silent for longer than the usual `timeout_s`: here only the deadline may end a fetch.
    for reason, _, seconds in fetch_all(quick(timeout_s=60, deadline_s=1.5, retries=100), urls):
        assert reason == "timeout"
        assert 1.4 < seconds < 60  # all attempts would take 150


def test_interim_answers_without_end_stop_at_the_deadline(web, names):
    ((reason, _, seconds),) = fetch_all(quick(deadline_s=1), [web.url("flood_of_hints")])
    assert reason == "timeout"
    assert seconds < 30


def test_retries_end_with_the_deadline(web, names):
    ((reason, _, seconds),) = fetch_all(quick(deadline_s=1, retries=1000), [web.url("http_500")])
    assert reason == "http_500"
    assert seconds < 30


def test_only_what_may_pass_is_asked_for_again(web, names):
    once, again = ["http_404", "silent", "robots_noai", "gzip_damaged"], ["http_500", "cut_length"]
    fetch_all(quick(retries=2, deadline_s=10), [web.url(name, "/again") for name in once + again])
    assert {name: web.asked[f"/{name}/again"] for name in once} == dict.fromkeys(once, 1)
    assert {name: web.asked[f"/{name}/again"] for name in again} == dict.fromkeys(again, 3)


def test_neither_bombs_nor_floods_fill_the_memory(web, names):
    tracemalloc.start()
    results = fetch_all(quick(max_bytes=1 << 20, retries=0), [web.url("gzip_bomb"), web.url("flood")])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [reason for reason, _, _ in results] == ["too_large"] * 2
    assert peak < 16 << 20


@pytest.mark.parametrize("over", [0, 1])
def test_the_limit_is_exact_however_the_body_is_sent(web, names, over):
    body = bytes(1000 + over)
    web.acts |= {
        "told": answer(body=body),
        "chunks": raw(chunked(body), b"0\r\n\r\n"),
        "packed": answer("Content-Encoding: gzip", body=gzip.compress(body)),
        "stored": answer("Content-Encoding: gzip", body=gzip.compress(body, 0)),
    }
    names_of = ["told", "chunks", "packed"] + (["stored"] if over else [])
    results = fetch_all(quick(max_bytes=1000), [web.url(name) for name in names_of])
    assert {reason for reason, _, _ in results} == {"too_large" if over else "ok"}


def test_opt_out_headers_are_ignored_where_the_settings_say_so(web, names):
    urls = [web.url(name) for name in CASES if name.startswith(("robots_", "tdm_"))]
    assert {reason for reason, _, _ in fetch_all(quick(robots_header=False), urls)} == {"ok"}


def test_the_user_agent_is_honest_and_gives_the_contact(web, names):
    contact = "https://example.org/crawler"
    fetch_all(quick(contact=contact), [web.url("ok", "/who")])
    head = next(head for _, path, head in web.requests if path == "/ok/who").decode()
    assert f"User-Agent: sdtrain/0.1.0 (+{contact})\r\n" in head
    assert "Accept-Encoding: identity\r\n" in head
    assert "Cookie" not in head


@pytest.mark.parametrize("contact", ["a\r\nX-Evil: 1", "ä", "(", "x\\"])
def test_a_contact_that_cannot_be_sent_is_a_sentence(contact):
    with pytest.raises(UserError, match=r"download\.contact is .*plain ASCII"):
        Fetcher(quick(contact=contact))


def test_proxies_of_the_environment_are_not_used(web, names, monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    assert fetch_all(quick(), [web.url("ok"), web.url("tls_ok")])[0][0] == "ok"


def test_private_hosts_are_fetched_from_where_the_settings_allow_it(web, names):
    names.known["private.example"] = ["127.0.0.2"]
    urls = [web.url("ok").replace("hostile.example", host) for host in ("127.0.0.2", "private.example", "2130706434")]
    assert [reason for reason, _, _ in fetch_all(quick(allow_private_hosts=True), urls)] == ["ok"] * 3


def test_one_tls_context_serves_all_and_connections_are_kept(web, names, monkeypatch):
    made, real = [], ssl.create_default_context

    def counting(*args, **options):
        made.append(1)
        return real(*args, **options)

    monkeypatch.setattr(ssl, "create_default_context", counting)
    opened = []
    monkeypatch.setattr("sdtrain.download.http.connections.is_public", lambda address: not opened.append(address))

    async def run():
        async with Fetcher(quick()) as fetcher:
            for number in range(5):
                await fetcher.fetch(web.url("tls_ok", f"/{number}"))

    asyncio.run(run())
    assert (len(made), len(opened)) == (1, 1)


def test_a_fetch_that_is_cancelled_ends_at_once_and_says_so(web, names):
    async def run():
        async with Fetcher(quick(deadline_s=30, timeout_s=30)) as fetcher:
            task = asyncio.create_task(fetcher.fetch(web.url("silent")))
            await asyncio.sleep(0.1)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

    asyncio.run(asyncio.wait_for(run(), 2))


def test_what_nobody_foresaw_is_a_failure_of_the_url_and_is_logged(web, names, monkeypatch, caplog):
    def broken(*args):
        raise KeyError("a bug")

    monkeypatch.setattr("sdtrain.download.http.client.check_robots_header", broken)
    ((reason, error, _),) = fetch_all(quick(), [web.url("ok")])
    assert reason == "invalid_answer"
    assert isinstance(error, FetchError)
    assert "a bug" in caplog.text
