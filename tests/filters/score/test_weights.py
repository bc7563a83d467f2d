"""Weights come from where the recipe says, are what they were, and bring no code."""

import http.server
import os
import threading
from hashlib import sha256
from pathlib import Path

import pytest
import torch

from filters.recipe import ScoreConfig
from filters.score.stage import score_shards, weight_digests
from filters.score.weights import PUBLISHED, digest_of, find_weights
from sdtrain.dataset.layout import DatasetDir
from sdtrain.errors import UserError
from sdtrain.models.weights import Published, cache_dir, read_state


class _Harmful:
    def __reduce__(self):
        return (Path.touch, (Path("harm-was-done"),))


def test_a_pickle_that_runs_code_is_refused_and_does_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"weights": _Harmful()}, tmp_path / "bad.pt")
    with pytest.raises(UserError, match=r"bad\.pt is not a file of weights that is safe to load"):
        read_state(tmp_path / "bad.pt")
    assert not Path("harm-was-done").exists()


@pytest.mark.parametrize("content", [b"", b"<html>404</html>", b"PK\x03\x04 cut short"])
@pytest.mark.parametrize("name", ["w.pt", "w.safetensors"])
def test_a_file_that_holds_no_weights_is_refused(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match="is not a file of weights"):
        read_state(tmp_path / name)


@pytest.mark.parametrize("content", [[torch.zeros(1)], torch.zeros(1), {"epoch": 3}])
def test_a_file_of_something_else_than_named_tensors_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "w.pt")
    with pytest.raises(UserError, match="does not hold tensors by name"):
        read_state(tmp_path / "w.pt")


def test_an_unknown_name_gets_the_nearest_one():
    with pytest.raises(UserError, match="Did you mean 'laion-nsfw-l14'"):
        find_weights("laion-nsfw-b14")


def test_a_seed_that_is_no_number_is_refused():
    with pytest.raises(UserError, match="after 'random:' comes a whole number"):
        digest_of("random:x")


def test_digests_tell_files_by_content_and_random_weights_by_seed(tmp_path):
    (tmp_path / "a.pt").write_bytes(b"a")
    assert digest_of(str(tmp_path / "a.pt")) == sha256(b"a").hexdigest()
    assert digest_of("random:1") != digest_of("random:2") != digest_of(None)


def test_weights_that_cannot_be_fetched_are_named_with_url_and_place(monkeypatch, tmp_path):
    monkeypatch.setenv("SDTRAIN_CACHE", str(tmp_path))
    monkeypatch.setitem(PUBLISHED, "far", Published("https://127.0.0.1:1/far.pt", "far.pt"))
    with pytest.raises(UserError) as error:
        find_weights("far")
    assert "https://127.0.0.1:1/far.pt" in str(error.value)
    assert str(tmp_path) in str(error.value)


@pytest.fixture
def published(monkeypatch, tmp_path):
    """A loopback server that gives b"weights" and counts requests; yields (URL, counts)."""
    asked: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"weights")

        def log_message(self, *arguments):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("SDTRAIN_CACHE", str(tmp_path / "cache"))
    yield f"http://127.0.0.1:{server.server_port}/w.pt", asked
    server.shutdown()
    server.server_close()


def test_published_weights_are_fetched_once_and_checked(monkeypatch, published):
    url, asked = published
    monkeypatch.setitem(PUBLISHED, "mine", Published(url, "w.pt", sha256(b"weights").hexdigest()))
    assert find_weights("mine").read_bytes() == b"weights"
    assert find_weights("mine").parent == cache_dir()
    assert len(asked) == 1


def test_other_bytes_than_the_published_ones_are_not_kept(monkeypatch, published):
    url, _ = published
    monkeypatch.setitem(PUBLISHED, "mine", Published(url, "w.pt", sha256(b"others").hexdigest()))
    with pytest.raises(UserError, match="gave other bytes"):
        find_weights("mine")
    assert not (cache_dir() / "w.pt").exists()


def test_what_has_no_published_digest_is_trusted_when_first_used_and_must_stay_as_it_was(monkeypatch, published):
    monkeypatch.setitem(PUBLISHED, "mine", Published(published[0], "w.pt"))
    path, seen = find_weights("mine"), cache_dir() / "w.pt.sha256"
    assert seen.read_text() == f"{sha256(b'weights').hexdigest()}  w.pt\n"
    assert find_weights("mine") == path
    path.write_bytes(b"others")
    with pytest.raises(UserError, match=r"w\.pt is not what it was when it was first used"):
        find_weights("mine")
    path.unlink()
    assert find_weights("mine").read_bytes() == b"weights"


def test_a_cache_that_others_fill_is_used_as_it_is(monkeypatch, published):
    monkeypatch.setitem(PUBLISHED, "mine", Published(published[0], "w.pt"))
    cache_dir().mkdir()
    (cache_dir() / "w.pt").write_bytes(b"weights")

    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "fsync", refuse)
    assert find_weights("mine").read_bytes() == b"weights"
    assert [path.name for path in cache_dir().iterdir()] == ["w.pt"]


NOTHING = dict.fromkeys(("clip_weights", "aesthetic_weights", "watermark_weights", "safety_weights"))


def test_a_recipe_pins_the_digest_of_a_file(tmp_path):
    path = tmp_path / "w.pt"
    path.write_bytes(b"weights")
    pinned = NOTHING | {"watermark_weights": str(path), "watermark_sha256": sha256(b"weights").hexdigest()}
    assert dict(weight_digests(ScoreConfig(**pinned)))["watermark"] == sha256(b"weights").hexdigest()
    path.write_bytes(b"other weights")
    changed = ScoreConfig(**pinned, batch_size=7)
    with pytest.raises(UserError, match=f"score.watermark_sha256 is .*{sha256(b'other weights').hexdigest()}"):
        next(score_shards(DatasetDir(tmp_path), changed, [0]))


def test_a_pin_changes_no_score(tmp_path):
    (tmp_path / "w.pt").write_bytes(b"weights")
    config = NOTHING | {"watermark_weights": str(tmp_path / "w.pt")}
    pinned = ScoreConfig(**config, watermark_sha256=sha256(b"weights").hexdigest())
    assert pinned.described() == ScoreConfig(**config).described()
    assert not any("sha256" in name for name in pinned.described())


@pytest.mark.parametrize("weights", [None, "random:1", "random-full:1"])
def test_what_has_no_file_cannot_be_pinned(weights):
    with pytest.raises(ValueError, match="safety_sha256 is the digest of a file, and safety_weights is"):
        ScoreConfig(safety_weights=weights, safety_sha256="0" * 64)
    with pytest.raises(ValueError, match="should match pattern"):
        ScoreConfig(safety_sha256="abc")


def test_a_pin_of_open_clips_own_weights_says_that_it_cannot_be_checked():
    config = ScoreConfig(**NOTHING | {"clip_weights": "openai", "clip_sha256": "0" * 64})
    with pytest.raises(UserError, match=r"that of clip_weights is openai.*For a name of open_clip's"):
        weight_digests(config)
