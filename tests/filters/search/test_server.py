"""The page over HTTP: what it shows, and what it refuses."""

import asyncio
import io
import socket
from urllib.parse import urlsplit

import httpx
import pytest
import uvicorn
from PIL import Image

from filters.search.hits import image_bytes
from filters.search.search import MAX_PICTURE_BYTES, Search
from filters.search.server import _TYPES, SearchPage, serve
from sdtrain.images.decode import IMAGE_EXTENSIONS
from tests.filters.removal_fixtures import caption_of, copy_of, make_photo

BINARY = {"Content-Type": "application/octet-stream"}


class Page:
    """Requests to the application, without a socket; its addresses are taken as they are."""

    def __init__(self, search, top=12):
        self.app = SearchPage(search, top).app(["127.0.0.1"])

    def __call__(self, path, method="GET", **options):
        async def ask():
            transport = httpx.ASGITransport(self.app)
            async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
                return await client.request(method, path, **options)

        return asyncio.run(ask())


@pytest.fixture
def page(search):
    return Page(search)


def test_the_page_shows_what_is_known_of_an_image(page, search):
    (hit,) = (h for number in (4, 20) for h in search.by_words(caption_of(number), 1) if h.reason)
    text = page("/", params={"q": hit.caption, "by": "words"}).text
    for shown in (hit.url, hit.uid, hit.key, hit.sha256, "duplicate_exact", hit.caption):
        assert shown in text
    assert page(f"/image/{hit.key}").content == image_bytes(search.dataset, hit)
    assert Image.open(io.BytesIO(page(f"/thumb/{hit.key}").content)).format == "JPEG"


def test_a_dropped_image_finds_its_copies_first(page):
    name = page("/ask", "POST", content=make_photo(6, 70), headers=BINARY).json()["image"]
    text = page("/", params={"image": name}).text
    first, second, third = text.split('<figure class="card"')[1:4]
    assert {number for number in (6, 22) for part in (first, second) if caption_of(number) in part} == {6, 22}
    assert caption_of(6) not in third
    assert page(f"/asked/{name}").headers["content-type"] == "image/jpeg"


def test_captions_and_questions_are_escaped(embedded_dataset, tmp_path, monkeypatch):
    import duckdb

    dataset = copy_of(embedded_dataset, tmp_path)
    evil = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>"
    for path in dataset.root.glob("images/*.parquet"):
        duckdb.execute(f"CREATE OR REPLACE TABLE t AS FROM '{path}'")
        duckdb.execute("UPDATE t SET caption = caption || ?, url = 'javascript:alert(3)'", [evil])
        duckdb.execute(f"COPY t TO '{path}'")
    page = Page(Search(dataset))
    text = page("/", params={"q": "unique ünïque" + evil, "by": "words"}).text
    assert "&lt;script&gt;" in text
    assert "<script>alert" not in text
    assert "<img src=x" not in text
    assert 'href="javascript:' not in text
    assert evil not in page("/", params={"like": evil, "only": evil, "by": evil}).text


def test_every_answer_forbids_foreign_scripts(page):
    for path in ("/", "/assets/search.js", "/assets/none", "/image/1", "/nothing"):
        headers = page(path).headers
        assert "default-src 'none'" in headers["content-security-policy"]
        assert "unsafe" not in headers["content-security-policy"]
        assert headers["x-content-type-options"] == "nosniff"


def test_other_hosts_are_refused(page):
    assert page("/", headers={"Host": "evil.example"}).status_code == 400
    assert page("/", headers={"Host": "127.0.0.1:8040"}).status_code == 200


@pytest.mark.parametrize(
    "path",
    [
        "/assets/../search.html",
        "/assets/%2e%2e%2fserver.py",
        "/assets/search.html",
        "/image/..%2f..%2frecipe.yaml",
        "/image/%2fetc%2fpasswd",
        "/image/1'%20OR%20'1'='1",
        "/thumb/999999999999999999",
        "/asked/..%2frecipe.yaml",
    ],
)
def test_no_address_leads_to_a_file(page, path):
    answer = page(path)
    assert answer.status_code == 404
    assert "There is no such thing" in answer.text or answer.text == "Not Found"


def test_bodies_that_are_no_image_or_too_large_or_from_a_foreign_form_are_refused(page):
    assert page("/ask", "POST", content=b"no image", headers=BINARY).status_code == 400
    too_large = page("/ask", "POST", content=b"x" * (MAX_PICTURE_BYTES + 1), headers=BINARY)
    assert (too_large.status_code, too_large.json()) == (413, {"error": "More than 32 MB."})
    assert page("/ask", "POST", content=make_photo(1), headers={"Content-Type": "text/plain"}).status_code == 415
    assert page("/", "POST").status_code == 405


def test_a_bomb_of_pixels_is_refused_before_it_is_decoded(page):
    bomb = io.BytesIO()
    Image.new("1", (20000, 20000)).save(bomb, "PNG")
    answer = page("/ask", "POST", content=bomb.getvalue(), headers=BINARY)
    assert answer.status_code == 400
    assert "cannot be read as an image" in answer.json()["error"]


def test_a_forgotten_image_is_a_sentence(page):
    assert "That image is forgotten. Drop it again." in page("/", params={"image": "0" * 32}).text
    assert "There is no such image." in page("/", params={"like": "12345"}).text


def test_the_address_takes_connections_from_the_moment_it_is_printed(search, monkeypatch, capsys):
    def connect(server, sockets):
        address = urlsplit(capsys.readouterr().out.split()[-4])
        socket.create_connection((address.hostname, address.port), timeout=60).close()
        sockets[0].close()

    monkeypatch.setattr(uvicorn.Server, "run", connect)
    serve(search, "127.0.0.1", 0, 12)


def test_the_page_knows_the_type_of_every_image_that_a_dataset_stores():
    assert sorted(_TYPES) == sorted(IMAGE_EXTENSIONS)
