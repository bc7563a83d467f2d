"""Builds behind a proxy, and from servers without a valid certificate, through the child process."""

import hashlib
from collections import Counter

import pytest
from pydantic import ValidationError

from sdtrain.dataset.config import DownloadConfig
from sdtrain.download.retry import retry_failed
from sdtrain.download.stage import DOWNLOAD, download_fingerprint
from sdtrain.errors import UserError
from tests.sdtrain.download.download_fixtures import BuildRecipe, closed_port, encoded, photo, prepare
from tests.sdtrain.download.http.hostile_cases import answer
from tests.sdtrain.download.http.hostile_web import HostileWeb
from tests.sdtrain.download.http.proxy_server import ProxyServer

PHOTO = encoded(photo(1))
SHA256, MD5 = hashlib.sha256(PHOTO).hexdigest(), hashlib.md5(PHOTO).hexdigest()


@pytest.fixture(scope="module")
def web():
    with HostileWeb().running() as server:
        server.acts["photo"] = answer(body=PHOTO)
        yield server


def reasons(build):
    return [row["reason"] for row in build.rows()]


def test_without_a_valid_certificate_only_the_metadatas_sha256_lets_an_image_in(web, tmp_path):
    def url(case):
        return f"https://127.0.0.1:{web.ports[case]}/photo"

    rows = {
        ("tls_self_signed", "right"): None,
        ("tls_self_signed", "none"): "tls_failed",
        ("tls_self_signed", "wrong"): "tls_failed",
        ("tls_self_signed", "md5"): "tls_failed",
        ("tls_expired", "right"): None,
        ("tls_wrong_name", "right"): None,
        ("tls_wrong_name", "wrong"): "tls_failed",
    }
    digests = {"right": {"sha256": SHA256}, "none": {}, "wrong": {"sha256": "0" * 64}, "md5": {"md5": MD5}}
    urls, kinds = [url(case) for case, _ in rows], [digests[kind] for _, kind in rows]
    build = prepare(tmp_path, urls, rows=kinds)
    build.run()
    assert set(reasons(build)) == {"tls_failed"}

    # No shard is done again for the setting; a retry brings the rows that it lets in.
    proving = build.with_settings(unverified_tls="with_sha256")
    assert DOWNLOAD.fingerprint(build.dataset, proving.recipe, 0) == download_fingerprint(
        build.dataset, build.recipe, 0
    )
    assert retry_failed(build.dataset, build.recipe) == []
    retry_failed(build.dataset, proving.recipe)
    assert reasons(build) == list(rows.values())
    messages = Counter(row["error_message"] for row in build.rows() if row["reason"])
    assert all(message.startswith("tls_failed: ") for message in messages)


def test_a_build_behind_a_proxy_keeps_its_login_to_itself(web, tmp_path, monkeypatch):
    url = f"http://127.0.0.1:{web.ports['plain']}/photo"
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with ProxyServer(login="user:sesame-9").running() as proxy:
        monkeypatch.setenv("ALL_PROXY", f"http://user:sesame-9@127.0.0.1:{proxy.port}")
        build = prepare(tmp_path, [url, "https://127.0.0.1:1/gone"], proxy="environment")
        build.run()
        assert reasons(build) == [None, "connection_failed"]
        assert sorted(proxy.asked) == ["CONNECT 127.0.0.1:1", f"GET {url}"]
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert written
    assert not [path for path in written if b"sesame" in path.read_bytes()]


def test_where_nothing_is_reached_unused_proxies_are_named(tmp_path, monkeypatch):
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HTTPS_PROXY", "http://user:sesame-9@proxy.example:3128")
    build = prepare(tmp_path, [f"http://127.0.0.1:{closed_port()}/{n}" for n in range(20)])
    with pytest.raises(UserError, match="HTTPS_PROXY of the environment serve downloads only with") as refused:
        build.run()
    assert "sesame" not in str(refused.value)


def test_settings_are_checked_before_the_build(tmp_path, monkeypatch):
    def check(**settings):
        return {name: open_() for name, open_ in DOWNLOAD.needs.files(Recipe(DownloadConfig(**settings))).items()}

    class Recipe(BuildRecipe):
        source = None

    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delenv("ALL_PROXY", raising=False)
    assert check() == {}
    assert check(proxy="http://proxy.example:3128") == {"download.proxy": "all: http://proxy.example:3128"}
    with pytest.raises(UserError, match=r"download.ca_file: .*missing.pem cannot be read"):
        check(ca_file=str(tmp_path / "missing.pem"))
    monkeypatch.setenv("https_proxy", "http://user:sesame-9@proxy.example:3128")
    assert check(proxy="environment") == {"download.proxy": "https: http://proxy.example:3128"}
    assert "only with download.proxy: environment" in check()["download.proxy"]
    monkeypatch.setenv("https_proxy", "socks5://proxy.example")
    with pytest.raises(UserError, match="HTTPS_PROXY is no HTTP proxy"):
        check(proxy="environment")


@pytest.mark.parametrize(
    "proxy", ["http://user:sesame-9@proxy.example:3128", "socks5://proxy.example", "proxy.example"]
)
def test_a_proxy_in_a_recipe_has_no_login_and_is_no_socks(proxy):
    with pytest.raises(ValidationError, match="write http://HOST:PORT") as refused:
        DownloadConfig(proxy=proxy)
    assert "sesame" not in refused.value.errors()[0]["msg"]


def test_settings_of_the_way_change_no_fingerprint_and_proof_needs_comparison(tmp_path):
    build = prepare(tmp_path, ["http://192.0.2.1/"])
    before = download_fingerprint(build.dataset, build.recipe, 0)
    other = build.with_settings(proxy="http://[2001:db8::1]:3128", ca_file="/ca.pem", unverified_tls="with_sha256")
    assert download_fingerprint(build.dataset, other.recipe, 0) == before
    with pytest.raises(ValidationError, match="unverified_tls: with_sha256 needs verify_hashes"):
        DownloadConfig(unverified_tls="with_sha256", verify_hashes=False)
