"""A hostile web at a public name, for clients that run in the test's own process."""

from __future__ import annotations

import socket

import pytest

from sdtrain.dataset import addresses
from tests.sdtrain.download.http.hostile_web import HostileWeb
from tests.sdtrain.download.http.web_fixtures import PUBLIC, Names


@pytest.fixture(scope="package")
def web(tmp_path_factory):
    """The server, at an address that counts as public and is trusted over TLS, under the name of hostile.example."""
    really_public = addresses.is_public

    def is_public(address):
        return address == PUBLIC or really_public(address)

    with HostileWeb(PUBLIC, "hostile.example").running() as server, pytest.MonkeyPatch.context() as patch:
        ca = tmp_path_factory.mktemp("tls") / "ca.pem"
        server.authority.cert_pem.write_to_path(str(ca))
        patch.setenv("SSL_CERT_FILE", str(ca))
        patch.setattr("sdtrain.download.http.dns.is_public", is_public)
        patch.setattr("sdtrain.download.http.connections.is_public", is_public)
        yield server


@pytest.fixture
def names(monkeypatch):
    made = Names()
    monkeypatch.setattr(socket, "getaddrinfo", made.getaddrinfo)
    return made
