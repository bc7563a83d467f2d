"""URLs as they go over the wire."""

import pytest

from sdtrain.download.http.failures import FetchError
from sdtrain.download.http.urls import redirect_url, request_url
from tests.sdtrain.download.http.web_fixtures import fetch_all, quick

SENT = [
    ("http://h.example/a b.jpg", "http://h.example/a%20b.jpg"),
    ("  http://h.example/a.jpg\n", "http://h.example/a.jpg"),
    ("http://h.example/a\n\tb.jpg", "http://h.example/ab.jpg"),
    ("http://h.example/ä/ö.jpg?ü=ß", "http://h.example/%C3%A4/%C3%B6.jpg?%C3%BC=%C3%9F"),
    ("http://h.example/a%2Fb%20c%c3%a4.jpg", "http://h.example/a%2Fb%20c%c3%a4.jpg"),
    ("http://h.example/a+b%2Bc.jpg?x=1+2%2B3", "http://h.example/a+b%2Bc.jpg?x=1+2%2B3"),
    ("http://h.example/100%.jpg", "http://h.example/100%.jpg"),
    ("http://h.example/[a]{b}|c.jpg", "http://h.example/[a]%7Bb%7D|c.jpg"),
    ('http://h.example/"<a>".jpg', "http://h.example/%22%3Ca%3E%22.jpg"),
    ("http://h.example/a.jpg#part?x", "http://h.example/a.jpg"),
    ("http://h.example/a,b;c=d!e'(f)*.jpg", "http://h.example/a,b;c=d!e'(f)*.jpg"),
    ("http://h.example", "http://h.example/"),
    ("http://h.example?x=1", "http://h.example/?x=1"),
    ("http://h.example//a//b.jpg", "http://h.example//a//b.jpg"),
    ("HTTP://H.Example:80/A.jpg", "http://h.example/A.jpg"),
    ("https://h.example:443/a.jpg", "https://h.example/a.jpg"),
    ("http://h.example:443/a.jpg", "http://h.example:443/a.jpg"),
    ("http://h.example./a.jpg", "http://h.example/a.jpg"),
    (r"http:\\h.example\a\b.jpg?c\d", "http://h.example/a/b.jpg?c%5Cd"),
    ("http://müller.example/a.jpg", "http://xn--mller-kva.example/a.jpg"),
    ("http://MÜLLER.example/a.jpg", "http://xn--mller-kva.example/a.jpg"),
    ("http://例え.テスト/a.jpg", "http://xn--r8jz45g.xn--zckzah/a.jpg"),
    ("http://h%2Eexample/a.jpg", "http://h.example/a.jpg"),
    ("http://under_score.h.example/a.jpg", "http://under_score.h.example/a.jpg"),
    ("http://134744072/a.jpg", "http://8.8.8.8/a.jpg"),
    ("http://[2606:4700:0::1111]/a.jpg", "http://[2606:4700::1111]/a.jpg"),
    ("http://h.example/\x00\x7f.jpg", "http://h.example/%00%7F.jpg"),
]


@pytest.mark.parametrize(("url", "sent"), SENT)
def test_urls_are_sent_as_browsers_send_them(url, sent):
    assert str(request_url(url, allow_private=False)) == sent
    assert str(request_url(sent, allow_private=False)) == sent


@pytest.mark.parametrize(
    ("location", "target"),
    [
        ("b.jpg", "http://h.example/a/b.jpg"),
        ("../b.jpg", "http://h.example/b.jpg"),
        ("//o.example/b.jpg", "http://o.example/b.jpg"),
        ("?x=1", "http://h.example/a/a.jpg?x=1"),
        ("/b\udce4 c.jpg", "http://h.example/b%E4%20c.jpg"),
        (r"\\o.example\b", "http://o.example/b"),
        ("", "http://h.example/a/a.jpg"),
    ],
)
def test_redirects_are_followed_as_browsers_follow_them(location, target):
    base = request_url("http://h.example/a/a.jpg", allow_private=False)
    assert str(redirect_url(base, location, allow_private=False)) == target


@pytest.mark.parametrize(
    "host", ["a b", "a..b", ".", "-\u200d", "a%zz", "a%00b", "a<b", "a" * 64, ".".join(["a"] * 200)]
)
def test_what_is_no_host_name_is_refused(host):
    with pytest.raises(FetchError, match=r"^url_not_allowed: malformed$"):
        request_url(f"http://{host}/", allow_private=True)


def test_the_server_sees_exactly_that(web, names):
    paths = ["/ok/a%2Fb+c%2B%c3%a4.jpg?q=a+b%20c&d=%7e", "/ok/100%.jpg", "/ok//[x].jpg"]
    port = web.ports["plain"]
    fetch_all(quick(), [f"http://hostile.example:{port}{path}" for path in paths])
    fetch_all(quick(), [f"http://müller.example:{port}/ok/ä b.jpg#x"])
    for path in [*paths, "/ok/%C3%A4%20b.jpg"]:
        assert web.asked[path], path
    assert any(f"Host: xn--mller-kva.example:{port}\r\n".encode() in head for _, _, head in web.requests)
