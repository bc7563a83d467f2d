"""Fetching through proxies: what they may see, what is still refused here, and who learns their logins."""

import logging
import ssl
import time

import pytest
import trustme
from yarl import URL

from sdtrain.download.http.connections import tls_context
from sdtrain.download.http.proxies import Proxies, environment_variables
from sdtrain.errors import UserError
from tests.sdtrain.download.download_fixtures import closed_port
from tests.sdtrain.download.http.hostile_cases import BODY, CASES, TLS_CASES, moved
from tests.sdtrain.download.http.proxy_server import ProxyServer
from tests.sdtrain.download.http.web_fixtures import PUBLIC, fetch_all, quick

VARIABLES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY")


@pytest.fixture(autouse=True)
def no_proxies(monkeypatch):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)


@pytest.fixture
def proxy():
    with ProxyServer().running() as server:
        yield server


def reasons(config, urls):
    return [reason for reason, _, _ in fetch_all(config, urls)]


def test_http_is_forwarded_and_https_tunnelled(web, names, proxy):
    urls = [web.url("ok", "/by_proxy"), web.url("ok", "/tunnelled", scheme="https")]
    for reason, fetched, _ in fetch_all(quick(proxy=proxy.url), urls):
        assert (reason, fetched.body) == ("ok", BODY)
    assert sorted(proxy.asked) == [f"CONNECT hostile.example:{web.ports['tls_ok']}", f"GET {urls[0]}"]
    assert web.asked["/ok/by_proxy"] == web.asked["/ok/tunnelled"] == 1


@pytest.mark.parametrize("delay_s", [0, 0.3])
def test_a_name_that_only_the_proxy_knows_is_fetched_soon(web, names, proxy, delay_s, monkeypatch):
    monkeypatch.setattr("sdtrain.download.http.transport._PROXIED_LOOKUP_S", 0.1)
    del names.known["hostile.example"]
    names.delay_s["hostile.example"] = delay_s  # no name server answers in time
    urls = [web.url("ok"), web.url("ok", scheme="https")]
    started = time.monotonic()
    assert reasons(quick(proxy=proxy.url), urls) == ["ok", "ok"]
    assert time.monotonic() - started < 5
    assert reasons(quick(), urls) == ["dns_failed"] * 2


def test_private_addresses_are_refused_here_before_the_proxy_is_asked(web, names, proxy):
    proxy.names |= {"private.example": [PUBLIC], "half.example": [PUBLIC]}
    web.acts["to_literal"] = moved("http://10.0.0.8:{port}/ok")
    web.acts["to_name"] = moved("http://private.example:{port}/ok")
    port = web.ports["plain"]
    private = [
        f"http://{host}:{port}/ok" for host in ("127.0.0.1", "10.0.0.8", "169.254.169.254", "[::1]", "2130706433")
    ]
    private += [f"http://{host}:{port}/ok" for host in ("private.example", "half.example", "intranet.local")]
    private += [f"https://private.example:{port}/ok", web.url("to_literal"), web.url("to_name")]
    assert reasons(quick(proxy=proxy.url), private) == ["blocked_address"] * len(private)
    assert sorted(proxy.asked) == [f"GET {web.url(name)}" for name in ("to_literal", "to_name")]


def test_no_redirect_leads_the_proxy_astray(web, names, proxy):
    cases = [name for name in CASES if name.startswith("redirect_")]
    found = reasons(quick(proxy=proxy.url), [web.url(name) for name in cases])
    assert dict(zip(cases, found, strict=True)) == {name: CASES[name].reason or "ok" for name in cases}
    assert {URL(asked.split(" ")[1]).host for asked in proxy.asked} == {"hostile.example"}


def test_the_proxy_itself_may_be_at_a_private_address_and_no_other_server(web, names, proxy):
    names.known["proxy.example"] = ["127.0.0.1"]
    config = quick(proxy=f"http://proxy.example:{proxy.port}")
    assert reasons(config, [web.url("ok")]) == ["ok"]
    assert reasons(config, [f"http://proxy.example:{proxy.port}/"]) == ["blocked_address"]


def test_the_environments_proxies_are_used_only_on_request(web, names, proxy, monkeypatch):
    monkeypatch.setenv("ALL_PROXY", proxy.url)
    assert reasons(quick(), [web.url("ok")]) == ["ok"]
    assert proxy.asked == []
    assert environment_variables() == ["ALL_PROXY"]
    assert reasons(quick(proxy="environment"), [web.url("ok")]) == ["ok"]
    assert proxy.asked == [f"GET {web.url('ok')}"]


