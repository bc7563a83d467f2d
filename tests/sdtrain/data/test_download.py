"""Downloads by img2dataset from a server with bad manners: every row has its reason, every run the same bytes."""

import hashlib
import http.server
import io
import itertools
import json
import os
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
import urllib.request
from dataclasses import dataclass
from typing import ClassVar

import duckdb
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import trustme
from PIL import Image

from filters.metadata import select_rows
from filters.recipe import Recipe, SelectConfig
from sdtrain.data.config import DownloadConfig
from sdtrain.data.connections import Limits, connect
from sdtrain.data.dataset import DatasetDir
from sdtrain.data.download import DOWNLOAD
from sdtrain.data.failures import FetchError
from sdtrain.data.fetch_guard import GuardedOpener
from sdtrain.data.files import sweep
from sdtrain.data.manifest import read_entry, write_entry
from sdtrain.data.stage import pending, run_batch
from sdtrain.data.tars import read_samples
from sdtrain.errors import UserError

ENDLESS_S = 60


def draw(kind="JPEG", size=(80, 60)):
    buffer = io.BytesIO()
    Image.effect_noise(size, 40).convert("RGB").save(buffer, kind)
    return buffer.getvalue()


class Handler(http.server.BaseHTTPRequestHandler):
    """`/fate/number`: the fate decides the answer."""

    protocol_version = "HTTP/1.1"
    asked: ClassVar[dict[str, int]] = {}
    picture = draw()
    png_picture = draw("PNG")

    def do_GET(self):
        fate = self.path.split("/")[1]
        self.asked[self.path] = self.asked.get(self.path, 0) + 1
        if fate.isdigit():
            self.answer(b"no", int(fate))
        else:
            getattr(self, fate)()

    def answer(self, body, status=200, **headers):
        self.send_response(status)
        for name, value in {"Content_Length": len(body), "Connection": "close", **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        self.wfile.write(body)
        self.close_connection = True

    def ok(self):
        self.answer(self.picture)

    def png(self):
        self.answer(self.png_picture)

    def html(self):
        self.answer(b"<html>no picture</html>")

    def robots(self):
        self.answer(self.picture, X_Robots_Tag="noai")

    def moved(self):
        self.answer(b"", 302, Location=self.path.replace("moved", "ok"))

    def loop(self):
        self.answer(b"", 302, Location=self.path + "x")

    def to_file(self):
        self.answer(b"", 302, Location="file:///etc/hostname")

    def to_metadata(self):
        self.answer(b"", 302, Location="http://169.254.169.254/latest")

    def cut(self):
        self.answer(self.picture[:500], Content_Length=len(self.picture))

    def flaky(self):
        self.answer(self.picture, 200 if self.asked[self.path] > 1 else 503)

    def nonsense(self):
        self.wfile.write(b"\x00\x01\x02 hello\r\n\r\n")
        self.close_connection = True

    def silent(self):
        time.sleep(5)
        self.close_connection = True

    def drip(self):
        self.send_response(200)
        self.end_headers()
        end = time.monotonic() + ENDLESS_S
        while time.monotonic() < end:
            self.wfile.write(b"x")
            time.sleep(0.1)

    def flood(self):
        self.send_response(200)
        self.end_headers()
        while True:
            self.wfile.write(bytes(1 << 16))

    def log_message(self, *args):
        pass


class Server(http.server.ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, request, client_address):
        pass


@pytest.fixture(scope="module")
def site():
    server = Server(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def secure_site(tmp_path_factory):
    """An https server, and the file with the certificate that one must trust for it."""
    authority, tls = trustme.CA(), ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(tls)
    server = Server(("127.0.0.1", 0), Handler)
    server.socket = tls.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    ca = tmp_path_factory.mktemp("tls") / "ca.pem"
    authority.cert_pem.write_to_path(str(ca))
    yield f"https://127.0.0.1:{server.server_port}", ca
    server.shutdown()
    server.server_close()


@dataclass
class Build:
    dataset: DatasetDir
    recipe: Recipe

    def run(self, shards=None):
        return run_batch(DOWNLOAD, self.dataset, self.recipe, shards or pending(DOWNLOAD, self.dataset, self.recipe))


def prepare(folder, urls, samples_per_shard=100, **download):
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"URL": urls, "TEXT": [f"a cäption {i}" for i in range(len(urls))]}), folder / "m.parquet")
    settings = {"allow_private_hosts": True, "timeout_s": 1, "threads": 16, "image_size": 48} | download
    select = SelectConfig(metadata=str(folder / "m.parquet"), samples_per_shard=samples_per_shard)
    recipe = Recipe(name="r", select=select, download=DownloadConfig(**settings))
    dataset = DatasetDir(folder / "data")
    dataset.root.mkdir()
    write_entry(dataset, select_rows(dataset, select, allow_private_hosts=True))
    return Build(dataset, recipe)


