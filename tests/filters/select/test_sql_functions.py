"""Which URLs may be fetched: Python and SQL say the same."""

import duckdb
import pytest

from filters.select.sql_functions import allowed_sql, register_url_check
from sdtrain.dataset.addresses import is_public, why_not_allowed

FINE = [
    "https://example.com/a.jpg",
    "HTTP://Example.COM/a.jpg",
    "http://i.example.co.uk:8080/a b.jpg?x=1#y",
    "https://example.com",
    "http://8.8.8.8/a.jpg",
    "http://[2606:4700::1111]/a.jpg",
    "https://müller.example/ä.jpg",
    "http://1.2.3.4.example.com/",
    "http://example.com/line\nbreak.jpg",
]
REFUSED = [
    ("ftp://example.com/a.jpg", "scheme"),
    ("file:///etc/passwd", "scheme"),
    ("data:image/png;base64,AAAA", "scheme"),
    ("//example.com/a.jpg", "scheme"),
    ("example.com/a.jpg", "scheme"),
    ("http:///a.jpg", "malformed"),
    ("http://[::1/", "malformed"),
    ("http://example.com:99999/", "malformed"),
    ("http://me@example.com/", "userinfo"),
    ("http://example.com@127.0.0.1/", "userinfo"),
    ("http://example.com:22/", "port"),
    ("http://example.com:0/", "port"),
]
PRIVATE = [
    "http://127.0.0.1:8000/a.jpg",
    "http://127.1/a.jpg",
    "http://2130706433/a.jpg",
    "http://0x7f000001/a.jpg",
    "http://0x7f.1/a.jpg",
    "http://017700000001/a.jpg",
    "http://0/a.jpg",
    "http://10.0.0.1/a.jpg",
    "http://172.31.255.255/a.jpg",
    "http://192.168.1.1/a.jpg",
    "http://169.254.169.254/latest/meta-data",
    "http://100.64.0.1/a.jpg",
    "http://224.0.0.1/a.jpg",
    "http://[::1]/a.jpg",
    "http://[::]/a.jpg",
    "http://[::ffff:127.0.0.1]/a.jpg",
    "http://[64:ff9b::10.0.0.1]/a.jpg",
    "http://[2002:7f00:1::]/a.jpg",
    "http://[fe80::1]/a.jpg",
    "http://[fd00::1]/a.jpg",
    "http://localhost/a.jpg",
    "http://LOCALHOST./a.jpg",
    "http://printer.local/a.jpg",
    "http://metadata.google.internal/a.jpg",
]


@pytest.mark.parametrize("url", FINE)
def test_public_web_addresses_are_allowed(url):
    assert why_not_allowed(url, allow_private=False) is None


@pytest.mark.parametrize(("url", "why"), REFUSED)
def test_what_is_no_plain_web_address_is_refused_even_for_private_hosts(url, why):
    assert why_not_allowed(url, allow_private=False) == why_not_allowed(url, allow_private=True) == why


@pytest.mark.parametrize("url", PRIVATE)
def test_private_hosts_are_refused_in_any_spelling_unless_allowed(url):
    assert why_not_allowed(url, allow_private=False) == "private_host"
    assert why_not_allowed(url, allow_private=True) is None


@pytest.mark.parametrize("allow_private", [False, True])
def test_sql_agrees_with_python(allow_private):
    urls = [
        *FINE,
        *(url for url, _ in REFUSED),
        *PRIVATE,
        "http://com/",
        "http://a.local:80/",
        "https://x.com\n@127.0.0.1",
    ]
    with duckdb.connect() as connection:
        register_url_check(connection, allow_private)
        for url in urls:
            row = connection.execute(f"SELECT {allowed_sql('url')} FROM (SELECT ? AS url)", [url]).fetchone()
            assert row == (why_not_allowed(url, allow_private) is None,), url


@pytest.mark.parametrize(
    "address", ["::ffff:192.168.0.1", "::127.0.0.1", "64:ff9b:1::a00:1", "fec0::1", "255.255.255.255"]
)
def test_addresses_that_hide_private_ones_are_not_public(address):
    assert not is_public(address)


@pytest.mark.parametrize("address", ["1.1.1.1", "2606:4700::1111", "64:ff9b::808:808", "::ffff:8.8.8.8"])
def test_public_addresses_are_public(address):
    assert is_public(address)
