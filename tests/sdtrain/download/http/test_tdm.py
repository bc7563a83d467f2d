"""TDMRep: headers and tdmrep.json; its patterns against protego, which knows the same ones from robots.txt."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from protego import Protego

from sdtrain.download.http.failures import FetchError
from sdtrain.download.http.tdm import TdmRule, check_tdm_header, parse_tdm_file
from tests.sdtrain.download.http.hostile_cases import answer
from tests.sdtrain.download.http.web_fixtures import fetch_all, quick

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
def test_the_first_rule_that_matches_counts(web, names, file, path, reserved):
    web.acts[".well-known"] = answer(body=json.dumps(file).encode())
    web.asked.clear()
    results = fetch_all(quick(tdm_reservation=True), [web.url("ok", path), web.url("ok", path)])
    assert [reason for reason, _, _ in results] == ["tdm_reserved" if reserved else "ok"] * 2
    assert web.asked["/.well-known/tdmrep.json"] == 1
    assert bool(web.asked[f"/ok{path}"]) is not reserved


@pytest.mark.parametrize("file", [b"", b"no JSON", b"[" * 100_000, b"\xff\xfe", FetchError("http_404", "Not Found")])
def test_a_file_that_says_nothing_reserves_nothing(file):
    assert list(parse_tdm_file(file)) == []


@pytest.mark.parametrize(("values", "reserved"), [(["1"], True), (["0", " 1 "], True), (["0"], False), ([], False)])
def test_headers(values, reserved):
    if reserved:
        with pytest.raises(FetchError, match=r"^tdm_reserved"):
            check_tdm_header(values)
    else:
        check_tdm_header(values)


@given(st.text(st.sampled_from("/ab*.2"), max_size=8), st.booleans(), st.text(st.sampled_from("/ab.2"), max_size=10))
def test_patterns_match_as_those_of_robots_txt(pattern, to_the_end, path):
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
