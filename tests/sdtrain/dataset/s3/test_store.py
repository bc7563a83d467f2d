"""What goes wrong with a store is a sentence without secrets; what comes from it is checked."""

import logging
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from sdtrain.dataset.s3 import store as module
from sdtrain.dataset.s3.store import ObjectStore, _client
from sdtrain.dataset.s3.url import parse_url, work_folder
from sdtrain.errors import UserError
from tests.sdtrain.dataset.s3.s3_fixtures import BUCKET, KEY_ID, SECRET


def test_a_missing_bucket_and_a_dead_endpoint_are_sentences_without_secrets(store, monkeypatch, caplog):
    caplog.set_level(logging.DEBUG)
    with pytest.raises(UserError, match="s3://no-such-bucket/x cannot be listed: there is no such bucket") as missing:
        ObjectStore(parse_url("s3://no-such-bucket/x")).list()
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    _client.cache_clear()
    monkeypatch.setattr("botocore.retries.standard.time.sleep", lambda seconds: None, raising=False)
    with pytest.raises(UserError, match="nobody answers at the store's address") as dead:
        ObjectStore(parse_url(f"s3://{BUCKET}/x")).list()
    shown = f"{missing.value} {dead.value} {caplog.text}"
    assert not [secret for secret in (KEY_ID, SECRET) if secret in shown]
    assert "Signature" not in caplog.text


def test_missing_credentials_are_a_sentence(store, monkeypatch, tmp_path):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    _client.cache_clear()
    with pytest.raises(UserError, match=r"there are no credentials\. Set AWS_ACCESS_KEY_ID"):
        ObjectStore(parse_url(f"s3://{BUCKET}/x")).list()


@pytest.mark.parametrize("url", ["s3://KEY:s3cr3t@bucket/x", "s3://bucket/x?secret=s3cr3t"])
def test_secrets_in_a_url_are_refused_and_not_repeated(url):
    with pytest.raises(UserError, match="bucket and prefix alone") as raised:
        parse_url(url)
    assert "s3cr3t" not in str(raised.value)


def test_a_url_without_a_prefix_is_refused():
    with pytest.raises(UserError, match="names no place for a dataset"):
        parse_url("s3://bucket/")


def test_an_object_with_other_content_is_not_taken(store, tmp_path):
    objects = ObjectStore(parse_url(f"s3://{BUCKET}/changed"))
    (tmp_path / "a").write_bytes(b"as written")
    objects.put(tmp_path / "a", "a.tar")
    store.client.put_object(Bucket=BUCKET, Key="changed/a.tar", Body=b"other")
    with pytest.raises(UserError, match=r"changed/a\.tar has another content than the manifest says"):
        objects.fetch("a.tar", tmp_path / "b", "0" * 64)
    assert not list(tmp_path.glob("*b*"))


def test_work_folders_of_two_stores_with_one_bucket_name_differ(monkeypatch, tmp_path):
    url = parse_url("s3://bucket/aesthetics/")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://one")
    one = work_folder(url, tmp_path)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://two")
    assert work_folder(url, tmp_path) != one
    assert one.name.startswith("aesthetics-")


def test_an_object_that_may_not_be_deleted_is_a_sentence(store, monkeypatch):
    objects = ObjectStore(parse_url(f"s3://{BUCKET}/kept"))
    refusal = {"Errors": [{"Key": "kept/a", "Code": "AccessDenied"}]}
    monkeypatch.setattr(objects._client, "delete_objects", lambda **_: refusal)
    with pytest.raises(UserError, match=r"kept/a cannot be deleted \(AccessDenied\)"):
        objects.delete("a")


class Cutting(BaseHTTPRequestHandler):
    """Cuts the first `num_cuts` bodies off; 416 for what begins behind the end."""

    num_cuts, asked = 1, 0

    def do_GET(self):
        type(self).asked += 1
        body = b"the content of an object"
        if self.headers.get("Range", "").startswith("bytes=100-"):
            self.send_error(416)
            return
        self.send_response(206)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[:5] if self.asked <= self.num_cuts else body)

    def log_message(self, *_):
        pass


@pytest.fixture
def cutting(store, monkeypatch):
    handler = type("Handler", (Cutting,), {})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(module, "_PAUSES_S", (0.0, 0.0))
    _client.cache_clear()
    yield handler
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_connection_that_ends_within_the_content_is_asked_again(cutting):
    objects = ObjectStore(parse_url(f"s3://{BUCKET}/x"))
    assert objects.read_part("a.tar", 0, 24) == b"the content of an object"
    assert cutting.asked == 2
    cutting.num_cuts = 99
    with pytest.raises(UserError, match="the connection ended before the content did"):
        objects.read_part("a.tar", 0, 24)
    assert cutting.asked == 5


def test_a_part_beyond_the_end_is_empty_and_one_of_nothing_is_no_file(cutting, store, monkeypatch):
    assert ObjectStore(parse_url(f"s3://{BUCKET}/x")).read_part("a.tar", 100, 24) == b""
    monkeypatch.setenv("AWS_ENDPOINT_URL", store.url)
    _client.cache_clear()
    with pytest.raises(FileNotFoundError, match=r"s3://bucket/x/a\.tar"):
        ObjectStore(parse_url(f"s3://{BUCKET}/x")).read_part("a.tar", 0, 24)
