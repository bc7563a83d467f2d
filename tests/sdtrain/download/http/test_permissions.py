"""What sites permit: every spelling of a header, and files that are fetched once a site through the same guards."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from protego import Protego

from sdtrain.download.http.failures import FetchError
from sdtrain.download.http.permissions import TdmRule, check_robots_header, check_tdm_header, parse_tdm_file
from tests.sdtrain.download.http.hostile_cases import answer, drip_body, moved
from tests.sdtrain.download.http.web_fixtures import fetch_all, quick

FORBIDDEN = [
    ["noai"],
    ["NoImageAI"],
    ["all, noindex"],
    [" nofollow ,noimageindex "],
    ["none"],
    ["nofollow", "noai"],
    ["sdtrain: noai"],
    ["SDTrain:noai"],
    ["img2dataset: noai"],
    ["*: noai"],
    ["otherbot: nofollow, sdtrain: noindex"],
    ["otherbot: nofollow", "noindex"],
    ["unavailable_after: Sat, 25 Jun 2050 15:00:00 GMT, noai"],
    ["max-snippet: 20, max-image-preview:large, noai"],
    ["sdtrain: max-snippet: 20, noai"],
]
ALLOWED = [
    [],
    [""],
    ["all"],
    ["nofollow, noarchive, nosnippet, noindexer"],
    ["otherbot: noai"],
    ["otherbot: nofollow, noai"],
    ["sdtrain: all, otherbot: noai"],
    ["otherbot: max-snippet: 20, noai"],
    ["unavailable_after: 25 Jun 2050 15:00:00 noindex"],
    [":", ",,,", "::noai:", "a:b:noai"],
]


@pytest.mark.parametrize("values", FORBIDDEN)
def test_robots_headers_that_forbid_the_image(values):
    with pytest.raises(FetchError, match=r"^robots_header: X-Robots-Tag: no"):
        check_robots_header(values)


@pytest.mark.parametrize("values", ALLOWED)
def test_robots_headers_that_allow_the_image(values):
    check_robots_header(values)


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
def test_rules_of_robots_txt_are_kept(web, names, lines, allowed):
    web.acts["robots.txt"] = rules(*lines)
    assert reasons(web, "/a.jpg") == ["ok" if allowed else "robots_txt"]
    assert web.asked["/ok/a.jpg"] == allowed


def test_robots_txt_is_asked_for_once_a_site(web, names):
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


def test_nobody_asks_for_robots_txt_unless_told(web, names):
    web.acts["robots.txt"] = rules("User-agent: *", "Disallow: /")
    assert reasons(web, "/a.jpg", robots_txt=False) == ["ok"]
    assert web.asked["/robots.txt"] == 0


RESERVED = {"location": "/ok/mine/", "tdm-reservation": 1}
FREE = {"location": "/ok/mine/free/*.jpg", "tdm-reservation": 0}


@pytest.mark.parametrize(
    ("file", "path", "reserved"),
    [
        ([RESERVED], "/mine/a.jpg", True),
        ([RESERVED], "/yours/a.jpg", False),
        ([FREE, RESERVED], "/mine/free/a.jpg", False),
        ([RESERVED, FREE], "/mine/free/a.jpg", True),
        ([RESERVED | {"tdm-policy": "https://h.example/p.json"}], "/mine/a.jpg", True),
        ([RESERVED | {"tdm-reservation": "1"}], "/mine/a.jpg", True),
        ([RESERVED | {"tdm-reservation": 2}], "/mine/a.jpg", False),
        (RESERVED, "/mine/a.jpg", True),
        ([None, 3, {"location": 5}, RESERVED], "/mine/a.jpg", True),
        ([{"location": "/", "tdm-reservation": 1}], "/a.jpg?x=1", True),
    ],
)
def test_the_first_tdm_rule_that_matches_counts(web, names, file, path, reserved):
    web.acts[".well-known"] = answer(body=json.dumps(file).encode())
    web.asked.clear()
    results = fetch_all(quick(tdm_reservation=True), [web.url("ok", path), web.url("ok", path)])
    assert [reason for reason, _, _ in results] == ["tdm_reserved" if reserved else "ok"] * 2
    assert web.asked["/.well-known/tdmrep.json"] == 1
    assert bool(web.asked[f"/ok{path}"]) is not reserved


@pytest.mark.parametrize("file", [b"", b"no JSON", b"[" * 100_000, b"\xff\xfe", FetchError("http_404", "Not Found")])
def test_a_tdm_file_that_says_nothing_reserves_nothing(file):
    assert list(parse_tdm_file(file)) == []


@pytest.mark.parametrize(("values", "reserved"), [(["1"], True), (["0", " 1 "], True), (["0"], False), ([], False)])
def test_tdm_headers(values, reserved):
    if reserved:
        with pytest.raises(FetchError, match=r"^tdm_reserved"):
            check_tdm_header(values)
    else:
        check_tdm_header(values)


@given(st.text(st.sampled_from("/ab*.2"), max_size=8), st.booleans(), st.text(st.sampled_from("/ab.2"), max_size=10))
def test_tdm_patterns_match_as_those_of_robots_txt(pattern, to_the_end, path):
    pattern = f"/{pattern}" + "$" * to_the_end
    rule = TdmRule.parse({"location": pattern, "tdm-reservation": 1})
    oracle = Protego.parse(f"User-agent: *\nDisallow: {pattern}")
    if not path.startswith("/"):  # which protego reads as a host
        assert rule.matches(f"/{path}") is not oracle.can_fetch(f"http://h.example/{path}", "x"), pattern


def test_escapes_do_not_hide_a_path():
    rule = TdmRule.parse({"location": "/%61%2fb ä", "tdm-reservation": 1})
    assert rule.matches("/a%2Fb%20%C3%A4")
    assert not rule.matches("/a/b%20%C3%A4")


def test_no_pattern_takes_long():
    rule = TdmRule.parse({"location": "/" + "*a" * 500 + "b", "tdm-reservation": 1})
    assert not rule.matches("/" + "a" * 100_000)
