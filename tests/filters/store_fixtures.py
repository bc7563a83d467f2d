"""A web server on loopback that DuckDB's httpfs can read from: files by ranges, and S3's list of a bucket."""

import threading
from collections import Counter
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, quote, quote_plus, unquote, urlsplit

import duckdb
import pytest

from filters.select.httpfs import load_remote
from sdtrain.errors import UserError

SIGNATURE, PASSWORD = "S1gn+ature/of=a test", "p4ss,w0rd=of+me"
QUERY = f"X-Amz-Expires=3600&X-Amz-Signature={quote(SIGNATURE, safe='')}"
PLANTED = f"https://me:{quote(PASSWORD, safe='')}@data.example/x.parquet?{QUERY}"
SPELLINGS = [
    change(secret)
    for secret in (SIGNATURE, PASSWORD)
    for change in (str, quote, quote_plus, lambda text: quote(text, safe=""), lambda text: text.replace("+", " "))
]
"""Of the secrets in PLANTED, as they may stand in a file."""


def has_httpfs():
    with duckdb.connect() as connection:
        try:
            load_remote(connection)
        except UserError:
            return False
        return True


needs_httpfs = pytest.mark.skipif(not has_httpfs(), reason="DuckDB's httpfs is not installed (extra `remote`)")


class Store(BaseHTTPRequestHandler):
    """Files as /bucket/key, with ranges, and S3's list of a bucket."""

    protocol_version = "HTTP/1.1"
    files: dict[str, bytes]
    sent: Counter
    seen: list[tuple[str, str]]

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        url = urlsplit(self.path)
        path = unquote(url.path).strip("/")
        self.seen.append((self.path, self.headers.get("Authorization", "")))
        if "list-type" in parse_qs(url.query):
            self.answer(200, self.listing(path, parse_qs(url.query).get("prefix", [""])[0]).encode())
        elif path not in self.files:
            self.answer(404, b"no such key")
        else:
            self.answer_file(path)

    def answer_file(self, path):
        content = self.files[path]
        wanted = self.headers.get("Range")
        if not wanted:
            self.answer(200, content)
            return
        begin, end = wanted.removeprefix("bytes=").split("-")
        begin, end = int(begin), min(int(end or len(content)), len(content) - 1)
        self.sent[path] += end + 1 - begin
        self.answer(206, content[begin : end + 1], ("Content-Range", f"bytes {begin}-{end}/{len(content)}"))

    def listing(self, bucket, prefix):
        keys = sorted(path.removeprefix(f"{bucket}/") for path in self.files if path.startswith(f"{bucket}/{prefix}"))
        found = "".join(
            f"<Contents><Key>{key}</Key><Size>{len(self.files[f'{bucket}/{key}'])}</Size></Contents>" for key in keys
        )
        return f"<ListBucketResult><IsTruncated>false</IsTruncated>{found}</ListBucketResult>"

    def answer(self, status, content, *headers):
        self.send_response(status)
        for name, value in (("Content-Length", len(content)), ("Accept-Ranges", "bytes"), *headers):
            self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *args):
        pass


@contextmanager
def serving(kind=Store):
    """A running server: its handler class has `files`, `sent` and `seen`; its address is `url`."""
    handler = type("Handler", (kind,), {"files": {}, "sent": Counter(), "seen": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    handler.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield handler
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
