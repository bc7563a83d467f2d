"""Serves a demo world over HTTP and HTTPS from its own process.

By hand: `python -m sdtrain.demo.server WORLD_DIR` (Ctrl-C ends it).
"""

from __future__ import annotations

import argparse
import errno
import http.client
import json
import os
import select
import signal
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import trustme

from sdtrain.demo.pages import STATS_PATH, Listener, Site
from sdtrain.demo.rows import HOSTS
from sdtrain.demo.world import World, open_world
from sdtrain.errors import UserError

_START_S = 30.0
_STOP_S = 5.0
_FOLLOW_PARENT = "--follow-parent"


@dataclass(frozen=True)
class Served:
    """A world while it is served."""

    world: World

    @property
    def http(self) -> str:
        """Prefix of its URLs, e.g. http://127.0.0.1:18080."""
        return f"http://{HOSTS[0]}:{self.world.http_port}"

    @property
    def https(self) -> str:
        """Prefix of its TLS URLs."""
        return f"https://{HOSTS[0]}:{self.world.https_port}"

    def stats(self) -> dict[str, Any]:
        """`total` requests and `requests` per path since the start, and the server's `pid`."""
        return _stats(self.world)


@contextmanager
def serve_world(world: World) -> Iterator[Served]:
    """Serves `world` from one child process for as long as the block runs; UserError if the world's ports are taken.

    The block's environment makes OpenSSL clients and child processes trust the world's certificates (SSL_CERT_FILE) and
    bypass proxies (no_proxy). The child ends with the block, and also when this process dies.
    """
    log = world.directory / "server.log"
    command = [sys.executable, "-m", "sdtrain.demo.server", str(world.directory), _FOLLOW_PARENT]
    with log.open("w") as stderr:
        child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=stderr)  # noqa: S603
    try:
        _wait_until_it_answers(world, child, log)
        with _environment(_trusting(world)):
            yield Served(world)
    finally:
        _stop(child)


def _stats(world: World) -> dict[str, Any]:
    # urllib would use a proxy.
    connection = http.client.HTTPConnection(HOSTS[0], world.http_port, timeout=10)
    try:
        connection.request("GET", STATS_PATH)
        content: dict[str, Any] = json.loads(connection.getresponse().read())
        return content
    finally:
        connection.close()


def _wait_until_it_answers(world: World, child: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + _START_S
    while time.monotonic() < deadline:
        if child.poll() is not None:
            raise UserError(log.read_text().strip() or f"The demo's server ended with code {child.returncode}.")
        try:
            if _stats(world)["pid"] == child.pid:
                return
        except (OSError, http.client.HTTPException, ValueError, KeyError, TypeError):
            pass  # not up yet, or another server, which the child will report
        time.sleep(0.05)
    raise UserError(f"The demo's server did not answer within {_START_S:.0f} s; see {log}.")


def _trusting(world: World) -> dict[str, str]:
    bypassed = os.environ.get("no_proxy") or os.environ.get("NO_PROXY")
    return {
        "SSL_CERT_FILE": str(world.ca),
        "no_proxy": ",".join([*([bypassed] if bypassed else []), "localhost", *HOSTS]),
    }


@contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _stop(child: subprocess.Popen[bytes]) -> None:
    if child.stdin:
        child.stdin.close()
    try:
        child.wait(_STOP_S)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()


def listen(world: World) -> list[Listener]:
    """Listeners for every host, HTTP and HTTPS, bound but not yet serving; writes `world.ca`.

    UserError if a port is taken, or a loopback address is missing.
    """
    site = Site(json.loads(world.pages.read_text()), world.images)
    authority, tls = trustme.CA(), ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert(*HOSTS).configure_cert(tls)
    listeners = []
    for port, context in ((world.http_port, None), (world.https_port, tls)):
        for host in HOSTS:
            try:
                listeners.append(Listener((host, port), site, context))
            except OSError as error:
                raise UserError(_why_not(world, host, port, error)) from error
    # Not earlier: another server of this world would still need its own.
    authority.cert_pem.write_to_path(str(world.ca))
    return listeners


def _why_not(world: World, host: str, port: int, error: OSError) -> str:
    if error.errno == errno.EADDRINUSE:
        return (
            f"Port {port} of {host}, which the URLs of the demo world in {world.directory} name, is taken by another "
            "program (perhaps by another demo that is still running). End that program, or delete the world's folder "
            "to make a new one on other ports."
        )
    return f"The demo's server cannot listen at {host}:{port}: {error}. It needs the addresses {', '.join(HOSTS)}."


def _serve(world: World, follow_parent: bool) -> None:
    parent = os.getppid()
    for listener in listen(world):
        threading.Thread(target=listener.serve_forever, daemon=True).start()
    if follow_parent:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
        # The pipe shows the parent's end at once, its id even if another process holds the pipe open.
        while os.getppid() == parent and not select.select([sys.stdin], [], [], 0.5)[0]:
            pass
        return
    for port, scheme in ((world.http_port, "http"), (world.https_port, "https")):
        print("\n".join(f"{scheme}://{host}:{port}" for host in HOSTS))
    print(f"Request counts: http://{HOSTS[0]}:{world.http_port}{STATS_PATH}")
    print(f"To trust the certificates: export SSL_CERT_FILE={world.ca}", flush=True)
    threading.Event().wait()


def main() -> None:
    """Serves the world in a directory until Ctrl-C."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("world", type=Path, help="directory that make_world made")
    parser.add_argument(_FOLLOW_PARENT, action="store_true", help="end when standard input closes")
    args = parser.parse_args()
    try:
        _serve(open_world(args.world), args.follow_parent)
    except UserError as error:
        sys.exit(str(error))
    except KeyboardInterrupt:
        pass


if __name__ == "__main__":
    main()
