"""A quick web server for images in a process of its own, over HTTP and HTTPS."""

from __future__ import annotations

import asyncio
import json
import ssl
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import certifi
import trustme


@contextmanager
def serve_photos(folder: Path, ca: Path) -> Iterator[dict[str, str]]:
    """Yields the start of the URLs by scheme; clients trust the server if SSL_CERT_FILE names `ca`."""
    command = [sys.executable, "-m", "tests.benchmarks.image_server", str(folder), str(ca)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout
            ports = json.loads(server.stdout.readline())
            yield {scheme: f"{scheme}://127.0.0.1:{port}" for scheme, port in ports.items()}
        finally:
            server.kill()


class _Connection(asyncio.Protocol):
    answers: dict[bytes, bytes]

    def __init__(self) -> None:
        self._received = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._received += data
        while (end := self._received.find(b"\r\n\r\n")) >= 0:
            request, self._received = self._received[:end], self._received[end + 4 :]
            image = request.split(b" ", 2)[1].rpartition(b"/")[2]
            self._transport.write(self.answers[image])
            if b"connection: close" in request.lower():
                self._transport.close()


async def _serve(folder: Path, ca: Path) -> None:
    for path in folder.iterdir():
        head = f"HTTP/1.1 200 OK\r\nContent-Type: image/jpeg\r\nContent-Length: {path.stat().st_size}\r\n\r\n"
        _Connection.answers[path.name.encode()] = head.encode() + path.read_bytes()
    authority, tls = trustme.CA(), ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(tls)
    # Beside the authorities that everybody trusts: to read them takes its time, as it does on the web.
    ca.write_bytes(authority.cert_pem.bytes() + Path(certifi.where()).read_bytes())
    loop, ports = asyncio.get_running_loop(), {}
    for scheme, context in (("http", None), ("https", tls)):
        server = await loop.create_server(_Connection, "127.0.0.1", 0, ssl=context, backlog=1024)
        ports[scheme] = server.sockets[0].getsockname()[1]
    print(json.dumps(ports), flush=True)
    await loop.run_in_executor(None, sys.stdin.read)


if __name__ == "__main__":
    _Connection.answers = {}
    asyncio.run(_serve(Path(sys.argv[1]), Path(sys.argv[2])))