def closed_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


FATES = {
    "ok": None, "png": None, "moved": None, "flaky": None, "404": "http_404", "403": "http_403", "500": "http_500",
    "html": "not_an_image", "robots": "robots_header", "loop": "too_many_redirects", "to_file": "url_not_allowed",
    "cut": "truncated", "nonsense": "invalid_answer", "silent": "timeout",
}  # fmt: skip


@pytest.fixture(scope="module")
def fates(site, secure_site, tmp_path_factory):
    """One build over all fates, done twice into two datasets."""
    urls = [f"{site}/{fate}/{n}.jpg" for fate in FATES for n in range(2)]
    urls += [
        f"http://127.0.0.1:{closed_port()}/refused",
        f"{secure_site[0]}/ok/secure".replace("127.0.0.1", "localhost"),
    ]
    urls += ["http://no-such-host.invalid/a.jpg", f"{site}/ok/with space ä.jpg", f"{secure_site[0]}/ok/trusted"]
    builds = []
    for name in ("first", "second"):
        Handler.asked.clear()
        build = prepare(tmp_path_factory.mktemp(name), urls, samples_per_shard=20)
        with pytest.MonkeyPatch.context() as environment:
            environment.setenv("SSL_CERT_FILE", str(secure_site[1]))
            builds.append((build, build.run(), dict(Handler.asked)))
    return builds


def table_of(dataset):
    return duckdb.sql(f"FROM '{dataset.root}/images/*.parquet' ORDER BY key").to_arrow_table().to_pylist()


