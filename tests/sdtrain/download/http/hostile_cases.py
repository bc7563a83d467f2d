"""What can become of a request: ways in which `hostile_web` answers, each with its own outcome for who asks.

Cases with `guarded` are attempts to lead the client to private addresses: they have their outcome only for a
client that takes the server's own address for a public one.
"""

from __future__ import annotations

import asyncio
import gzip
import socket
import struct
import zlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

BODY = bytes(range(256)) * 8
ENDLESS_S = 30


@dataclass
class Visit:
    """One request."""

    path: str
    number: int
    """How often the path was asked for, this time included."""
    port: int
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def answer(self, *headers: str, status: str = "200 OK", body: bytes = BODY) -> None:
        lines = [f"HTTP/1.1 {status}", *headers]
        if not any(line.lower().startswith(("content-length", "transfer-encoding")) for line in headers):
            lines.append(f"Content-Length: {len(body)}")
        await self.send("\r\n".join([*lines, "", ""]).encode("latin-1") + body)

    async def drip(self, data: bytes, pause_s: float = 0.05) -> None:
        for _ in range(int(ENDLESS_S / pause_s)):
            await self.send(data)
            await asyncio.sleep(pause_s)


Act = Callable[[Visit], Awaitable[None]]


@dataclass(frozen=True)
class Case:
    """What the server does, and what becomes of the request: a reason, or None where `BODY` is had."""

    act: Act
    reason: str | None
    guarded: bool = False
    settings: tuple[str, ...] = ()
    """Options of the client without which the request would succeed."""


def answer(*headers: str, status: str = "200 OK", body: bytes = BODY) -> Act:
    return lambda visit: visit.answer(*headers, status=status, body=body)


def raw(*parts: bytes) -> Act:
    async def act(visit: Visit) -> None:
        for part in parts:
            await visit.send(part)
            await asyncio.sleep(0.05 * (part is not parts[-1]))  # so that it arrives alone
        visit.writer.close()

    return act


def moved(location: str, status: str = "302 Found") -> Act:
    return lambda visit: visit.answer(f"Location: {location.format(port=visit.port)}", status=status, body=b"")


def first(act: Act, times: int = 1) -> Act:
    """`act` for the first requests, a good answer afterwards."""
    return lambda visit: act(visit) if visit.number <= times else visit.answer()


async def loop(visit: Visit) -> None:
    await visit.answer(f"Location: {visit.path}", status="301 Moved Permanently", body=b"")


async def chain(visit: Visit) -> None:
    await visit.answer(f"Location: /redirect_chain/{visit.path.count('x') * 'x'}x", status="307 Moved", body=b"")


async def flood(visit: Visit) -> None:
    await visit.send(b"HTTP/1.1 200 OK\r\n\r\n")
    while True:
        await visit.send(bytes(1 << 16))


async def flood_of_hints(visit: Visit) -> None:
    while True:
        await visit.send(b"HTTP/1.1 103 Early Hints\r\n\r\n" * 100)


