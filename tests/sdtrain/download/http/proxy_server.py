"""An HTTP proxy on loopback, in a thread of its own, which resolves names by a table and may ask for a login."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import ssl
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from tests.sdtrain.download.http.web_fixtures import NAMES


@dataclass
class ProxyServer:
    """What it knows, demands, and was asked: "CONNECT host:port", or the method and whole URL."""

    login: str | None = None
    names: dict[str, list[str]] = field(default_factory=lambda: dict(NAMES))
    refusal: str | None = None
    asked: list[str] = field(default_factory=list)
    port: int = 0
    url: str = ""

    @contextlib.contextmanager
    def running(self, tls: ssl.SSLContext | None = None) -> Iterator[ProxyServer]:
        loop = asyncio.new_event_loop()
        thread = threading.Thread(target=loop.run_forever, daemon=True)
        thread.start()
        server = asyncio.run_coroutine_threadsafe(asyncio.start_server(self._serve, "127.0.0.1", 0, ssl=tls), loop)
        self.port = server.result(10).sockets[0].getsockname()[1]
        self.url = f"{'https' if tls else 'http'}://127.0.0.1:{self.port}"
        try:
            yield self
        finally:
            asyncio.run_coroutine_threadsafe(self._end(server.result()), loop).result(10)
            loop.call_soon_threadsafe(loop.stop)
            thread.join(10)
            loop.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            head = await reader.readuntil(b"\r\n\r\n")
            method, target, _ = head.split(b"\r\n")[0].decode().split(" ")
            self.asked.append(f"{method} {target}")
            refusal = self._refusal_of(head)
            if refusal:
                writer.write(f"HTTP/1.1 {refusal}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n".encode())
                await writer.drain()
            else:
                await self._forward(method, target, head, reader, writer)
        writer.close()

    def _refusal_of(self, head: bytes) -> str | None:
        expected = base64.b64encode((self.login or "").encode())
        if self.login and b"Proxy-Authorization: Basic " + expected not in head:
            return "407 Proxy Authentication Required"
        return self.refusal

    async def _forward(
        self, method: str, target: str, head: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        parts = urlsplit(f"//{target}" if method == "CONNECT" else target)
        host = parts.hostname or ""
        try:
            upstream = await asyncio.open_connection(self.names.get(host, [host])[0], parts.port or 80)
        except OSError:
            writer.write(b"HTTP/1.1 502 Bad Gateway\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
            return
        if method == "CONNECT":
            writer.write(b"HTTP/1.1 200 Connection established\r\n\r\n")
        else:
            upstream[1].write(_for_origin(head))
        sent = _pipe(reader, upstream[1]) if method == "CONNECT" else self._requests(reader, upstream[1])
        try:
            await asyncio.gather(sent, _pipe(upstream[0], writer))
        finally:
            upstream[1].close()

    async def _requests(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Forwards the further requests of a connection."""
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                self.asked.append(head.split(b" HTTP/")[0].decode())
                writer.write(_for_origin(head))
        writer.close()

    async def _end(self, server: asyncio.Server) -> None:
        server.close()
        tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _for_origin(head: bytes) -> bytes:
    """A request with its path instead of its URL, and without what is for the proxy."""
    first, *others = head.split(b"\r\n")
    method, target, version = first.split(b" ")
    kept = [line for line in others if not line.startswith(b"Proxy-")]
    return b"\r\n".join([b" ".join([method, target[target.index(b"/", 8) :], version]), *kept])


async def _pipe(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while data := await reader.read(1 << 16):
            writer.write(data)
            await writer.drain()
    writer.close()
