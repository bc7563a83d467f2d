"""URLs as browsers send them: what is written in metadata is seldom what goes over the wire."""

from __future__ import annotations

import ipaddress
import re
from urllib.parse import SplitResult, quote, unquote, urljoin, urlsplit, urlunsplit

from yarl import URL

from sdtrain.dataset.addresses import ipv4_of, why_not_allowed
from sdtrain.download.http.failures import FetchError

# "%" too: what is escaped already goes out untouched, and a lone "%" as it is.
_SAFE_IN_PATH = "%/:=&?~#+!$,;'@()*[]|"
_BLANKS = "".join(map(chr, range(0x21)))
_LABEL = re.compile(r"[a-z0-9_-]{1,63}")
_LONGEST_NAME = 253
_DEFAULT_PORTS = {"http": 80, "https": 443}


def request_url(url: str, allow_private: bool) -> URL:
    """The URL to ask for `url`, without its fragment, after the checks that its text allows.

    Raises:
        FetchError: url_not_allowed, or blocked_address where its host is private by its text alone.
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
        return URL(sent, encoded=True)  # else it would decode and encode again, and some servers tell %2B from +
    except ValueError:
        raise FetchError("url_not_allowed", "malformed") from None


def redirect_url(base: URL, location: str, allow_private: bool) -> URL:
    """The URL that a redirect at `base` leads to.

    Raises:
        FetchError: as `request_url`.
    """
    try:
        target = urljoin(str(base), _with_slashes(location.strip(_BLANKS)))
    except ValueError:
        raise FetchError("url_not_allowed", "malformed") from None
    return request_url(target, allow_private)


def _as_sent(url: str) -> str:
    parts = urlsplit(_with_slashes(url.strip(_BLANKS)))
    # One with a user's name or of another scheme is refused as it is.
    netloc = _netloc(parts) if parts.hostname and "@" not in parts.netloc else parts.netloc
    # Bytes of a Location that are no UTF-8 come as surrogates, and go out as the bytes that they were.
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
