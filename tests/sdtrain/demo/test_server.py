import contextlib
import http.client
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator

import psutil
import pyarrow.parquet as pq
import pytest

from sdtrain.demo.rows import Row, plan_rows
from sdtrain.demo.server import Served, serve_world
from sdtrain.demo.world import World, make_world
from sdtrain.errors import UserError


@pytest.fixture(scope="module")
def idle(tmp_path_factory: pytest.TempPathFactory) -> World:
    """A world that is not on line."""
    return make_world(tmp_path_factory.mktemp("idle"), 60, http_port=0, https_port=0, num_processes=1)


@pytest.fixture(scope="module")
def served(world: World) -> Iterator[Served]:
    with serve_world(world) as served:
        yield served


def _of_kind(world: World, kind: str) -> tuple[Row, str]:
    urls = pq.read_table(world.metadata)["URL"].to_pylist()
    return next(
        (row, url) for row, url in zip(plan_rows(world.num_rows, world.seed), urls, strict=True) if row.kind == kind
    )


def _fetch(url: str, timeout_s: float = 5) -> bytes:
    with urllib.request.urlopen(url, timeout=timeout_s) as response:
        body: bytes = response.read()
        return body


def _ends(pid: int, within_s: float = 5) -> bool:
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.05)
    return False


def test_images_come_whole_over_http_and_https(served: Served) -> None:
    row, _ = _of_kind(served.world, "ok")
    assert row.file
    stored = (served.world.images / row.file).read_bytes()
    assert _fetch(served.http + row.path) == stored
    assert _fetch(served.https + row.path) == stored


def test_every_host_answers(served: Served) -> None:
    row, _ = _of_kind(served.world, "ok")
    for host in range(1, 6):
        assert _fetch(f"https://127.0.0.{host}:{served.world.https_port}{row.path}")


@pytest.mark.parametrize(("kind", "status"), [("not_found", 404), ("forbidden", 403), ("server_error", 500)])
def test_error_pages_have_their_status(served: Served, kind: str, status: int) -> None:
    with pytest.raises(urllib.error.HTTPError) as caught:
        _fetch(_of_kind(served.world, kind)[1])
    assert caught.value.code == status


def test_flaky_pages_fail_once_then_serve(served: Served) -> None:
    row, url = _of_kind(served.world, "flaky")
    with pytest.raises(urllib.error.HTTPError):
        _fetch(url)
    assert row.file
    assert _fetch(url) == (served.world.images / row.file).read_bytes()


def test_redirects_lead_to_the_image_and_loops_to_an_error(served: Served) -> None:
    row, url = _of_kind(served.world, "redirect")
    assert row.file
    assert _fetch(url) == (served.world.images / row.file).read_bytes()
    with pytest.raises(urllib.error.HTTPError, match="infinite loop"):
        _fetch(_of_kind(served.world, "redirect_loop")[1])


def test_truncated_bodies_end_early_and_at_once(served: Served) -> None:
    started = time.monotonic()
    with pytest.raises(http.client.IncompleteRead):
        _fetch(_of_kind(served.world, "truncated")[1])
    assert time.monotonic() - started < 30


def test_hanging_pages_outlast_the_client(served: Served) -> None:
    with pytest.raises((TimeoutError, urllib.error.URLError), match="timed out"):
        _fetch(_of_kind(served.world, "hang")[1], timeout_s=0.3)


def test_html_robots_refusal_and_wrong_certificate(served: Served) -> None:
    assert b"<title>" in _fetch(_of_kind(served.world, "html")[1])
    with urllib.request.urlopen(_of_kind(served.world, "robots")[1], timeout=5) as response:
        assert "noai" in response.headers["X-Robots-Tag"]
    with pytest.raises(urllib.error.URLError, match="refused"):
        _fetch(_of_kind(served.world, "refused")[1])
    with pytest.raises(urllib.error.URLError, match="CERTIFICATE_VERIFY_FAILED"):
        _fetch(_of_kind(served.world, "bad_certificate")[1])


def test_requests_are_counted_per_path(served: Served) -> None:
    row, _ = _of_kind(served.world, "ok")
    before = served.stats()
    _fetch(served.http + row.path)
    after = served.stats()
    assert after["total"] == before["total"] + 1
    assert after["requests"][row.path] == before["requests"].get(row.path, 0) + 1


def test_a_second_server_of_the_same_world_is_refused_and_the_first_stays_trusted(served: Served) -> None:
    with pytest.raises(UserError, match="is taken by another program"), serve_world(served.world):
        pass
    assert _fetch(served.https + _of_kind(served.world, "ok")[0].path)


def test_the_environment_is_restored_and_the_child_ends(idle: World) -> None:
    before = dict(os.environ)
    with contextlib.suppress(RuntimeError), serve_world(idle) as served:
        assert os.environ["SSL_CERT_FILE"] == str(idle.ca)
        pid = served.stats()["pid"]
        raise RuntimeError
    assert dict(os.environ) == before
    assert _ends(pid, 0.1)
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", idle.http_port), timeout=1)


def test_the_child_ends_when_its_parent_is_killed(idle: World) -> None:
    script = (
        "import sys, time, pathlib\n"
        "from sdtrain.demo.server import serve_world\n"
        "from sdtrain.demo.world import open_world\n"
        "with serve_world(open_world(pathlib.Path(sys.argv[1]))) as served:\n"
        "    print(served.stats()['pid'], flush=True)\n"
        "    time.sleep(60)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script, str(idle.directory)], stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout
        pid = int(parent.stdout.readline())
        parent.send_signal(signal.SIGKILL)
    assert _ends(pid)


def test_started_by_hand_it_prints_its_addresses(idle: World) -> None:
    command = [sys.executable, "-m", "sdtrain.demo.server", str(idle.directory)]
    server = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
        text=True,
        # A shell that starts us in the background sets SIGINT to be ignored, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    try:
        assert server.stdout
        assert server.stdout.readline().strip() == f"http://127.0.0.1:{idle.http_port}"
        server.send_signal(signal.SIGINT)
        assert server.wait(5) == 0
    finally:
        server.kill()
        server.communicate()


def test_the_server_starts_without_torch() -> None:
    command = "import sys, sdtrain.demo.server; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
