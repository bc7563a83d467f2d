"""Decides which URLs and network addresses may be fetched, and extracts URLs' hosts."""

from __future__ import annotations

import ipaddress
import re
import socket
from urllib.parse import SplitResult, urlsplit

SCHEMES = ("http", "https")
IMPORT = "import://"
"""Begins the URL of an imported image: `import://NAME/path`, and for one in a tar or table `#member` or `#row`."""
# Ports of mail, remote shells, files, databases and the like, where an HTTP request would do harm or
# nothing; the web's own ports, and the odd ones that image hosts use, stay open.
# fmt: off
OTHER_SERVICES = frozenset([
    7, 9, 13, 19, 20, 21, 22, 23, 25, 37, 53, 69, 79, 109, 110, 111, 113, 119, 123, 135, 137, 139, 143, 161, 179, 389,
    427, 445, 465, 512, 513, 514, 515, 548, 554, 587, 631, 636, 873, 989, 990, 993, 995, 1433, 1521, 1723, 2049, 2181,
    2375, 2376, 2379, 3306, 3389, 5432, 5900, 5984, 6000, 6379, 6443, 6667, 9042, 9092, 9200, 10250, 11211, 27017,
])
# fmt: on
_LOCAL_NAMES = re.compile(r"(?:^|\.)(?:localhost|local|localdomain|internal|intranet|lan|home\.arpa)$")
# What C libraries accept as an IPv4 address: one to four numbers, decimal, octal or hexadecimal.
_NUMERIC = re.compile(r"(?:0x[0-9a-f]*|[0-9]+)(?:\.(?:0x[0-9a-f]*|[0-9]+)){0,3}", re.IGNORECASE)
_NAT64 = (ipaddress.ip_network("64:ff9b::/96"), ipaddress.ip_network("64:ff9b:1::/48"))


def why_not_allowed(url: str, allow_private: bool) -> str | None:
    """Why `url` must not be fetched: "malformed", "scheme", "userinfo", "port", "private_host", or None if it may be.

    Only its text counts: `is_public` checks the addresses of its name when a connection is made.
    """
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        return "malformed"
    if parts.scheme not in SCHEMES:
        return "scheme"
    if not parts.hostname:
        return "malformed"
    if "@" in parts.netloc:
        return "userinfo"
    if port == 0 or port in OTHER_SERVICES:
        return "port"
    return None if allow_private or not _is_private_host(parts) else "private_host"


def is_public(address: str) -> bool:
    """Whether a resolved IP address belongs to the public internet.

    Loopback, private, link-local (cloud metadata services), shared, multicast, reserved and unspecified addresses do
    not, nor do IPv6 addresses that embed one such IPv4 address.
    """
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        carried = _carried_ipv4(ip)
        if carried is not None:
            return is_public(str(carried))
        if ip.is_site_local:
            return False
    special = ip.is_multicast or ip.is_reserved or ip.is_unspecified or ip.is_loopback or ip.is_link_local
    return ip.is_global and not special


def ipv4_of(host: str) -> str | None:
    """The dotted address that C libraries and browsers read in `host` (`2130706433`, `0x7f.1`); None for a name.

    ValueError if it is numeric, but no address.
    """
    if not _NUMERIC.fullmatch(host):
        return None
    try:
        return socket.inet_ntoa(socket.inet_aton(host))
    except OSError as error:
        raise ValueError("numbers that are no address") from error


def _carried_ipv4(ip: ipaddress.IPv6Address) -> ipaddress.IPv4Address | None:
    if any(ip in network for network in _NAT64):
        return ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
    if ip.teredo is not None:
        return ip.teredo[1]
    if int(ip) >> 32 == 0 and int(ip) > 1:  # ::a.b.c.d, obsolete but still understood
        return ipaddress.IPv4Address(int(ip))
    return ip.ipv4_mapped or ip.sixtofour


def _is_private_host(parts: SplitResult) -> bool:
    host = (parts.hostname or "").rstrip(".")
    try:
        literal = host if "[" in parts.netloc else ipv4_of(host)
        return not is_public(literal) if literal else _LOCAL_NAMES.search(host) is not None
    except ValueError:
        return True


def host_of(url: str) -> str:
    """The host that a request for `url` goes to: lower case, in ASCII, without a final dot; "" if there is none."""
    try:
        return plain_host(urlsplit(url.strip()).hostname or "")
    except ValueError:
        return ""


def plain_host(host: str) -> str:
    """Normalises a host's name for comparison; ValueError if it cannot be one."""
    name = host.lower().rstrip(".")
    return name if name.isascii() else name.encode("idna").decode("ascii")
