"""robots.txt: fetched once a site, through the same guards, and what a missing or broken one means."""

import pytest

from tests.sdtrain.download.http.hostile_cases import answer, drip_body, moved
from tests.sdtrain.download.http.web_fixtures import fetch_all, quick

ASKED = {"robots_txt": True, "retries": 0}


def rules(*lines):
    return answer("Content-Type: text/plain", body="\n".join(lines).encode())


@pytest.fixture(autouse=True)
def fresh(web):
    web.asked.clear()
    yield
    web.acts.clear()


def reasons(web, *paths, **settings):
    return [reason for reason, _, _ in fetch_all(quick(**(ASKED | settings)), [web.url("ok", path) for path in paths])]


@pytest.mark.parametrize(
    ("lines", "allowed"),
    [
        (["User-agent: *", "Disallow: /"], False),
        (["User-agent: *", "Disallow: /ok/private", "Allow: /"], True),
        (["User-agent: *", "Disallow: /*.jpg$"], False),
        (["User-agent: sdtrain", "Disallow: /"], False),
        (["User-agent: img2dataset", "Disallow: /"], False),
        (["User-agent: otherbot", "Disallow: /"], True),
        (["User-agent: *", "Disallow: /", "", "User-agent: sdtrain", "User-agent: img2dataset", "Allow: /"], True),
        (["\ufeffUser-agent: *", "Disallow: /"], False),
        (["<html>", "no rules", "\x00\xff"], True),
        ([], True),
    ],
)
def test_rules_are_kept(web, names, lines, allowed):
    web.acts["robots.txt"] = rules(*lines)
    assert reasons(web, "/a.jpg") == ["ok" if allowed else "robots_txt"]
    assert web.asked["/ok/a.jpg"] == allowed


def test_they_are_asked_for_once_a_site(web, names):
    web.acts["robots.txt"] = rules("User-agent: *", "Disallow: /ok/7")
    got = reasons(web, *(f"/{number}" for number in range(30)))
    assert got == ["ok" if number != 7 else "robots_txt" for number in range(30)]
    assert web.asked["/robots.txt"] == 1
    fetch_all(quick(**ASKED), [web.url("ok"), web.url("ok", scheme="https")])
    assert web.asked["/robots.txt"] == 3


@pytest.mark.parametrize(
    ("act", "reason"),
    [
        (answer(status="404 Not Found"), "ok"),
        (answer(status="403 Forbidden"), "ok"),
        (answer(status="500 Oops"), "robots_txt"),
        (answer("Content-Encoding: br"), "robots_txt"),
        (moved("/robots.txt"), "ok"),
        (moved("http://private.example/robots.txt"), "ok"),
        (moved("/rules"), "robots_txt"),
        (drip_body, "timeout"),
    ],
)
def test_rules_that_cannot_be_had(web, names, act, reason):
    web.acts |= {"robots.txt": act, "rules": rules("User-agent: *", "Disallow: /")}
    assert reasons(web, "/a.jpg", deadline_s=0.5) == [reason]


def test_a_site_that_is_not_there_keeps_its_own_reason(web, names):
    results = fetch_all(quick(**ASKED), ["http://gone.example/a.jpg", "http://hostile.example:1/a.jpg"])
    assert [reason for reason, _, _ in results] == ["dns_failed", "connection_failed"]


def test_what_comes_after_500_kib_is_left_off(web, names):
    padding = ["# " + "x" * 1021] * 500
    web.acts["robots.txt"] = rules("User-agent: *", "Disallow: /ok/early", *padding, "Disallow: /ok/late")
    assert reasons(web, "/early", "/late") == ["robots_txt", "ok"]


def test_every_hop_of_a_redirect_is_asked_about(web, names):
    web.acts |= {"robots.txt": rules("User-agent: *", "Disallow: /ok/private"), "there": moved("/ok/private")}
    assert [reason for reason, _, _ in fetch_all(quick(**ASKED), [web.url("there")])] == ["robots_txt"]
    assert web.asked["/ok/private"] == 0


def test_nobody_asks_for_them_unless_told(web, names):
    web.acts["robots.txt"] = rules("User-agent: *", "Disallow: /")
    assert reasons(web, "/a.jpg", robots_txt=False) == ["ok"]
    assert web.asked["/robots.txt"] == 0