async def drip_body(visit: Visit) -> None:
    await visit.send(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n")
    await visit.drip(b"x")


async def drip_chunks(visit: Visit) -> None:
    await visit.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
    await visit.drip(b"1\r\nx\r\n")


async def drip_headers(visit: Visit) -> None:
    await visit.send(b"HTTP/1.1 200 OK\r\n")
    await visit.drip(b"X-More: x\r\n", pause_s=0.1)


async def drip_one_header(visit: Visit) -> None:
    await visit.send(b"HTTP/1.1 200 OK\r\nX-Long: ")
    await visit.drip(b"x")


async def silent(visit: Visit) -> None:
    await asyncio.sleep(ENDLESS_S)


async def stalled(visit: Visit) -> None:
    await visit.answer(f"Content-Length: {len(BODY)}", body=BODY[:100])
    await asyncio.sleep(ENDLESS_S)


def reset(*headers: str) -> Act:
    async def act(visit: Visit) -> None:
        await visit.send("\r\n".join(["HTTP/1.1 200 OK", *headers, "", "x"]).encode())
        await asyncio.sleep(0.05)
        sock = visit.writer.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        visit.writer.transport.abort()

    return act


def bomb() -> bytes:
    """512 MiB of zeros as gzip. A full flush forgets what came before, so every MiB is the same block: made once."""
    zeros, checksum = bytes(1 << 20), 0
    packer = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    block = packer.compress(zeros) + packer.flush(zlib.Z_FULL_FLUSH)
    for _ in range(512):
        checksum = zlib.crc32(zeros, checksum)
    header, trailer = b"\x1f\x8b\x08" + bytes(7), struct.pack("<2I", checksum, 512 << 20)
    return header + block * 512 + packer.flush() + trailer


def bare_deflate(data: bytes) -> bytes:
    packer = zlib.compressobj(wbits=-15)
    return packer.compress(data) + packer.flush()


def chunked(data: bytes) -> bytes:
    return b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n%x\r\n%b\r\n" % (len(data), data)


PACKED = gzip.compress(BODY, mtime=0)
HEAD = b"HTTP/1.1 200 OK\r\n"
CASES: dict[str, Case] = {
    # Good answers, some in odd clothes.
    "ok": Case(answer("Content-Type: Image/JPEG; charset=x"), None),
    "ok_chunked": Case(raw(chunked(BODY), b"0\r\n\r\n"), None),
    "ok_until_close": Case(raw(HEAD + b"\r\n" + BODY), None),
    "ok_http_1_0": Case(raw(b"HTTP/1.0 200 OK\r\n\r\n" + BODY), None),
    "ok_after_hints": Case(raw(b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n" + HEAD + b"\r\n" + BODY), None),
    "ok_gzip": Case(answer("Content-Encoding: gzip", body=PACKED), None),
    "ok_gzip_in_two": Case(
        answer("Content-Encoding: x-gzip", body=gzip.compress(BODY[:9]) + gzip.compress(BODY[9:])), None
    ),
    "ok_zlib": Case(answer("Content-Encoding: deflate", body=zlib.compress(BODY)), None),
    "ok_deflate": Case(answer("Content-Encoding: deflate", body=bare_deflate(BODY)), None),
    "ok_identity": Case(answer("Content-Encoding: identity"), None),
    "moved": Case(moved("/ok"), None),
    "moved_303": Case(moved("ok", "303 See Other"), None),
    "moved_308": Case(moved("../../ok#here", "308 Permanent Redirect"), None),
    "moved_with_spaces": Case(moved("/ok/a b\xe4|[1].jpg"), None),
    # Failures that pass.
    "busy_once": Case(first(answer(status="503 Busy")), None),
    "cut_once": Case(first(raw(HEAD + b"Content-Length: 99\r\n\r\nx")), None),
    "closes_once": Case(first(raw()), None),
    "rest_of_a_second": Case(first(answer("Retry-After: 1", status="429 Slow Down", body=b"")), None),
    # Statuses.
    "http_404": Case(answer("X-Robots-Tag: noindex", status="404 Not Found"), "http_404"),
    "http_403": Case(answer(status="403 Forbidden"), "http_403"),
    "http_410": Case(answer(status="410 Gone"), "http_410"),
    "http_500": Case(answer(status="500 Oops"), "http_500"),
    "http_503": Case(answer(status="503 Busy"), "http_503"),
    "http_204": Case(raw(b"HTTP/1.1 204 No Content\r\n\r\n"), "http_204"),
    "http_206": Case(answer("Content-Range: bytes 0-9/99", status="206 Partial Content"), "http_206"),
    "http_304": Case(raw(b"HTTP/1.1 304 Not Modified\r\n\r\n"), "http_304"),
    "http_999": Case(answer(status="999 Request denied"), "http_999"),
    "http_101": Case(raw(b"HTTP/1.1 101 Switch\r\nUpgrade: x\r\nConnection: Upgrade\r\n\r\n"), "http_101"),
    # Redirects that lead nowhere good.
    "redirect_without_location": Case(answer(status="302 Found", body=b""), "http_302"),
    "redirect_loop": Case(loop, "too_many_redirects"),
    "redirect_chain": Case(chain, "too_many_redirects"),
    "redirect_to_file": Case(moved("file:///etc/hostname"), "url_not_allowed"),
    "redirect_to_data": Case(moved("data:image/png;base64,AAAA"), "url_not_allowed"),
    "redirect_to_ftp": Case(moved("ftp://127.0.0.1/a.jpg"), "url_not_allowed"),
    "redirect_to_user": Case(moved("http://me:secret@hostile.example:{port}/ok"), "url_not_allowed"),
    "redirect_to_ssh": Case(moved("http://hostile.example:22/"), "url_not_allowed"),
    "redirect_to_garbage": Case(moved("http://[::1/ok"), "url_not_allowed"),
    "redirect_to_loopback": Case(moved("http://127.0.0.1:{port}/ok"), "blocked_address", guarded=True),
    "redirect_to_localhost": Case(moved("http://localhost:{port}/ok"), "blocked_address", guarded=True),
    "redirect_to_metadata": Case(moved("http://169.254.169.254/latest"), "blocked_address", guarded=True),
    "redirect_to_ipv6_loopback": Case(moved("//[::1]:{port}/ok"), "blocked_address", guarded=True),
    "redirect_to_decimal": Case(moved("http://2130706433:{port}/ok"), "blocked_address", guarded=True),
    "redirect_to_hex": Case(moved("http://0x7f.1:{port}/ok"), "blocked_address", guarded=True),
    "redirect_to_octal": Case(moved("http://0177.0.0.1:{port}/ok"), "blocked_address", guarded=True),
    "redirect_to_escaped": Case(moved("http://%31%32%37.0.0.1:{port}/ok"), "blocked_address", guarded=True),
    "redirect_to_mapped": Case(moved("http://[::ffff:127.0.0.1]:{port}/ok"), "blocked_address", guarded=True),
    "redirect_to_private_name": Case(moved("http://private.example:{port}/ok"), "blocked_address", guarded=True),
    "redirect_to_half_private_name": Case(moved("http://half.example:{port}/ok"), "blocked_address", guarded=True),
    # Bodies.
    "empty_body": Case(answer(body=b""), "empty_body"),
    "empty_until_close": Case(raw(HEAD + b"\r\n"), "empty_body"),
    "cut_length": Case(raw(HEAD + b"Content-Length: 9999\r\n\r\n" + BODY), "truncated"),
    "cut_chunked": Case(raw(chunked(BODY)), "truncated"),
    "cut_by_reset": Case(reset("Content-Length: 100"), "truncated"),
    "cut_by_reset_until_close": Case(reset(), "truncated"),
    "bad_chunk_size": Case(raw(chunked(BODY) + b"zz\r\nx\r\n0\r\n\r\n"), "invalid_answer"),
    "bad_chunk_size_later": Case(raw(chunked(BODY), b"zz\r\nx\r\n0\r\n\r\n"), "invalid_answer"),
    "drip_body": Case(drip_body, "timeout"),
    "drip_chunks": Case(drip_chunks, "timeout"),
    "stalled_body": Case(stalled, "timeout"),
    "flood": Case(flood, "too_large"),
    "huge_length": Case(answer("Content-Length: 99999999999", body=b""), "too_large"),
    "gzip_bomb": Case(answer("Content-Encoding: gzip", body=bomb()), "too_large"),
    "gzip_cut": Case(answer("Content-Encoding: gzip", body=PACKED[:-9]), "truncated"),
    "gzip_damaged": Case(answer("Content-Encoding: gzip", body=b"no gzip at all"), "invalid_answer"),
    "brotli": Case(answer("Content-Encoding: br"), "unknown_encoding"),
    "packed_twice": Case(answer("Content-Encoding: gzip, gzip", body=gzip.compress(PACKED)), "unknown_encoding"),
    # What is no HTTP, or too much of it.
    "silent": Case(silent, "timeout"),
    "closes_at_once": Case(raw(), "connection_failed"),
    "closes_within_headers": Case(raw(HEAD + b"Content-Le"), "connection_failed"),
    "nonsense": Case(raw(b"\x00\x01\x02 hello\r\n\r\n"), "invalid_answer"),
    "http_0_9": Case(raw(b"<html>no header at all</html>"), "invalid_answer"),
    "bad_status": Case(raw(b"HTTP/1.1 2OO OK\r\n\r\n"), "invalid_answer"),
    "bad_length": Case(raw(HEAD + b"Content-Length: many\r\n\r\nx"), "invalid_answer"),
    "two_lengths": Case(raw(HEAD + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\nxx"), "invalid_answer"),
    "huge_header": Case(answer("X-Long: " + "x" * (1 << 20)), "invalid_answer"),
    "many_headers": Case(answer(*(f"X-{number}: x" for number in range(10_000))), "invalid_answer"),
    "drip_headers": Case(drip_headers, "timeout"),
    "drip_one_header": Case(drip_one_header, "timeout"),
    "flood_of_hints": Case(flood_of_hints, "timeout"),
    # What the site wants.
    "robots_noai": Case(answer("X-Robots-Tag: noai"), "robots_header"),
    "robots_second_header": Case(answer("X-Robots-Tag: all", "x-robots-tag: NoIndex"), "robots_header"),
    "robots_after_values": Case(answer("X-Robots-Tag: max-image-preview:large, NoImageAI"), "robots_header"),
    "robots_our_name": Case(answer("X-Robots-Tag: otherbot: all, SDTrain: noindex"), "robots_header"),
    "robots_layout_name": Case(answer("X-Robots-Tag: img2dataset: noai"), "robots_header"),
    "robots_on_redirect": Case(answer("X-Robots-Tag: noai", "Location: /ok", status="302 Found"), "robots_header"),
    "robots_other_name": Case(answer("X-Robots-Tag: otherbot: noai, noindex", "X-Robots-Tag: nofollow"), None),
    "robots_until": Case(answer("X-Robots-Tag: unavailable_after: Sat, 25 Jun 2050 15:00:00 GMT"), None),
    "tdm_header": Case(answer("TDM-Reservation: 1"), "tdm_reserved", settings=("tdm_reservation",)),
    "tdm_header_0": Case(answer("TDM-Reservation: 0"), None),
}  # fmt: skip
TLS_CASES = {
    "tls_ok": None, "tls_expired": "tls_failed", "tls_self_signed": "tls_failed", "tls_wrong_name": "tls_failed",
    "tls_silent": "timeout", "tls_closes": "connection_failed", "tls_is_plain": "tls_failed",
}  # fmt: skip
# URLs that need no server.
BAD_URLS: dict[str, tuple[str, str]] = {
    "url_empty": ("", "url_not_allowed"),
    "url_without_scheme": ("hostile.example/a.jpg", "url_not_allowed"),
    "url_without_host": ("http:///a.jpg", "url_not_allowed"),
    "url_file": ("file:///etc/hostname", "url_not_allowed"),
    "url_data": ("data:image/gif;base64,R0lGODlhAQABAAAAACw=", "url_not_allowed"),
    "url_ftp": ("ftp://hostile.example/a.jpg", "url_not_allowed"),
    "url_user": ("http://hostile.example@127.0.0.1/a.jpg", "url_not_allowed"),
    "url_port_of_ssh": ("http://hostile.example:22/a.jpg", "url_not_allowed"),
    "url_port_too_large": ("http://hostile.example:99999/a.jpg", "url_not_allowed"),
    "url_half_ipv6": ("http://[::1/a.jpg", "url_not_allowed"),
    "url_blank_in_host": ("http://hostile example/a.jpg", "url_not_allowed"),
    "url_empty_label": ("http://hostile..example/a.jpg", "url_not_allowed"),
    "url_long_label": (f"http://{64 * 'a'}.example/a.jpg", "url_not_allowed"),
    "url_bad_idn": ("http://\u2024\u200d.example/a.jpg", "url_not_allowed"),
    "url_unknown_name": ("http://no-such-name.invalid/a.jpg", "dns_failed"),
    "url_dead_name_server": ("http://dead-name-server.example/a.jpg", "dns_failed"),
    "url_loopback": ("http://127.0.0.1/a.jpg", "blocked_address"),
    "url_wide_digits": ("http://\uff11\uff12\uff17.0.0.1/a.jpg", "blocked_address"),
    "url_decimal": ("http://2130706433/a.jpg", "blocked_address"),
    "url_mapped": ("http://[::ffff:7f00:1]/a.jpg", "blocked_address"),
    "url_private_name": ("https://private.example/a.jpg", "blocked_address"),
}
