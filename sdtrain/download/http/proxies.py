"""Chooses each request's proxy: none, the recipe's, or the environment's."""

from __future__ import annotations

import ipaddress
import urllib.request
from dataclasses import dataclass, field

from yarl import URL

from sdtrain.errors import UserError

ENVIRONMENT = "environment"
_VARIABLES = {"http": "HTTP_PROXY", "https": "HTTPS_PROXY", "all": "ALL_PROXY"}
_SCHEMES = ("http", "https")


@dataclass(frozen=True)
class Proxy:
    """An HTTP proxy, with its user and password kept apart, so that no message shows them."""

    url: URL
    login: tuple[str, str] | None = field(default=None, repr=False)

    @property
    def shown(self) -> str:
        """Its scheme, host and port."""
        return str(self.url.origin())

    def is_at(self, host: object, port: object) -> bool:
        """Whether it listens there."""
        return (self.url.host, self.url.port) == (host, port)


class Proxies:
    """The proxies of a recipe's `download.proxy`: "" for none, a URL, or "environment".

    The environment's are read as by curl: HTTP_PROXY, HTTPS_PROXY and ALL_PROXY, in small letters first, for all hosts
    but those of NO_PROXY (names with all below them, addresses, networks such as 10.0.0.0/8, or `*`). UserError for one
    that is not http or https.
    """

    def __init__(self, setting: str) -> None:
        found = environment_proxies() if setting == ENVIRONMENT else {}
        self._excepted = found.pop("no", "")
        if setting and setting != ENVIRONMENT:
            found = {"all": setting}
        self._by_scheme = {scheme: _parse(value, scheme, setting) for scheme, value in found.items()}

    def of(self, url: URL) -> Proxy | None:
        """The proxy for a request to `url`; None to connect to its host itself."""
        proxy = self._by_scheme.get(url.scheme) or self._by_scheme.get("all")
        return None if proxy is None or self._excepts(url) else proxy

    def __str__(self) -> str:
        """For a log: which proxies serve which URLs."""
        shown = [f"{scheme}: {proxy.shown}" for scheme, proxy in self._by_scheme.items()]
        return (", ".join(shown) or "none") + (f", but for {self._excepted}" if self._excepted else "")

    def _excepts(self, url: URL) -> bool:
        host = url.raw_host or ""
        if not self._excepted:
            return False
        if urllib.request.proxy_bypass_environment(f"{host}:{url.port}", {"no": self._excepted}):  # type: ignore[attr-defined]
            return True
        return any(_holds(network.strip(), host) for network in self._excepted.split(",") if "/" in network)


def environment_proxies() -> dict[str, str]:
    """The environment's values by scheme, "all" and "no"."""
    found = urllib.request.getproxies_environment()
    return {name: value for name, value in found.items() if value and name in (*_VARIABLES, "no")}


def environment_variables() -> list[str]:
    """The names of those set that give a proxy."""
    return [_VARIABLES[name] for name in environment_proxies() if name != "no"]


def _parse(value: str, scheme: str, setting: str) -> Proxy:
    name = _VARIABLES[scheme] if setting == ENVIRONMENT else "download.proxy"
    try:
        url = URL(value if "://" in value else f"http://{value}")
        is_usable = url.scheme in _SCHEMES and bool(url.host) and url.port is not None
        login = (url.user or "", url.password or "") if url.user or url.password else None
        origin = url.origin() if is_usable else None
    except ValueError:
        origin = None
    if origin is None:  # without its value, which may hold a password
        raise UserError(
            f"{name} is no HTTP proxy: write http://HOST:PORT or https://HOST:PORT. A SOCKS proxy needs an HTTP proxy "
            "in front of it."
        )
    return Proxy(origin, login)


def _holds(network: str, host: str) -> bool:
    try:
        return ipaddress.ip_address(host.strip("[]")) in ipaddress.ip_network(network, strict=False)
    except ValueError:
        return False