def test_the_environment_says_which_urls_go_through_which_proxy(monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", "ignored.example:1")
    monkeypatch.setenv("http_proxy", "plain.example:8080")  # small letters first, as in curl
    monkeypatch.setenv("HTTPS_PROXY", "https://user:p%40ss@tls.example")
    monkeypatch.setenv("NO_PROXY", "internal.example, 10.1.0.0/16,[2001:db8::1],.dot.example")
    proxies = Proxies("environment")
    for url, expected in {
        "http://a.example/": "http://plain.example:8080",
        "https://a.example/": "https://tls.example",
        "https://internal.example/": None,
        "https://img.internal.example/": None,
        "https://otherinternal.example/": "https://tls.example",
        "https://a.dot.example/": None,
        "http://10.1.2.3/": None,
        "http://10.2.2.3/": "http://plain.example:8080",
    }.items():
        found = proxies.of(URL(url))
        assert (found and found.shown) == expected, url
    assert proxies.of(URL("https://a.example/")).login == ("user", "p@ss")
    monkeypatch.setenv("NO_PROXY", "*")
    assert Proxies("environment").of(URL("https://a.example/")) is None
    assert Proxies("").of(URL("https://a.example/")) is None


@pytest.mark.parametrize(
    "value", ["socks5://user:hunter22@proxy.example:1080", "http://", "http://proxy.example:99999"]
)
def test_an_unusable_proxy_is_refused_without_its_password(value, monkeypatch):
    monkeypatch.setenv("HTTPS_PROXY", value)
    with pytest.raises(UserError, match="HTTPS_PROXY is no HTTP proxy") as refused:
        Proxies("environment")
    assert "hunter22" not in str(refused.value)


def test_a_login_reaches_the_proxy_and_nobody_else(web, names, monkeypatch, caplog):
    caplog.set_level(logging.DEBUG)
    urls = [web.url("ok", "/login"), web.url("ok", "/login", scheme="https")]
    web.requests.clear()
    with ProxyServer(login="user:sesame&sons").running() as proxy:
        place = f"127.0.0.1:{proxy.port}"
        for password, expected in (("sesame%26sons", "ok"), ("wrong-one", "proxy_failed")):
            monkeypatch.setenv("ALL_PROXY", f"http://user:{password}@{place}")
            found = fetch_all(quick(proxy="environment"), urls)
            assert [reason for reason, _, _ in found] == [expected] * 2
            if expected != "ok":
                assert {str(error) for _, error, _ in found} == {"proxy_failed: the proxy asks for another login (407)"}
            assert "sesame" not in repr(Proxies("environment").of(URL(urls[0]))) + str(Proxies("environment"))
    assert len(web.requests) == 2
    assert not any(b"roxy-" in head for _, _, head in web.requests)
    assert "sesame" not in caplog.text
    assert "wrong-one" not in caplog.text


def test_a_proxy_that_refuses_or_is_down_is_no_fault_of_the_hosts(web, names, proxy):
    urls = [web.url("ok", scheme="https")] * 3
    proxy.refusal = "403 Forbidden"
    assert reasons(quick(proxy=proxy.url), urls) == ["proxy_failed"] * 3
    proxy.refusal = "503 Service Unavailable"
    assert reasons(quick(proxy=proxy.url), urls) == ["connection_failed"] * 3
    down = quick(proxy=f"http://127.0.0.1:{closed_port()}", retries=0, connections_per_host=1)
    found = fetch_all(down, urls * 2)
    assert {str(error) for _, error, _ in found} == {"proxy_failed: no connection to the proxy"}


def test_what_goes_wrong_behind_a_tunnel_has_the_same_reasons(web, names, proxy):
    cases = [name for name in TLS_CASES if name != "tls_is_plain"]  # the server's reset may overtake its answer
    expected = [TLS_CASES[name] or "ok" for name in cases]
    assert reasons(quick(proxy=proxy.url), [web.url(name) for name in cases]) == expected


def test_bodies_cut_on_their_way_through_a_tunnel_are_truncated(web, names, proxy):
    async def cut(visit):
        await visit.send(b"HTTP/1.1 200 OK\r\nContent-Length: 5000\r\n\r\n" + BODY)
        visit.writer.close()

    web.acts["cut_in_tunnel"] = cut
    urls = [web.url("cut_in_tunnel", scheme=scheme) for scheme in ("http", "https")]
    assert reasons(quick(proxy=proxy.url), urls) == ["truncated"] * 2


def test_a_proxy_with_tls_needs_a_valid_certificate(web, names, tmp_path):
    authority = trustme.CA()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    authority.cert_pem.write_to_path(str(tmp_path / "proxy.pem"))
    with ProxyServer().running(context) as proxy:
        trusting = quick(proxy=proxy.url, ca_file=str(tmp_path / "proxy.pem"))
        assert reasons(trusting, [web.url("ok"), web.url("ok", scheme="https")]) == ["ok", "ok"]
        assert reasons(quick(proxy=proxy.url), [web.url("ok")]) == ["proxy_failed"]


def test_a_private_authority_is_trusted_besides_the_systems(web, names, tmp_path, monkeypatch):
    web.authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    monkeypatch.delenv("SSL_CERT_FILE")
    url = web.url("ok", scheme="https")
    assert reasons(quick(), [url]) == ["tls_failed"]
    assert reasons(quick(ca_file=str(tmp_path / "ca.pem")), [url]) == ["ok"]
    assert len(tls_context(str(tmp_path / "ca.pem")).get_ca_certs()) == len(tls_context().get_ca_certs()) + 1


def test_a_file_without_authorities_is_refused(tmp_path):
    (tmp_path / "none.pem").write_text("no certificate")
    for path, why in ((tmp_path / "none.pem", "no PEM certificates"), (tmp_path / "missing.pem", "No such file")):
        with pytest.raises(UserError, match=rf"download.ca_file: .* cannot be read \({why}"):
            tls_context(str(path))