def test_every_row_has_its_reason_and_the_counts_add_up(fates):
    build, reports, _ = fates[0]
    rows = table_of(build.dataset)
    assert len(rows) == sum(report.num_in for report in reports) == 2 * len(FATES) + 5
    for row in rows:
        if "127.0.0.1" in row["url"] and "refused" not in row["url"]:
            assert row["reason"] == FATES[row["url"].split("/")[3]], row
    special = {row["url"]: row["reason"] for row in rows}
    assert {reason for url, reason in special.items() if "refused" in url} == {"connection_failed"}
    assert {reason for url, reason in special.items() if "localhost" in url} == {"tls_failed"}
    assert {reason for url, reason in special.items() if "no-such-host" in url} <= {"dns_failed"}
    for report in reports:
        counted = [row["reason"] for row in rows if int(row["key"]) // 100 == report.shard]
        assert report.num_out == counted.count(None)
        assert report.dropped == {reason: counted.count(reason) for reason in set(counted) - {None}}


def test_selected_rows_keep_key_uid_and_order(fates):
    dataset = fates[0][0].dataset
    columns = "key, uid, url, caption"
    selected = duckdb.sql(f"SELECT {columns} FROM '{dataset.root}/selection/*.parquet' ORDER BY key").fetchall()
    assert duckdb.sql(f"SELECT {columns} FROM '{dataset.root}/images/*.parquet'").fetchall() == selected


def test_tars_hold_picture_caption_and_metadata_of_every_success_in_the_order_of_keys(fates):
    dataset = fates[0][0].dataset
    rows = {row["key"]: row for row in table_of(dataset) if row["reason"] is None}
    samples = [sample for shard in range(2) for sample in read_samples(dataset.images_tar(shard))]
    assert [key for key, _ in samples] == sorted(rows)
    for key, parts in samples:
        assert set(parts) == {"jpg", "txt", "json"}
        assert parts["txt"].decode() == rows[key]["caption"]
        described = json.loads(parts["json"])
        assert (described["uid"], described["url"]) == (rows[key]["uid"], rows[key]["url"])
        assert Image.open(io.BytesIO(parts["jpg"])).size == (rows[key]["width"], rows[key]["height"]) == (64, 48)
        if "/ok/" in rows[key]["url"]:
            assert rows[key]["sha256"] == hashlib.sha256(Handler.picture).hexdigest()


def test_two_runs_give_the_same_bytes(fates):
    (_, first, _), (_, second, _) = fates
    assert [report.outputs for report in first] == [report.outputs for report in second]


def test_only_what_may_pass_is_asked_again(fates):
    asked = fates[0][2]
    assert asked["/404/0.jpg"] == asked["/403/1.jpg"] == asked["/silent/0.jpg"] == asked["/robots/0.jpg"] == 1
    assert asked["/500/0.jpg"] == asked["/cut/0.jpg"] == 1 + DownloadConfig().retries
    assert asked["/flaky/0.jpg"] == 2
    assert asked["/ok/with%20space%20%C3%A4.jpg"] == 1


def test_nothing_is_left_but_the_outputs(fates):
    root = fates[0][0].dataset.root
    assert sorted(p.name for p in root.iterdir()) == ["images", "manifest", "selection"]
    assert sorted(p.name for p in (root / "images").iterdir()) == [
        f"0000{shard}{end}" for shard in range(2) for end in (".parquet", ".tar", "_stats.json")
    ]


def test_private_hosts_are_blocked_when_they_are_not_allowed(site):
    before = Handler.asked.get("/ok/1", 0)
    with pytest.raises(FetchError, match=r"^blocked_address"):
        fetch(f"{site}/ok/1", Limits(allow_private=False, deadline_s=5))
    assert Handler.asked.get("/ok/1", 0) == before


def test_a_shard_is_recorded_as_soon_as_it_is_done_and_a_second_run_does_nothing(site, tmp_path):
    build = prepare(tmp_path, [f"{site}/ok/{n}" for n in range(30)], samples_per_shard=10)
    reports = DOWNLOAD.run(build.dataset, build.recipe, [0, 1, 2])
    assert next(reports).shard == 0
    assert build.dataset.images_tar(0).exists()
    reports.close()
    assert not [p for p in psutil.Process().children() if "img2dataset_child" in " ".join(p.cmdline())]
    build.run()
    asked = sum(Handler.asked.values())
    assert pending(DOWNLOAD, build.dataset, build.recipe) == []
    slower = build.recipe.download.model_copy(update={"threads": 3, "timeout_s": 9})
    assert pending(DOWNLOAD, build.dataset, build.recipe.model_copy(update={"download": slower})) == []
    smaller = build.recipe.download.model_copy(update={"image_size": 32})
    assert pending(DOWNLOAD, build.dataset, build.recipe.model_copy(update={"download": smaller})) == [0, 1, 2]
    assert sum(Handler.asked.values()) == asked


def test_a_sample_that_img2dataset_loses_is_noticed_and_nothing_is_published(site, tmp_path, monkeypatch):
    (tmp_path / "broken").mkdir()
    # Makes the child's writer fail for one sample, which img2dataset prints and forgets.
    (tmp_path / "broken" / "sitecustomize.py").write_text(
        "import json\nreal = json.dumps\n"
        "def dumps(value, **options):\n"
        "    if isinstance(value, dict) and '/ok/3' in str(value.get('url')): raise ValueError('lost')\n"
        "    return real(value, **options)\n"
        "json.dumps = dumps\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "broken"))
    build = prepare(tmp_path, [f"{site}/ok/{n}" for n in range(6)])
    with pytest.raises(UserError, match="lost samples of shard 00000: 5 rows where 6 are due"):
        build.run()
    assert not (build.dataset.root / "images").exists()
    assert read_entry(build.dataset, "download", 0) is None


def test_a_child_that_fails_says_why(site, tmp_path, monkeypatch):
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "cv2.py").write_text("raise ImportError('no OpenCV today')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "broken"))
    build = prepare(tmp_path, [f"{site}/ok/1"])
    with pytest.raises(UserError, match=r"ended with code 1 .*no OpenCV today"):
        build.run()


def test_png_quality_out_of_range_is_a_sentence(site, tmp_path):
    build = prepare(tmp_path, [f"{site}/ok/1"], encode_format="png")
    with pytest.raises(UserError, match="compression level from 0 to 9, not 95"):
        build.run()


def test_the_child_dies_with_its_parent_and_its_leftovers_are_swept(site, tmp_path):
    build = prepare(tmp_path, [f"{site}/drip/{n}" for n in range(3)], timeout_s=30)
    (tmp_path / "recipe.json").write_text(build.recipe.model_dump_json())
    program = (
        "import sys; from pathlib import Path; from filters.recipe import Recipe\n"
        "from sdtrain.data.download import DOWNLOAD; from sdtrain.data.dataset import DatasetDir\n"
        "recipe = Recipe.model_validate_json(Path(sys.argv[2]).read_text())\n"
        "list(DOWNLOAD.run(DatasetDir(Path(sys.argv[1])), recipe, [0]))\n"
    )
    command = [sys.executable, "-c", program, str(build.dataset.root), str(tmp_path / "recipe.json")]
    parent = subprocess.Popen(command)
    child = first_child(parent.pid)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    assert psutil.wait_procs([child], timeout=10)[1] == []
    assert list(build.dataset.root.glob(".download-*.partial"))
    assert not (build.dataset.root / "images").exists()
    sweep(build.dataset.root)
    assert not list(build.dataset.root.glob(".download-*"))


def first_child(pid):
    for _ in range(200):
        children = psutil.Process(pid).children()
        if children:
            return children[0]
        time.sleep(0.05)
    raise AssertionError("no child process appeared")


def fetch(url, limits=None, timeout=1.0, num_retries=0):
    limits = limits or Limits(allow_private=True, deadline_s=2)
    return GuardedOpener(limits, num_retries).open(urllib.request.Request(url), timeout=timeout)


def test_an_endless_slow_answer_ends_at_the_deadline(site):
    started = time.monotonic()
    with pytest.raises(FetchError, match=r"^timeout"):
        fetch(f"{site}/drip/1")
    assert time.monotonic() - started < 3


def test_an_endless_slow_answer_over_tls_ends_at_the_deadline(secure_site, monkeypatch):
    monkeypatch.setenv("SSL_CERT_FILE", str(secure_site[1]))
    started = time.monotonic()
    with pytest.raises(FetchError, match=r"^timeout"):
        fetch(f"{secure_site[0]}/drip/1")
    assert time.monotonic() - started < 3


@pytest.mark.parametrize(("path", "reason"), [("flood/1", "too_large"), ("to_metadata/1", "blocked_address")])
def test_floods_and_redirects_to_cloud_metadata_are_refused(site, path, reason, monkeypatch):
    limits = Limits(allow_private=True, deadline_s=5, max_bytes=1 << 20)
    if path.startswith("to_metadata"):  # from a public page: the first hop is let through by hand
        limits = Limits(allow_private=False, deadline_s=5)
        monkeypatch.setattr("sdtrain.data.connections.is_public", lambda address: address == "127.0.0.1")
        site = site.replace("127.0.0.1", "localtest.example")
        monkeypatch.setattr(
            socket,
            "getaddrinfo",
            lambda host, port, **_: [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", port))],
        )
    with pytest.raises(FetchError, match=rf"^{reason}"):
        fetch(f"{site}/{path}", limits)


def test_a_name_that_resolves_to_a_private_address_is_blocked_and_looked_up_only_once(monkeypatch):
    # A name server that says "public" first and "private" afterwards gains nothing: there is no second look-up.
    answers = itertools.chain([["93.184.216.34", "10.0.0.8"]], itertools.repeat(["93.184.216.34"]))
    asked = []

    def resolve(host, port, **_):
        asked.append(host)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in next(answers)]

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    limits = Limits(allow_private=False, deadline_s=5)
    with pytest.raises(FetchError, match=r"^blocked_address"):
        fetch("http://pictures.example/a.jpg", limits)
    connected = []
    monkeypatch.setattr("sdtrain.data.connections._Socket.connect", lambda self, address: connected.append(address))
    connect(limits, time.monotonic() + 5, ("pictures.example", 80), 1.0).close()
    assert (asked, connected) == (["pictures.example"] * 2, [("93.184.216.34", 80)])


def test_one_tls_context_serves_all_fetches(secure_site, monkeypatch):
    monkeypatch.setenv("SSL_CERT_FILE", str(secure_site[1]))
    limits = Limits(allow_private=True, deadline_s=5)
    made = []
    monkeypatch.setattr("ssl.create_default_context", lambda *a, **k: made.append(1))
    for number in range(3):
        assert fetch(f"{secure_site[0]}/ok/{number}", limits).read() == Handler.picture
    assert not made


def test_file_and_data_urls_are_never_opened():
    for url in (f"file://{os.path.abspath(__file__)}", "data:text/plain,hello", "ftp://127.0.0.1/a"):  # noqa: PTH100
        with pytest.raises(FetchError, match=r"^url_not_allowed: scheme"):
            fetch(url)
