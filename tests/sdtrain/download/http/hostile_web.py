"""A web server with bad manners, over plain HTTP and over TLS, in a thread of its own.

`/name` or `/name/anything` does what `CASES[name]` says; each of `TLS_CASES` has a port of its own. The server
knows nothing of the code that is tested with it.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import ssl
import threading
import time
from collections import Counter
from collections.abc import Iterator

import trustme

from tests.sdtrain.download.http.hostile_cases import CASES, TLS_CASES, Act, Visit, answer, raw, silent


class HostileWeb:
    """The server: its ports, who asked for what, and the authority that its certificates come from.

    Attributes:
        acts: what to do for paths by their first part, beside the cases.
        asked: how often each path was asked for.
        requests: time, path and head of every request.
    """

    def __init__(self, address: str = "127.0.0.1", name: str = "127.0.0.1") -> None:
        self.address, self.name = address, name
        self.authority = trustme.CA()
        self.asked: Counter[str] = Counter()
        self.requests: list[tuple[float, str, bytes]] = []
        self.acts: dict[str, Act] = {}
        self.ports: dict[str, int] = {}
        self._servers: list[asyncio.Server] = []

    def url(self, case: str, rest: str = "", scheme: str = "http") -> str:
        if case in TLS_CASES:
            return f"https://{self.name}:{self.ports[case]}/ok{rest}"
        return f"{scheme}://{self.name}:{self.ports['tls_ok' if scheme == 'https' else 'plain']}/{case}{rest}"

    @contextlib.contextmanager
    def running(self) -> Iterator[HostileWeb]:
        loop = asyncio.new_event_loop()
        thread = threading.Thread(target=loop.run_forever, daemon=True)
        thread.start()
        asyncio.run_coroutine_threadsafe(self._listen(), loop).result(10)
        try:
            yield self
        finally:
            asyncio.run_coroutine_threadsafe(self._end(), loop).result(10)
            loop.call_soon_threadsafe(loop.stop)
            thread.join(10)
            loop.close()

    async def _listen(self) -> None:
        for name, tls in {"plain": None, **self._contexts()}.items():
            self._add(name, await asyncio.start_server(self._serve, self.address, 0, ssl=tls))
        for name, act in {"tls_silent": silent, "tls_closes": raw(), "tls_is_plain": answer()}.items():

            async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, act: Act = act) -> None:
                with contextlib.suppress(OSError, asyncio.CancelledError):  # cancelled at the end, which streams report
                    await act(Visit("/", 1, 0, reader, writer))
                writer.close()

            self._add(name, await asyncio.start_server(serve, self.address, 0))

    def _add(self, name: str, server: asyncio.Server) -> None:
        self._servers.append(server)
        self.ports[name] = server.sockets[0].getsockname()[1]

    def _contexts(self) -> dict[str, ssl.SSLContext]:
        past = datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=1)
        certificates = {
            "tls_ok": self.authority.issue_cert(self.name),
            "tls_expired": self.authority.issue_cert(self.name, not_after=past),
            "tls_self_signed": trustme.CA().issue_cert(self.name),
            "tls_wrong_name": self.authority.issue_cert("other.example"),
        }
        contexts = {}
        for name, certificate in certificates.items():
            contexts[name] = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            certificate.configure_cert(contexts[name])
        return contexts

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            while not writer.is_closing():
                head = await reader.readuntil(b"\r\n\r\n")
                path = head.split(b" ")[1].decode("latin-1")
                self.asked[path] += 1
                self.requests.append((time.monotonic(), path, head))
                port = writer.get_extra_info("sockname")[1]
                await self._act(path)(Visit(path, self.asked[path], port, reader, writer))
        writer.close()

    def _act(self, path: str) -> Act:
        name = path.split("/")[1].split("?")[0]
        if name in self.acts:
            return self.acts[name]
        return CASES[name].act if name in CASES else answer(status="404 Not Found", body=b"")

    async def _end(self) -> None:
        for server in self._servers:
            server.close()
        tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
