"""Turns URLs as written in metadata into those that a browser would send."""

from __future__ import annotations

import ipaddress
import re
from urllib.parse import SplitResult, quote, unquote, urljoin, urlsplit, urlunsplit

from yarl import URL

from sdtrain.dataset.addresses import ipv4_of, why_not_allowed
from sdtrain.download.http.failures import FetchError

# "%" too: escaped characters go out unchanged, and so does a lone "%".
_SAFE_IN_PATH = "%/:=&?~#+!$,;'@()*[]|"
_BLANKS = "".join(map(chr, range(0x21)))
_LABEL = re.compile(r"[a-z0-9_-]{1,63}")
_LONGEST_NAME = 253
_DEFAULT_PORTS = {"http": 80, "https": 443}


def request_url(url: str, allow_private: bool) -> URL:
    """The URL to request for `url`, without its fragment, after all checks that need only its text.

    FetchError: url_not_allowed, or blocked_address if its text alone shows a private host.
    """
    try:
        sent = _as_sent(url)
    except ValueError:
        raise FetchError("url_not_allowed", "malformed") from None
    why = why_not_allowed(sent, allow_private)
    if why == "private_host":
        raise FetchError("blocked_address", "the host is private")
    if why is not None:
        raise FetchError("url_not_allowed", why)
    try:
        return URL(sent, encoded=True)  # else yarl would recode it, and some servers distinguish %2B from +
    except ValueError:
        raise FetchError("url_not_allowed", "malformed") from None


def redirect_url(base: URL, location: str, allow_private: bool) -> URL:
    """The URL of a redirect at `base`; FetchError as for `request_url`."""
    try:
        target = urljoin(str(base), _with_slashes(location.strip(_BLANKS)))
    except ValueError:
        raise FetchError("url_not_allowed", "malformed") from None
    return request_url(target, allow_private)


def _as_sent(url: str) -> str:
    parts = urlsplit(_with_slashes(url.strip(_BLANKS)))
    # One with a user name or another scheme is refused as it is.
    netloc = _netloc(parts) if parts.hostname and "@" not in parts.netloc else parts.netloc
    # Non-UTF-8 bytes of a Location arrive as surrogates and go out unchanged.
    path, query = (quote(part, _SAFE_IN_PATH, errors="surrogateescape") for part in (parts.path or "/", parts.query))
    return urlunsplit((parts.scheme, netloc, path, query, ""))


def _with_slashes(url: str) -> str:
    end = min((position for position in map(url.find, "?#") if position >= 0), default=len(url))
    return url[:end].replace("\\", "/") + url[end:]


def _netloc(parts: SplitResult) -> str:
    host = parts.hostname or ""
    host = f"[{ipaddress.IPv6Address(host)}]" if "[" in parts.netloc else _name(host)
    port = parts.port
    return host if port is None or port == _DEFAULT_PORTS.get(parts.scheme) else f"{host}:{port}"


def _name(host: str) -> str:
    if "%" in host:
        host = unquote(host, errors="strict")
    if not host.isascii():
        host = URL.build(scheme="http", host=host).raw_host or ""
    bare = host.lower().removesuffix(".")
    if len(bare) > _LONGEST_NAME or not all(_LABEL.fullmatch(label) for label in bare.split(".")):
        raise ValueError("not a host name")
    return ipv4_of(bare) or bare
