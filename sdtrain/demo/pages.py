"""The demo server's responses: the image, or a failure of the real web."""

from __future__ import annotations

import json
import os
import socket
import socketserver
import ssl
import threading
from collections import Counter
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

STATS_PATH = "/_stats"
HANG_S = 20.0
IDLE_S = 30.0
_TYPES = {".jpg": "image/jpeg", ".png": "image/png", ".webp": "image/webp"}
_NONE: Mapping[str, str] = MappingProxyType({})
_WEB_PAGE = b"<!doctype html><title>Gone</title><p>This picture has moved. See our new gallery!\n"


class Site:
    """State that all listeners share: pages, image files, request counts."""

    def __init__(self, pages: Mapping[str, Mapping[str, str | None]], images: Path) -> None:
        self.pages = pages
        self.images = images
        self._requests: Counter[str] = Counter()
        self._lock = threading.Lock()

    def count(self, path: str) -> int:
        """Counts a request; returns the total for `path`."""
        with self._lock:
            self._requests[path] += 1
            return self._requests[path]

    def stats(self) -> dict[str, Any]:
        """Requests, total and per path, since the start."""
        with self._lock:
            return {"pid": os.getpid(), "total": self._requests.total(), "requests": dict(self._requests)}


class Listener(ThreadingHTTPServer):
    """Listens at one address; with `tls`, speaks HTTPS."""

    daemon_threads = True
    request_queue_size = 256  # for dozens of simultaneous connections

    def __init__(self, address: tuple[str, int], site: Site, tls: ssl.SSLContext | None = None) -> None:
        super().__init__(address, Handler)
        self.site = site
        self.tls = tls

    def server_bind(self) -> None:
        """Binds without the slow (seconds) name look-up of `HTTPServer`."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = self.server_address[:2]  # type: ignore[assignment]

    def finish_request(self, request: Any, client_address: Any) -> None:
        """Handles one connection, with its TLS handshake, in its own thread."""
        if self.tls is None:
            super().finish_request(request, client_address)
            return
        request.settimeout(IDLE_S)
        with self.tls.wrap_socket(request, server_side=True) as secured:
            super().finish_request(secured, client_address)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignores it: clients are meant to hang up or reject the certificate."""


class Handler(BaseHTTPRequestHandler):
    """Answers GET by the path's page; the methods after `do_GET` are named after `Row.does`."""

    protocol_version = "HTTP/1.1"
    server_version = "sdtrain-demo"
    timeout = IDLE_S
    disable_nagle_algorithm = True

    def do_GET(self) -> None:
        """Answers by the path's page."""
        path = self.path.split("?")[0]
        if path == STATS_PATH:
            self._send(json.dumps(self._site.stats()).encode(), "application/json")
            return
        num_requests = self._site.count(path)
        page = self._site.pages.get(path)
        does = "not_found" if page is None else page["does"]
        file = None if page is None else page["file"]
        getattr(self, f"_{does}")(file, num_requests)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        """Keeps quiet."""

    @property
    def _site(self) -> Site:
        return cast(Listener, self.server).site

    def _send(self, body: bytes, content_type: str, status: int = 200, headers: Mapping[str, str] = _NONE) -> None:
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def _picture(self, file: str, num_requests: int, headers: Mapping[str, str] = _NONE) -> None:
        path = self._site.images / file
        self._send(path.read_bytes(), _TYPES[path.suffix], headers=headers)

    def _robots(self, file: str, num_requests: int) -> None:
        self._picture(file, num_requests, {"X-Robots-Tag": "noai, noimageai"})

    def _not_found(self, file: None, num_requests: int) -> None:
        self._send(_WEB_PAGE, "text/html", 404)

    def _forbidden(self, file: None, num_requests: int) -> None:
        self._send(_WEB_PAGE, "text/html", 403)

    def _server_error(self, file: str | None, num_requests: int) -> None:
        self._send(_WEB_PAGE, "text/html", 500)

    def _flaky(self, file: str, num_requests: int) -> None:
        answer = self._server_error if num_requests == 1 else self._picture
        answer(file, num_requests)

    def _redirect(self, file: str, num_requests: int) -> None:
        # At another path, so that only following the redirect finds the image.
        if self.path.endswith("?moved"):
            self._picture(file, num_requests)
        else:
            self._send(b"", "text/html", 302, {"Location": f"{self.path}?moved"})

    def _redirect_loop(self, file: None, num_requests: int) -> None:
        self._send(b"", "text/html", 302, {"Location": self.path})

    def _hang(self, file: None, num_requests: int) -> None:
        threading.Event().wait(HANG_S)
        self.close_connection = True

    def _truncated(self, file: str, num_requests: int) -> None:
        body = (self._site.images / file).read_bytes()
        self._send(body[: len(body) // 2], "image/jpeg", headers={"Content-Length": str(len(body))})
        self.close_connection = True
        # The client must see the end now, not after its timeout.
        self.connection.shutdown(socket.SHUT_WR)

    def _html(self, file: None, num_requests: int) -> None:
        self._send(_WEB_PAGE, "text/html")
